"""Settings of `update` and of the process: refused values, build information, threads."""

import math
import os
import re
import subprocess
import sys
from importlib.metadata import version

import adamax_ext
import numpy as np
import pytest
from adamax_ext import _core

BAD_ARGUMENTS = {
    "step": (0, -1, 1.0, "1", None, 2**63),
    "learning_rate": (-0.5, math.nan, math.inf, "0.1", None),
    "beta_1": (1, -0.5, math.nan, "0.1"),
    "beta_2": (1, -0.5, math.nan, "0.1"),
    "epsilon": (0, -1, math.nan, math.inf, "0.1"),
    "weight_decay": (-1, math.nan, math.inf, "0.1"),
    "decay": ("L2", "", None, True),
    "epsilon_mode": ("in", "", None, True),
    "grad_scale": (math.nan, math.inf, "0.1", None),
    "clipvalue": (0, -1, math.nan, math.inf, "0.1"),
    "ema_momentum": (-0.5, 1.5, math.nan, "0.1", None),
}


REFUSED = [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values]


@pytest.mark.parametrize(
    ("name", "value"), REFUSED, ids=[f"{name}={value!r:.20}" for name, value in REFUSED]
)
def test_update_refuses_settings(name, value):
    buffers = {role: np.ones(3) for role in ("param", "grad", "m", "u", "average")}
    with pytest.raises((TypeError, ValueError)) as caught:
        adamax_ext.update(**buffers, **{"step": 1, name: value})
    assert all((buffer == 1).all() for buffer in buffers.values())
    shown = repr(value) if isinstance(value, (str, type(None))) else str(value)
    assert re.match(f"{name} must be .*; received {re.escape(shown)}", str(caught.value))


def test_an_epsilon_of_0_is_legal_inside_of_the_maximum():
    param, grad, m, u = np.ones(3), np.full(3, 0.5), np.zeros(3), np.zeros(3)
    adamax_ext.update(
        param, grad, m, u, step=1, learning_rate=0.25, epsilon=0, epsilon_mode="inside"
    )
    assert (param.tolist(), u.tolist()) == ([0.75] * 3, [0.5] * 3)


def test_update_refuses_unknown_and_missing_arguments():
    buffers = [np.ones(3) for _ in range(4)]
    with pytest.raises(TypeError, match="'lr'"):
        adamax_ext.update(*buffers, step=1, lr=0.1)
    with pytest.raises(TypeError, match="'step'"):
        adamax_ext.update(*buffers)
    with pytest.raises(TypeError, match="positional"):
        adamax_ext.update(*buffers, 1)


@pytest.mark.parametrize("n", [0, -1, 1.5, 2.0, "2", None, True], ids=repr)
def test_set_num_threads_refuses(n):
    before = adamax_ext.get_num_threads()
    with pytest.raises((TypeError, ValueError), match=f"^n must be .*; received {n!r}$"):
        adamax_ext.set_num_threads(n)
    assert adamax_ext.get_num_threads() == before


def test_build_info():
    info = adamax_ext.build_info()
    keys = "version compiler flags isas_built isa_active openmp cuda_architectures"
    assert " ".join(info) == keys
    assert info["version"] == adamax_ext.__version__ == version("adamax_ext")
    assert info["isa_active"] == adamax_ext.active_isa()
    assert "scalar" in adamax_ext.available_isas()
    assert set(adamax_ext.available_isas()) <= set(info["isas_built"])
    assert "-ffp-contract=off" in info["flags"]
    assert type(info["openmp"]) is bool


CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
QUOTA = _core._cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup") or CPUS
LIMIT = min(CPUS, QUOTA)
EIGHT = "adamax_ext._core._override_cpu_limit(8);"
ONE_CPU = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
SET = "adamax_ext.set_num_threads"


@pytest.mark.parametrize(
    ("ours", "openmp", "code", "expected"),
    [
        (None, None, "", LIMIT),
        ("1000", None, "", LIMIT),
        (None, "1000", f"{SET}(1000);", LIMIT),
        (None, None, EIGHT, 8),
        ("3", None, EIGHT, 3),
        (None, "5", EIGHT, 5),
        (None, "5,2", EIGHT, 5),
        ("3", "5", EIGHT, 3),
        ("0", "5", EIGHT, 5),
        ("3", "5", EIGHT + f"{SET}(4);", 4),
        ("3", "5", EIGHT + f"{SET}(9);", 8),
        pytest.param("3", None, ONE_CPU + f"{SET}(4);", 1, id="affinity"),
    ],
)
def test_number_of_threads(ours, openmp, code, expected):
    if "setaffinity" in code and not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    given = {"ADAMAX_EXT_NUM_THREADS": ours, "OMP_NUM_THREADS": openmp}
    environment |= {name: value for name, value in given.items() if value is not None}
    script = f"import adamax_ext; {code} print(adamax_ext.get_num_threads())"
    assert (
        subprocess.check_output([sys.executable, "-c", script], env=environment)
        == b"%d\n" % expected
    )


V2, V1 = "0::/a/b\n", "12:pids:/z\n4:cpu,cpuacct:/a/b\n3:cpuset:/c\n"


def v1(folder, quota, period=100000):
    values = {"quota": quota, "period": period}
    return {f"{folder}/cpu.cfs_{name}_us": f"{value}\n" for name, value in values.items()}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (None, {"cpu.max": "100000 100000"}, 0),
        ("", {"cpu.max": "100000 100000"}, 0),
        ("nonsense\n\n:\n", {"cpu.max": "100000 100000"}, 0),
        (V2, {}, 0),
        (V2, {"a/b/cpu.max": "max 100000\n"}, 0),
        (V2, {"a/b/cpu.max": "200000 100000\n"}, 2),
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 2),
        (V2, {"a/b/cpu.max": "1000 100000\n"}, 1),
        (V2, {"a/b/cpu.max": "300000 50000\n"}, 6),
        (V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3),
        (V2, {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        (V2, {"cpu.max": "500000 100000"}, 5),  # of a container, which sees no other folder
        (V2, {"a/b/c/cpu.max": "100000 100000", "other/cpu.max": "100000 100000"}, 0),
        ("0::/\n", {"cpu.max": "500000 100000"}, 5),
        (V1, {}, 0),
        (V1, v1("cpu/a/b", -1), 0),
        (V1, v1("cpu/a/b", 250000), 3),
        (V1, v1("cpu/a/b", -1) | v1("cpu/a", 200000), 2),
        (V1, v1("cpu/a/b", 400000) | v1("cpu/a", 200000), 2),
        (V1, v1("cpu", 200000, 50000), 4),
        (V1, v1("cpuset/c", 100000) | v1("cpu/c", 100000) | v1("cpu/z", 100000), 0),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "100000"}, 0),
        (V1 + V2, v1("cpu/a/b", 400000) | {"a/b/cpu.max": "300000 100000"}, 3),
        (V1 + V2, v1("cpu/a/b", 200000) | {"a/b/cpu.max": "300000 100000"}, 2),
    ],
)
def test_cgroup_limit(membership, files, expected, tmp_path):
    (tmp_path / "mount").mkdir()
    if membership is not None:
        (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    limit = _core._cgroup_cpu_limit(str(tmp_path / "cgroup"), str(tmp_path / "mount"))
    assert limit == expected

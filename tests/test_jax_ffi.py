"""The native step and XLA's foreign function interface: layouts, versions, registration."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from adamax_ext import _core
from support.building import REPOSITORY, cpp_compiler, run
from support.jax_runs import FAILED, adamax, jax, jnp

from adamax_ext.jax import target  # isort: skip - needs jax


def test_structures_are_those_of_the_jaxlib_that_is_here():
    """What csrc/xla/ffi.hpp declares: offsets, sizes, and values of enumerations."""
    run(
        *(cpp_compiler(), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"),
        *(f"-I{REPOSITORY / 'csrc'}", f"-I{jax.ffi.include_dir()}"),
        REPOSITORY / "tests/cpp/ffi_layout.cpp",
    )


# ---- JAX's own calls -----------------------------------------------------------------------------


def raw_call(operands, results=None, **attributes):
    """Call the registered step without what adamax_ext.jax has checked."""
    settings = {name: np.float64(0.5) for name in ("learning_rate", "b1", "b2", "eps")}
    settings |= {"loss_scale": np.float64(1)}
    settings |= {"weight_decay": np.float64(0), "decay": "decoupled", "epsilon_mode": "inside"}
    settings |= attributes
    if results is None:
        results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[:3]]
    call = jax.ffi.ffi_call(
        "adamax_ext_step", results, input_output_aliases={i: i for i in range(len(results))}
    )
    settings = {name: value for name, value in settings.items() if value is not None}
    return jax.block_until_ready(jax.jit(lambda *o: call(*o, **settings))(*operands))


@pytest.fixture(autouse=True)
def registered():
    tx = adamax(0.1)
    tx.apply(jnp.ones(2), jnp.ones(2), tx.init(jnp.ones(2)))


W, ZERO = jnp.ones(3), jnp.zeros((), jnp.int32)


def test_a_raw_call():
    param, _, _ = raw_call([W, 0 * W, 0 * W, ZERO, W])
    assert np.asarray(param) == pytest.approx(1 - 0.5 / 1.5)


@pytest.mark.parametrize(
    ("operands", "attributes", "message"),
    [
        ([W, W, W, jnp.zeros(3, jnp.int32), W], {}, "count must be one int32; received 3 elem"),
        ([W, W, W, jnp.zeros(()), W], {}, "count must be one int32; received 1 .* type 11"),
        ([W, W, W, ZERO, jnp.ones(4)], {}, r"grads\[0\] has 4 elements; expected 3"),
        ([W, W, W, ZERO, jnp.ones(3, jnp.int8)], {}, r"grads\[0\] has XLA's type 2; expected"),
        ([W, W, W, ZERO, W, jnp.ones(3)], {"b1": None}, "b1 must be one .*; received 3 elements"),
        ([W, W, W, ZERO, W, jnp.ones((), int)], {"eps": None}, "eps must be one float32 or float"),
        ([W, W, W, ZERO, W], {"learning_rate": None}, "rate must be one .* 3 el"),
        ([W, W, W, ZERO, W], {"decay": None}, "decay"),
        ([W, W, W, ZERO, W], {"epsilon_mode": "both"}, "epsilon_mode"),
        ([W, W, W, ZERO, W], {"b2": np.float32(0.5)}, "b2 is a number of another type"),
        ([W, W, W, ZERO, W], {"b2": np.ones(2)}, "b2 is an attribute of another type"),
    ],
)
def test_raw_calls_that_do_not_fit_are_refused(operands, attributes, message):
    with pytest.raises(FAILED, match=message):
        raw_call(operands, **attributes)


@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
def test_no_vmap_of_a_raw_call_is_silently_wrong(method):
    """Other ways than one after the other give the handler the step numbers of all at once."""

    def step(*operands):
        results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[:3]]
        call = jax.ffi.ffi_call("adamax_ext_step", results, vmap_method=method)
        numbers = {name: np.float64(0.5) for name in ("learning_rate", "b1", "b2", "eps")}
        numbers |= {"weight_decay": np.float64(0), "loss_scale": np.float64(1)}
        return call(*operands, **numbers, decay="l2", epsilon_mode="inside")

    given = [jnp.ones((4, 3))] * 3 + [jnp.arange(4, dtype=jnp.int32), jnp.ones((4, 3))]
    with pytest.raises(FAILED, match=r"does not lie where|count must be one int32; received 4"):
        jax.block_until_ready(jax.vmap(step)(*given))


# ---- Registration --------------------------------------------------------------------------------

UNKNOWN = """
#include "xla/ffi.hpp"
using namespace adamax::xla;
static Error* handler(CallFrame* frame) {
  const auto* extension = reinterpret_cast<const MetadataExtension*>(frame->extensions);
  if (extension != nullptr) {
    extension->metadata->version.major_version = MAJOR;
    extension->metadata->version.minor_version = MINOR;
  }
  return nullptr;
}
extern "C" void* handler_address() { return reinterpret_cast<void*>(&handler); }
"""
REGISTERS = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np
import adamax_ext
from adamax_ext import _core
library = ctypes.CDLL(sys.argv[1])
library.handler_address.restype = ctypes.c_void_p
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_core.xla_step = new(library.handler_address(), b"xla._CUSTOM_CALL_TARGET", None)
from adamax_ext.jax import adamax
tx = adamax(0.1)
for _ in range(2):
    try:
        tx.init(jnp.ones(3))
    except RuntimeError as error:
        print(error)
        assert error.__cause__ is not None
print(float(jax.jit(jnp.sum)(jnp.arange(4.0))), jax.devices()[0].platform)
"""


@pytest.mark.parametrize("version", [(0, 99), (1, 0)], ids=str)
def test_a_version_that_jaxlib_does_not_take(tmp_path, version):
    """The error names those that work, and JAX works on."""
    source, library = tmp_path / "unknown.cpp", tmp_path / "unknown.so"
    source.write_text(UNKNOWN.replace("MAJOR", str(version[0])).replace("MINOR", str(version[1])))
    run(
        *(cpp_compiler(), "-std=c++20", "-fPIC", "-shared", f"-I{REPOSITORY / 'csrc'}"),
        *(source, "-o", library),
    )
    result = subprocess.run(
        [sys.executable, "-c", REGISTERS, library], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    *errors, last = result.stdout.strip().splitlines()
    assert last == "6.0 cpu"
    assert len(errors) == 2  # it is tried again
    for error in errors:
        assert error.startswith("jaxlib ")
        assert "does not take the native step of adamax_ext, which knows jaxlib 0.6 to" in error


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_gpu_gets_a_handler_of_its_own(monkeypatch, has_kernels):
    """Or one that refuses, where there are no kernels."""
    registered = {}
    kernels = SimpleNamespace(xla_step=object())
    monkeypatch.setitem(sys.modules, "adamax_ext._cuda", kernels if has_kernels else None)
    monkeypatch.setattr(
        jax.ffi,
        "register_ffi_target",
        lambda name, handler, platform: registered.update({(name, platform): handler}),
    )
    for running in ({"cpu"}, {"cpu", "cuda"}, {"cpu", "rocm"}, {"tpu"}):
        registered.clear()
        monkeypatch.setattr(target, "_registered", set())
        monkeypatch.setattr(
            target.backend, "backends", lambda running=running: dict.fromkeys(running)
        )
        target.register()
        assert target._registered == running - {"tpu"}
        gpu = kernels.xla_step if has_kernels else _core.xla_refuse
        handlers = {"cpu": _core.xla_step, "CUDA": gpu, "ROCM": _core.xla_refuse}
        assert registered == {
            ("adamax_ext_step", name): handler
            for name, handler in handlers.items()
            if name.lower() in running
        }


def test_a_step_on_the_cpu_loads_no_kernels_for_a_gpu():
    code = """
import sys
import jax.numpy as jnp
class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name != "adamax_ext._cuda"
sys.meta_path.insert(0, Watch())
from adamax_ext.jax import adamax
tx = adamax(0.1)
tx.apply(jnp.ones(3), jnp.ones(3), tx.init(jnp.ones(3)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_starts_no_backend():
    """Those who have two devices, or several machines, tell it after their imports."""
    code = """
from adamax_ext.jax import adamax
from jax._src import xla_bridge
adamax(0.1)
assert not xla_bridge._backends, "a backend has started"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

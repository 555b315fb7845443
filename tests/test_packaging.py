"""What is installed: version, types, documentation, and a C++ library that others can link."""

import ast
import doctest
import importlib.metadata
import importlib.resources
import inspect
import os
import re
import subprocess
import sys

import adamax_ext
import numpy as np
import pytest
from adamax_ext import _core, functional, loss_scale, optimizer, schedules
from support.building import REPOSITORY, cmake, configure, run
from support.processors import cross_options, on_aarch64

PACKAGE = importlib.resources.files("adamax_ext")
# pybind11 gives its classes a metaclass, which a stub cannot name.
ACCEPTED_BY_STUBTEST = "".join(
    f"adamax_ext._core.{name}\n"
    for name in ("Call", "Group", "IeeeMode", "Plan", "StepGroup", "Stepper")
)


def documented():
    """All public functions and classes by name, those of `schedules` included."""
    found = {name: getattr(adamax_ext, name) for name in adamax_ext.__all__}
    for name, value in vars(schedules).items():
        if getattr(value, "__module__", None) == schedules.__name__ and not name.startswith("_"):
            found[f"schedules.{name}"] = value
    return {k: v for k, v in found.items() if inspect.isclass(v) or inspect.isroutine(v)}


def documented_members():
    return {
        f"{name}.{member}": attribute
        for name, value in documented().items()
        if inspect.isclass(value)
        for member, attribute in vars(value).items()
        if not member.startswith("_")
    }


def section(text, title):
    """Return the text below a NumPy-style heading, or None."""
    underline = "-" * len(title)
    match = re.search(rf"^{title}\n{underline}\n(.*?)(?=^\S[^\n]*\n---|\Z)", text, re.M | re.S)
    return None if match is None else match[1]


def require_summary(name, value):
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    first, _, rest = text.partition("\n")
    assert first.endswith("."), f"{name}: {first}"
    assert not rest or rest.startswith("\n"), f"{name}: the first paragraph is one line"
    for heading in re.findall(r"^(\w[\w ]*)\n-+$", text, re.M):
        assert section(text, heading), f"{name}: the underline of {heading} has another length"
    return text


# ---- Version and files ---------------------------------------------------------------------------


def test_one_version():
    version = importlib.metadata.version("adamax_ext")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert adamax_ext.__version__ == version
    assert adamax_ext.build_info()["version"] == version
    assert f'\nversion = "{version}"\n' in (REPOSITORY / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()


def test_types_are_installed():
    assert PACKAGE.joinpath("py.typed").is_file()
    assert PACKAGE.joinpath("_core.pyi").is_file()


# ---- The stub ------------------------------------------------------------------------------------


def test_stub_agrees_with_the_module(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy")
    accepted = tmp_path / "accepted"
    accepted.write_text(ACCEPTED_BY_STUBTEST)
    command = [sys.executable, "-m", "mypy.stubtest", "adamax_ext._core", "--allowlist", accepted]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_stub_has_the_arguments_of_the_module():
    """Stubtest sees no signatures of compiled functions; pybind11 writes them into docstrings."""
    compared = set()
    for node in ast.parse(PACKAGE.joinpath("_core.pyi").read_text()).body:
        owner = getattr(_core, node.name) if isinstance(node, ast.ClassDef) else _core
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            is_property = isinstance(function, ast.FunctionDef) and function.decorator_list
            if not isinstance(function, ast.FunctionDef) or is_property:
                continue
            signature = getattr(owner, function.name).__doc__.splitlines()[0]
            names, returned = re.findall(r"(\w+): ", signature), signature.split(" -> ")[1]
            arguments = [*function.args.args, *function.args.kwonlyargs]
            assert [argument.arg for argument in arguments if argument.arg != "self"] == [
                name for name in names if name != "self"
            ], function.name
            declared = ast.unparse(function.returns)
            assert re.sub(r"\[.*", "", declared) == re.sub(r"\[.*", "", returned), function.name
            compared.add(function.name)
    assert {"update", "step", "global_norm", "build_info"} <= compared


# ---- Documentation -------------------------------------------------------------------------------


def test_every_public_name_exists():
    assert len(set(adamax_ext.__all__)) == len(adamax_ext.__all__)
    assert all(hasattr(adamax_ext, name) for name in adamax_ext.__all__)
    assert adamax_ext.__doc__
    assert adamax_ext.schedules is schedules


@pytest.mark.parametrize("name", documented())
def test_documentation_of_functions_and_classes(name):
    value = documented()[name]
    text = require_summary(name, value)
    signature = inspect.signature(value)
    parameters = [p for p in signature.parameters if p not in ("args", "kwargs")]
    if (same := re.search(r"^Parameters .*those of\s`(\w+)`", text, re.M)) is not None:
        text = inspect.getdoc(getattr(inspect.getmodule(value), same[1]))
    listed = section(text, "Parameters") or ""
    if len(parameters) > 1:
        assert listed, f"{name} has no section Parameters"
    entries = re.findall(r"^(\w[\w, ]*) : \S", listed, re.M)
    documented_parameters = [p.strip() for entry in entries for p in entry.split(",")]
    if listed:
        assert len(set(documented_parameters)) == len(documented_parameters)
        # A name that only labels what was made explains itself.
        assert set(documented_parameters) | {"name"} == {*parameters, "name"}
    else:
        assert all(f"`{parameter}`" in text for parameter in parameters)
    if listed and not inspect.isclass(value) and signature.return_annotation is not None:
        assert section(text, "Returns"), f"{name} has no section Returns"


@pytest.mark.parametrize("name", documented_members())
def test_documentation_of_members(name):
    value = documented_members()[name]
    value = getattr(value, "__func__", value)  # below classmethod and staticmethod
    if inspect.isroutine(value) or isinstance(value, property):
        require_summary(name, value)


def test_raises_lists_nothing_but_exceptions():
    """Anything else at its margin is shown as one, here and in the parts for other libraries."""
    listed = set()
    for path in (REPOSITORY / "python/adamax_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                raised = section(ast.get_docstring(node) or "", "Raises") or ""
                listed |= {(path.name, node.name, x) for x in re.findall(r"^\S.*", raised, re.M)}
    assert len(listed) > 20
    names = r"\w+(Error|Exit)(, \w+Error)*"
    assert [found for found in listed if not re.fullmatch(names, found[2])] == []


@pytest.mark.parametrize("module", [adamax_ext, optimizer, functional, loss_scale, schedules])
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0 or module not in (optimizer, functional)


# ---- The build -----------------------------------------------------------------------------------

TABLE = "typedef struct {} DLPackExchangeAPI;"


def found_dlpack(folder, **headers):
    """Return what a build finds where these packages have such a dlpack.h, or none."""
    for package in ("tvm_ffi", "torch"):
        header = folder / package / "include" / ("dlpack" if package == "tvm_ffi" else "ATen")
        header.mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise ImportError('not to be imported')")
        if package in headers:
            (header / "dlpack.h").write_text(headers[package])
    command = [sys.executable, REPOSITORY / "cmake/find_dlpack.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"tvm_ffi": TABLE, "torch": TABLE}, "tvm_ffi/include/dlpack/dlpack.h"),
        ({"torch": TABLE}, "torch/include/ATen/dlpack.h"),
        ({"tvm_ffi": "before 1.2", "torch": TABLE}, "torch/include/ATen/dlpack.h"),
    ],
)
def test_dlpack_header_of_an_installed_package(tmp_path, headers, expected):
    result = found_dlpack(tmp_path, **headers)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path / expected}\n"


def test_no_dlpack_header(tmp_path):
    result = found_dlpack(tmp_path, torch="of torch 2.9")
    assert result.returncode == 1
    assert result.stdout == ""
    for part in ("tvm_ffi/include/dlpack/dlpack.h is missing", "torch/include/ATen/dlpack.h is"):
        assert part in result.stderr
    assert "expected one of: pip install 'apache-tvm-ffi>=0.1.2', or torch 2.10" in result.stderr


# ---- The C++ library -----------------------------------------------------------------------------


def output_of_consumer(library, build, options=(), before=()):
    configure(REPOSITORY / "tests/cpp/consumer", build, f"-DCMAKE_PREFIX_PATH={library.prefix}",
              "-DCMAKE_BUILD_TYPE=Release", *options)  # fmt: skip
    cmake("--build", build)
    return run(*before, build / "consumer").splitlines()


def number(i, step):
    """The data of consumer.cpp: exact in bfloat16."""
    return ((i * 37 + step * 11) % 101 - 50) / 64


def trained_in_few_bits(numbers, bfloat16):
    """Return what the consumer's weights in bfloat16 and state in 16 and 8 bits become."""
    drawn, kept = numbers(300, 300, bfloat16), numbers(300, 300, bfloat16)
    m16, u16, scale16 = np.zeros(300, np.uint16), np.zeros(300, np.uint16), np.ones(1, np.float32)
    m8, u8, scale8 = np.zeros(300, np.int8), np.zeros(300, np.uint8), np.zeros(2, np.float32)
    remainder = np.zeros(300, np.int16)
    for step in range(1, 6):
        gradient = numbers(300, step, bfloat16)
        settings = {"step": step, "learning_rate": 0.001, "seed": 12345}
        adamax_ext.update(
            *(drawn, gradient, m16, u16),
            norm_scale=scale16,
            weight_rounding="stochastic",
            **settings,
        )
        adamax_ext.update(
            *(kept, gradient, m8, u8),
            norm_scale=scale8,
            remainder=remainder,
            weight_rounding="remainder",
            variable=7,
            first_element=512,
            **settings,
        )
    return {
        **{"drawn": drawn, "m16": m16, "u16": u16, "scale16": scale16},
        **{"kept": kept, "m8": m8, "u8": u8, "scale8": scale8, "remainder": remainder},
    }


def expected_of_consumer():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="NumPy needs it for bfloat16").bfloat16

    def numbers(count, step, dtype):
        return np.array([number(i, step) for i in range(count)], np.float32).astype(dtype)

    weights = [numbers(37, 100, np.float32), numbers(21, 200, bfloat16)]
    trained = adamax_ext.Adamax(
        learning_rate=0.02,
        beta_1=0.8,
        beta_2=0.95,
        epsilon=1e-5,
        weight_decay=0.1,
        global_clipnorm=0.75,
        use_ema=True,
        ema_momentum=0.7,
    )
    trained.exclude_from_weight_decay(weights[1:])
    trained.build(weights)
    for step in range(1, 6):
        gradient = numbers(37, step, np.float32)
        trained.apply([gradient, numbers(21, step + 50, bfloat16)])
    arrays = {}
    for prefix, weight, state in zip(("", "half_"), weights, trained.state.values(), strict=True):
        kinds = {"m": "momentum", "u": "norm", "average": "average"}
        arrays |= {f"{prefix}w": weight}
        arrays |= {f"{prefix}{short}": state[kind] for short, kind in kinds.items()}
    arrays["norm"] = np.float64(adamax_ext.global_norm([gradient]))
    arrays |= trained_in_few_bits(numbers, bfloat16)
    lines = []
    for name, array in arrays.items():
        words = np.atleast_1d(array).view(f"u{array.dtype.itemsize}")
        lines.append(" ".join([name, *(f"{word:0{2 * array.dtype.itemsize}x}" for word in words)]))
    return [
        *(*lines, "error step must be >= 1; received 0"),
        "error variables[0] must have a size >= 0; received -1",
        "error variables[0] must have a group below the number of groups, 2; received 2",
        "error the variables are in host memory and the call takes numbers from the memory of a "
        "GPU; expected the numbers themselves",
    ]


def test_consumer_of_the_installed_library(cpp_library, tmp_path):
    assert output_of_consumer(cpp_library, tmp_path) == expected_of_consumer()


def test_consumer_of_the_library_without_instruction_sets(plain_cpp_library, tmp_path):
    assert "kernels_scalar" in plain_cpp_library.objects
    assert "kernels_avx2" not in plain_cpp_library.objects
    assert output_of_consumer(plain_cpp_library, tmp_path) == expected_of_consumer()


def test_consumer_on_aarch64(aarch64_library, tmp_path):
    printed = output_of_consumer(aarch64_library, tmp_path, cross_options(), on_aarch64())
    assert printed == expected_of_consumer()

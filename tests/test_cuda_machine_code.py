"""Machine code of the CUDA kernels: IEEE arithmetic, 128-bit accesses, nothing in local memory."""

import collections
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.building import REPOSITORY, run

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
ARCHITECTURE = "90"
# What nvcc compiles to fused operations where that is not forbidden, and what rounds once.
FUSED = re.compile(r"(fma|mad)\.(r[nzmp]\.)?(ftz\.)?f(32|64)")
INEXACT = re.compile(r"\w+\.approx\S*|div\.full\S*|\w+\.ftz\S*|(atom|red)\.\S+")
KINDS = ("Update", "Accumulate", "Average", "Sums", "Clip")


def flags():
    """The flags that CMakeLists.txt gives to nvcc."""
    text = (REPOSITORY / "CMakeLists.txt").read_text()
    listed = re.search(r"COMPILE_LANGUAGE:CUDA>:\s*([^>]+)>", text)[1].split()
    return [flag for flag in listed if not flag.startswith("--threads")]


def nvcc(source, target, *options):
    return run(
        *(NVCC, "-std=c++20", "-O3", *flags(), *options),
        *(f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'csrc/include'}"),
        *(f"-arch=sm_{ARCHITECTURE}", source, "-o", target),
    )


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The kernels as PTX and as machine code, and what ptxas reports of them."""
    folder = tmp_path_factory.mktemp("kernels")
    source = REPOSITORY / "csrc/cuda/device.cu"
    nvcc(source, folder / "device.ptx", "-ptx")
    nvcc(source, folder / "device.cubin", "-cubin")
    ptxas = [NVCC, "-cubin", f"-arch=sm_{ARCHITECTURE}", "-Xptxas=-v"]
    report = run(*ptxas, folder / "device.ptx", "-o", folder / "again.cubin")
    return folder, report


def kind_of(symbol):
    """Update and its template arguments from a mangled name."""
    return re.sub(r".*runINS0_\d+", "", symbol)


def disassembled(cubin):
    """Mnemonics of each function by its name."""
    tool = shutil.which("cuobjdump")
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations if package and not tool else ():
        tool = next(map(str, Path(folder).rglob("bin/cuobjdump")), tool)
    if tool is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    path = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    command = [tool, "-sass", cubin]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout
    functions = collections.defaultdict(list)
    for line in output.splitlines():
        if (match := re.search(r"Function : (\S+)", line)) is not None:
            code = functions[match[1]]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            code.append(match[1])
    assert functions, "cuobjdump printed no code"
    return functions


def count(code, pattern):
    return sum(re.fullmatch(pattern, mnemonic) is not None for mnemonic in code)


def test_ptx_rounds_every_operation(compiled):
    text = (compiled[0] / "device.ptx").read_text()
    words = set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+)", text, re.M))
    assert {"div.rn.f32", "div.rn.f64", "sqrt.rn.f64", "add.rn.f32", "mul.rn.f64"} <= words
    wrong = [word for word in words if FUSED.fullmatch(word) or INEXACT.fullmatch(word)]
    # Without a rounding an operation may be fused with the next one.
    wrong += [word for word in words if re.fullmatch(r"(add|sub|mul)\.f(32|64)", word)]
    assert not wrong


def test_every_kernel_is_there_and_uses_no_local_memory(compiled):
    found = re.findall(
        r"Compiling entry function '(\S+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill "
        r"stores, (\d+) bytes spill loads[\s\S]*?Used (\d+) registers",
        compiled[1],
    )
    print(f"\nregisters, spilled bytes: kernels for sm_{ARCHITECTURE}")
    for symbol, stack, stores, loads, registers in sorted(found, key=lambda row: kind_of(row[0])):
        print(f"{registers:>4} {int(stores) + int(loads):>4}  {kind_of(symbol)}")
        assert (stack, stores, loads) == ("0", "0", "0"), symbol
    # 8 pairs x 4 streams, 4 dtypes x 2, 4 dtypes and the later levels of sums; two sizes of tables.
    kinds = collections.Counter(re.match(r"[A-Z][a-z]+", kind_of(row[0]))[0] for row in found)
    assert kinds == {"Update": 64, "Accumulate": 8, "Average": 8, "Sums": 10, "Clip": 1}


def test_update_moves_whole_vectors(compiled):
    """Four loads and three stores of 128 bits at least in each; nothing in local memory."""
    seen = 0
    for symbol, code in disassembled(compiled[0] / "device.cubin").items():
        assert count(code, r"(LDL|STL)\b.*") == 0, symbol
        if kind_of(symbol).startswith("Update"):
            streams = kind_of(symbol).count("Lb1") - kind_of(symbol).endswith("Lb1EEEEEvT_")
            assert count(code, r"LDG\.E\.128.*") >= 4 + streams, symbol
            assert count(code, r"STG\.E\.128.*") >= 3 + streams, symbol
            seen += 1
    assert seen == 64


DIVISIONS = """
extern "C" __global__ void one(const T* a, const T* b, T* c) { c[0] = a[0] / b[0]; }
extern "C" __global__ void three(const T* a, const T* b, T* c) {
  c[0] = a[0] / b[0]; c[1] = a[1] / b[1]; c[2] = a[2] / b[2];
}
"""


def divisions(folder, dtype):
    """How many fused operations one division takes, and the way for rare values that all share."""
    source = folder / f"{dtype}.cu"
    source.write_text(DIVISIONS.replace("T", dtype))
    nvcc(source, folder / "divisions.cubin", "-cubin")
    code = disassembled(folder / "divisions.cubin")
    one, three = (count(code[name], r"[FD]FMA.*") for name in ("one", "three"))
    each = (three - one) // 2
    assert each > 0
    return each, one - each


def test_fused_operations_belong_to_divisions(compiled):
    """An IEEE division is made of a reciprocal, corrected by fused operations; all are its own."""
    folder = compiled[0]
    cost = {dtype: divisions(folder, dtype) for dtype in ("float", "double")}
    checked = 0
    for symbol, code in disassembled(folder / "device.cubin").items():
        kind, fused = kind_of(symbol), count(code, r"[FDH]FMA.*")
        if kind.startswith("Update"):
            is_double = kind.startswith("UpdateILi3E")
            each, shared = cost["double" if is_double else "float"]
            # A division for each element of a vector, for single elements, and for those by byte.
            width = 2 if is_double else 4 if kind.startswith("UpdateILi0E") else 8
            assert fused == each * (width + 2) + shared, symbol
            checked += 1
        elif not kind.startswith("Clip"):  # its divisions and roots are once a variable
            assert fused == 0, symbol
            assert count(code, r"MUFU.*") == 0, symbol
            checked += 1
    assert checked == 90

"""Instruction sets stay in their kernels; no arithmetic is fused, approximate or in other modes."""

import functools
import inspect
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import adamax_ext
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, schedules
from support.building import run
from support.processes import (
    LARGE,
    SMALL,
    Mxcsr,
    in_own_process,
    mode_is_kept,
    trained,
    use_threads,
)

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
    reason="reads x86-64 ELF objects",
)
KERNELS = ("kernels_scalar", "kernels_avx2", "kernels_avx512")

# Encodings by VEX or EVEX: AVX and later, the BMI sets, and opmask instructions.
VEX = re.compile(r"v(?!err|erw)\w+|k(mov|and|or|not|xor|xnor|add|shift|test|unpck)\w*"
                 r"|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx")  # fmt: skip
FUSED = re.compile(r"vfn?m(add|sub)\w*")
APPROXIMATE = re.compile(r"v?(rcp|rsqrt|exp2|reduce|range)\w+")
# Hardware bfloat16 flushes subnormals; the dispatcher does not ask for the other families.
NOT_DISPATCHED = re.compile(r"vdpbf16\w+|vcvtne2?ps2bf16|vpdp\w+|vpermt?i?2?b|vpmadd52\w+|vp4dp\w+"
                            r"|vgf2p8\w+|vpclmul\w+|vaes\w+|vpconflict\w+|vplzcnt\w+|vpopcnt\w+"
                            r"|vadd[ps]h|vmul[ps]h|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx"
                            r"|sarx|shlx|shrx|lzcnt|popcnt")  # fmt: skip
NON_TEMPORAL = re.compile(r"prefetchnta|v?movnt\w+")
ALIGNED_MOVE = re.compile(r"v?mov(aps|apd|dqa(32|64)?)")
# Instructions of the SSE encoding whose memory operand may be unaligned; all others trap.
SSE_UNALIGNED = re.compile(r"mov(ups|upd|dqu|[lh]p[sd]|ss|sd|d|q)|lddqu|\w+s[sd]|cvt\w+")
EVEX = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])|\{1to")


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (binutils)")
    return path


@functools.cache
def instructions(path):
    """(address, function, mnemonic, operands) of every instruction of an object or a library."""
    function, found = "", []
    for line in run(tool("objdump"), "-d", "-w", "--no-show-raw-insn", path).splitlines():
        if (label := re.match(r"[0-9a-f]+ <(.+)>:$", line)) is not None:
            function = label[1]
        elif (match := re.match(r"\s*([0-9a-f]+):\t((?:\{\w+\} )?)(\w+)\s*(.*)", line)) is not None:
            operands = re.sub(r"\s*(#|<).*", "", match[4])
            found.append((int(match[1], 16), function, match[3], operands))
    assert len(found) > 10, "objdump printed no code"
    return found


def mnemonics(path):
    return {mnemonic for _, _, mnemonic, _ in instructions(path)}


def matching(names, pattern):
    return sorted(name for name in names if pattern.fullmatch(name))


@pytest.fixture(params=KERNELS)
def kernel(request, cpp_library):
    return request.param, cpp_library.objects[request.param]


# ---- Symbols and sections ------------------------------------------------------------------------


def test_kernel_unit_exports_its_table_only(kernel):
    name, path = kernel
    symbols = [line.split()[-2:] for line in run(tool("nm"), "-C", path).splitlines()]
    isa = name.removeprefix("kernels_")
    exported = [(kind, symbol) for kind, symbol in symbols if kind.isupper() and kind != "U"]
    assert [symbol for _, symbol in exported] == [f"adamax::cpu::{isa}::kTable"]
    # What the linker could merge with the same symbol of another unit, or leave out.
    assert not {kind for kind, _ in symbols} & set("WVwvuiC")
    # Nothing is called that other flags may have compiled, apart from the C library's copies.
    assert {symbol for kind, symbol in symbols if kind == "U"} <= {"memcpy", "memset", "memmove"}


def test_kernel_unit_runs_nothing_at_load_time(kernel):
    sections = run(tool("readelf"), "-SW", kernel[1])
    assert ".text" in sections
    assert not re.findall(r"\.(?:init_array|preinit_array|ctors|init)\b\S*", sections)
    assert " GROUP " not in sections, "a section group is code that the linker may merge"


def test_kernel_unit_has_no_variables(kernel):
    data = {}
    for line in run(tool("readelf"), "-SW", kernel[1]).splitlines():
        match = re.match(r"\s*\[ *\d+\] (\S+) +\S+ +\w+ \w+ (\w+) \w+ +(\w*) ", line)
        if match is not None and "W" in match[3]:
            data[match[1]] = int(match[2], 16)
    table = [name for name in data if name.startswith(".data.rel.ro")]
    assert table and all(data[name] > 0 for name in table)
    assert not [name for name in data if name not in table and data[name] > 0]


# ---- Instructions --------------------------------------------------------------------------------


def test_instruction_sets_stay_in_their_kernels(cpp_library):
    units = {
        name: (mnemonics(path), {operands for _, _, _, operands in instructions(path)})
        for name, path in cpp_library.objects.items()
    }
    assert set(units) > set(KERNELS)
    evex = {name for name, (_, operands) in units.items() if any(map(EVEX.search, operands))}
    assert evex == {"kernels_avx512"}
    ymm = {name for name, (_, operands) in units.items() if any("%ymm" in o for o in operands)}
    assert ymm == {"kernels_avx2", "kernels_avx512"}
    vex = {name: matching(found, VEX) for name, (found, _) in units.items() if name not in ymm}
    assert not {name: found for name, found in vex.items() if found}


@pytest.mark.parametrize(
    "pattern",
    [FUSED, APPROXIMATE, NOT_DISPATCHED, NON_TEMPORAL],
    ids=["fused", "approximate", "not_dispatched", "non_temporal"],
)
def test_no_unit_has(cpp_library, pattern):
    found = {name: matching(mnemonics(path), pattern) for name, path in cpp_library.objects.items()}
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    ("name", "register", "prefix"),
    [
        ("kernels_scalar", "%xmm", ""),
        ("kernels_avx2", "%ymm", "v"),
        ("kernels_avx512", "%zmm", "v"),
    ],
)
def test_division_is_a_division(cpp_library, name, register, prefix):
    code = instructions(cpp_library.objects[name])
    wide = {mnemonic for _, _, mnemonic, operands in code if register in operands}
    single = "s" if name == "kernels_scalar" else "p"
    assert {f"{prefix}div{single}s", f"{prefix}div{single}d"} <= wide


def test_memory_of_the_caller_is_never_taken_for_aligned(kernel):
    """Instructions that trap on unaligned memory touch nothing but the stack and constants.

    Loops over tiles have aligned memory of their own, by pointers that no look at the text follows;
    test_low_memory_bits.py runs them at odd addresses.
    """
    stack, previous = set(), None
    trapping = []
    for _, function, mnemonic, operands in instructions(kernel[1]):
        if function != previous:
            stack, previous = {"rsp"}, function
        memory = re.search(r"\((%\w+)?[^)]*\)", operands)
        base = (memory[1] or "").removeprefix("%") if memory else None
        sse = "%xmm" in operands and not mnemonic.startswith("v")
        traps = ALIGNED_MOVE.fullmatch(mnemonic) or (sse and not SSE_UNALIGNED.fullmatch(mnemonic))
        if re.search("[Tt]ile", function):
            continue
        if memory and traps and base not in stack | {"rip"}:
            trapping.append((function, mnemonic, operands))
        # Which registers point into the stack, followed in the order of the text.
        target = re.search(r"%(r\w+)$", operands)
        if target and mnemonic not in ("cmp", "test", "push", "call", "jmp"):
            source = re.match(r"%(r\w+),", operands)
            moved = mnemonic == "mov" and source and source[1] in stack
            if moved or (mnemonic == "lea" and base in stack) or target[1] == "rsp":
                stack.add(target[1])
            elif mnemonic not in ("add", "sub", "and"):  # those move a pointer within its object
                stack.discard(target[1])
    assert not trapping


# ---- The installed module ------------------------------------------------------------------------


def test_module_does_not_fuse_or_approximate():
    assert not matching(mnemonics(adamax_ext._core.__file__), FUSED)
    assert not matching(mnemonics(adamax_ext._core.__file__), APPROXIMATE)


def test_module_has_no_fast_math_start_up_code():
    """crtfastmath.o would set FTZ and DAZ (0x8040 of MXCSR) for the whole process at import."""
    path = adamax_ext._core.__file__
    assert "set_fast_math" not in run(tool("nm"), path)
    code = instructions(path)
    assert any(mnemonic == "ldmxcsr" for _, _, mnemonic, _ in code)  # the guard of the kernels
    assert not [operands for _, _, _, operands in code if "$0x8040," in operands]


def protected_ranges():
    """Addresses in the module of most of the AVX-512 and of most of the AVX2 kernels."""
    code = instructions(adamax_ext._core.__file__)
    wide = [address for address, _, _, operands in code if "%zmm" in operands]
    middle = [
        address
        for address, _, _, operands in code
        if "%ymm" in operands and not wide[0] - 4096 < address < wide[-1] + 4096
    ]
    return {
        isa: (found[len(found) // 50], found[-len(found) // 50])
        for isa, found in {"avx2": middle, "avx512": wide}.items()
    }


STEPS_IN_GUARDED_MODULE = """
    import ctypes, mmap, os, sys
    import numpy as np
    import adamax_ext

    path = os.path.realpath(adamax_ext._core.__file__)
    base = min(int(line.split("-")[0], 16) for line in open("/proc/self/maps") if path in line)
    page = mmap.PAGESIZE
    for text in sys.argv[1:]:
        begin, end = (base + int(number) for number in text.split("-"))
        begin, end = -(-begin // page) * page, end // page * page
        assert begin < end
        result = ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 0)
        assert result == 0
    print("guarded", flush=True)
    for dtype in (np.float32, np.float64, np.float16):
        state = np.float64 if dtype == np.float64 else np.float32
        for epsilon_mode in ("outside", "inside"):
            for decay in ("decoupled", "l2"):
                for average in (None, np.zeros(100, state)):
                    w, m, u = np.ones(100, dtype), np.zeros(100, state), np.zeros(100, state)
                    adamax_ext.update(w, w.copy(), m, u, step=1, weight_decay=0.5, decay=decay,
                                      epsilon_mode=epsilon_mode, average=average)
        adamax_ext.global_norm([w])
    print("done", flush=True)
"""


@pytest.mark.parametrize("guarded", [("avx2",), ("avx512",), ("avx2", "avx512")], ids="-".join)
@pytest.mark.parametrize("forced", ["scalar", "avx2", "avx512"])
def test_forced_instruction_set_is_what_runs(forced, guarded):
    """With the code of an instruction set made inaccessible, forcing it crashes; others run on."""
    if forced not in adamax_ext.available_isas():
        pytest.skip(f"this processor has no {forced}")
    ranges = protected_ranges()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STEPS_IN_GUARDED_MODULE)]
        + ["{}-{}".format(*ranges[isa]) for isa in guarded],
        env={**os.environ, "ADAMAX_EXT_ISA": forced},
        capture_output=True,
        text=True,
    )
    crashes = forced in guarded
    expected = (-signal.SIGSEGV, ["guarded"]) if crashes else (0, ["guarded", "done"])
    assert (result.returncode, result.stdout.split()) == expected, result.stderr


# ---- Floating-point mode and import --------------------------------------------------------------


MODES = {"flush": 0x9FC0, "down": 0x3F80, "up": 0x5F80, "zero": 0x7F80, "flush_up": 0xDFC0}
SETTINGS = {
    "decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.7, "use_ema": True},
    "global_clipnorm": {"global_clipnorm": 0.7},
    "clipvalue": {"clipvalue": 0.1, "use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss_scale": {"loss_scale_factor": 3.0},
    "dynamic_loss_scale": {"make": lambda: LossScaleOptimizer(Adamax(), initial_scale=3.0)},
    "schedule": {"learning_rate": schedules.CosineDecay(0.1, 7)},
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_floating_point_mode_matters_not_and_is_kept(dtype, settings):
    expected = {size: trained(size, dtype=dtype, **settings) for size in (SMALL, LARGE)}
    results = {}

    def work(mode):  # on a thread of its own, which has its own workers
        Mxcsr().set_on_workers(mode)
        guard = functools.partial(mode_is_kept, mode)
        for size in expected:
            results[size] = trained(size, dtype=dtype, guard=guard, **settings)

    for name, mode in MODES.items():
        results.clear()
        thread = threading.Thread(target=work, args=(mode,))
        thread.start()
        thread.join()
        assert results == expected, name


def steps_with_traps():
    use_threads()
    for size in (SMALL, LARGE):
        traps = functools.partial(mode_is_kept, 0x1000)  # any exception but "inexact" is fatal
        assert trained(size, guard=traps) == trained(size)


def test_traps_of_the_caller_do_not_fire():
    in_own_process(steps_with_traps)


IMPORT = """
import json, numpy, os, sys
def state():
    maps = open("/proc/self/maps").read()
    return [len(os.listdir("/proc/self/task")), Mxcsr().get(), "libcuda" in maps or "_cuda" in maps]
before = state()
import adamax_ext
frameworks = {"torch", "jax", "tensorflow", "keras", "cupy", "ml_dtypes", "mxnet"}
print(json.dumps([before, state(), sorted(frameworks & set(sys.modules))]))
"""


def test_import_starts_and_changes_nothing():
    code = f"import ctypes, mmap\n{inspect.getsource(Mxcsr)}\n{IMPORT}"
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    before, after, frameworks = json.loads(output)
    assert after == before
    assert before[1:] == [Mxcsr.DEFAULT, False]
    assert frameworks == []

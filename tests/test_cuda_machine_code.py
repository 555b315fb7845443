"""Machine code of the CUDA kernels: IEEE arithmetic, whole packets, loads that wait together."""

import collections
import re
import shutil

import pytest
from support.building import REPOSITORY, run
from support.sass import count, disassembled, loads, parsed, stretches, waits

NVCC = shutil.which("nvcc")
ARCHITECTURE = "90"
# What nvcc compiles to fused operations where that is not forbidden, and what rounds once.
FUSED = re.compile(r"(fma|mad)\.(r[nzmp]\.)?(ftz\.)?f(32|64)")
INEXACT = re.compile(r"\w+\.approx\S*|div\.full\S*|\w+\.ftz\S*|(atom|red)\.\S+")
ELEMENT = r"LDG\.E(\.64|\.U16)?(\.CONSTANT)?"  # an element in one piece
# Pairs of which the parameter, or the gradient, has 16 bits; of doubles; of bfloat16 parameters.
PARAM_16, GRAD_16, DOUBLE, ROUNDED = (4, 5, 6, 7), (1, 2, 4, 6), 3, (6, 7)
ROUNDINGS, FORMATS = 3, 3  # with which a pair is a storage


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
    if NVCC is None:
        pytest.skip("needs nvcc")
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


@pytest.fixture(scope="session")
def kernels(compiled):
    """The instructions of each kernel by its name."""
    return {
        kind_of(name): code for name, code in disassembled(compiled[0] / "device.cubin").items()
    }


def numbers_of(kernel):
    """Template arguments of a kernel: of Update pair, average, accumulator, small table."""
    numbers = [int(n) for n in re.findall(r"(?:Li|Lb|DTypeE|StateFormatE)(\d+)", kernel)]
    if kernel.startswith("Update"):  # it has a storage
        numbers[0] //= ROUNDINGS * FORMATS
    return numbers


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
    for symbol, stack, *spilled, registers in sorted(found, key=lambda row: kind_of(row[0])):
        print(f"{registers:>4} {sum(map(int, spilled)):>4}  {kind_of(symbol)}")
        assert (stack, *spilled) == ("0", "0", "0"), symbol
    # 8 pairs x 4 streams; 7 pairs x 2 formats, and 2 that are rounded in many ways; 4 dtypes; those
    # and one with a remainder; 4 dtypes x 2 streams and the later levels of sums. And the groups of
    # numbers in device memory, and the numbers of variables. Two sizes of tables.
    kinds = collections.Counter(re.match(r"[A-Z][a-z]+", kind_of(row[0]))[0] for row in found)
    elementwise = {"Update": 64, "Tile": 32, "Accumulate": 8, "Average": 10}
    assert kinds == {**elementwise, "Sums": 18, "Clip": 1, "Make": 4}


def is_double(kernel):
    return numbers_of(kernel)[0] == (DOUBLE if kernel.startswith("Update") else 1)


def streams_of(kernel):
    """How many packets of 16 bytes and of 8 bytes an elementwise kernel loads, and stores."""
    numbers = numbers_of(kernel)
    if kernel.startswith("Update"):
        pair, *others, _ = numbers
        writes_grad = not others[1]  # where no gradients are accumulated, it can be written back
        narrow = [(pair in PARAM_16) + (pair in GRAD_16)] * 2
        narrow[1] -= (pair in GRAD_16) and not writes_grad
        every = [4 + sum(others), 3 + sum(others) + writes_grad]
    else:  # Accumulate stores one stream, Average both, where it overwrites
        narrow = [int(numbers[0] in (2, 3))] * 2
        narrow[1] *= kernel.startswith("Average")
        every = [2, 1 + kernel.startswith("Average")]
        if kernel.startswith("Average") and numbers[1]:  # a remainder
            narrow, every = [2, 2], [3, 3]
    return [(both - half, half) for both, half in zip(every, narrow, strict=True)]


def test_elementwise_kernels_move_whole_packets_and_wait_for_all_together(kernels):
    """Nothing waits for a stream before all are under way: no use, branch, store or barrier.

    So with the scalars of a group, which may lie in device memory: no load stands before those of
    the streams, and those of the scalars stand beside them, guarded.
    """
    seen = 0
    for kernel, code in kernels.items():
        assert count(code, r"(LDL|STL)\b.*") == 0, kernel
        if re.match("Update|Accumulate|Average", kernel):
            loaded, stored = streams_of(kernel)
            packets = [s for s in stretches(code) if loads(s, r"LDG\.E\.128.*")]
            wide = [[len(loads(s, rf"LDG\.E\.{n}.*")) for n in (128, 64)] for s in packets]
            assert wide == [[*loaded]], kernel
            assert not waits(packets[0]), f"{kernel}: {waits(packets[0])}"
            assert next(i for i in code if i.name.startswith("LDG")) in packets[0], kernel
            assert any(i.guard for i in packets[0] if i.name.startswith("LDG")), kernel
            assert count(code, r"STG\.E\.128.*") == stored[0], kernel
            # Of doubles the elements have 8 bytes too.
            if not is_double(kernel):
                assert count(code, r"STG\.E\.64.*") == stored[1], kernel
            seen += 1
    assert seen == 82


def accesses_of_tiles(pair, state):
    """How many accesses of how many bits a lane makes: loads, perhaps loads, and stores."""
    param, grad = (64 if pair in some else 128 for some in (PARAM_16, GRAD_16))
    state_bits = (128, 64, 32)[state]
    always = collections.Counter({param: 2}) + collections.Counter({state_bits: 4})
    perhaps = collections.Counter({grad: 2}) + collections.Counter({128: 2})  # the accumulator
    # The average is loaded later.
    stored = always + perhaps + collections.Counter({128: 2})
    if pair in ROUNDED:
        perhaps[64] += 2
        stored[64] += 2
    # Numbers of the variable, of which the keys for weights and for momenta lie side by side.
    always += collections.Counter([[64], [128 if pair in ROUNDED else 64, 64], []][state])
    if state == 2:
        always += collections.Counter([32, 128 if pair in ROUNDED else 64])  # and the scale
    return always, perhaps, stored


def widths(instructions):
    """Count accesses of 32 bits and more by their width."""
    found = (re.fullmatch(r"(?:LDG|STG)\.E(?:\.(64|128))?", i.name) for i in instructions)
    return collections.Counter(int(match[1] or 32) for match in found if match)


def test_tiles_move_whole_packets_and_wait_for_all_together(kernels):
    """As the other elementwise kernels; what may be missing is loaded by guarded instructions.

    A warp finds its largest norm by five exchanges.
    """
    seen = 0
    for kernel, code in kernels.items():
        if not kernel.startswith("Tile"):
            continue
        pair, state, _ = numbers_of(kernel)
        always, perhaps, stored = accesses_of_tiles(pair, state)
        (packets,) = (s for s in stretches(code) if widths(loads(s)) == always)
        assert not waits(packets), f"{kernel}: {waits(packets)}"
        guarded = widths(i for i in packets if i.name.startswith("LDG") and i.guard)
        assert guarded.pop(32) >= 8, kernel  # scalars of a group, and the veto
        assert guarded == perhaps, kernel
        for width in (64, 128):  # others are of single elements too
            assert count(code, rf"STG\.E\.{width}") == stored[width], kernel
        exchanges = [i.operands for i in code if i.name.startswith("SHFL")]
        distances = [int(d, 16) for d in re.findall(r"(0x\w+), 0x1f", " ".join(exchanges))]
        assert distances == ([16, 8, 4, 2, 1] if state == 2 else []), kernel
        seen += 1
    assert seen == 32


def test_lanes_of_sums_wait_for_all_their_loads_together(kernels):
    """A lane has 128 bytes of numbers under way, and at the end of a block half as many."""
    seen = 0
    for kernel, code in kernels.items():
        if kernel.startswith("Sums"):
            columns = [s for s in stretches(code) if len(loads(s, ELEMENT)) >= 8]
            whole = 16 if is_double(kernel) else 32
            assert sorted(len(loads(s, ELEMENT)) for s in columns) == [whole // 2, whole], kernel
            for column in columns:
                assert not waits(column, ELEMENT), f"{kernel}: {waits(column, ELEMENT)}"
            seen += 1
    assert seen == 18


DIVISIONS = """
extern "C" __global__ void one(const T* a, const T* b, T* c) { c[0] = a[0] / b[0]; }
extern "C" __global__ void three(const T* a, const T* b, T* c) {
  c[0] = a[0] / b[0]; c[1] = a[1] / b[1]; c[2] = a[2] / b[2];
}
extern "C" __global__ void inverse(const T* a, T* c) { c[0] = 1 / a[0]; }
"""


def divisions(folder, dtype):
    """How many fused operations one division takes, and the way for rare values that all share.

    And those of 1 / x.
    """
    source = folder / f"{dtype}.cu"
    source.write_text(DIVISIONS.replace("T", dtype))
    nvcc(source, folder / "divisions.cubin", "-cubin")
    code = disassembled(folder / "divisions.cubin")
    names = ("one", "three", "inverse")
    one, three, inverse = (count(code[name], r"[FD]FMA.*") for name in names)
    each = (three - one) // 2
    assert each > 0
    return each, one - each, inverse


def test_fused_operations_belong_to_divisions(compiled, kernels):
    """An IEEE division is made of a reciprocal, corrected by fused operations; all are its own."""
    cost = {
        is_double: divisions(compiled[0], ("float", "double")[is_double]) for is_double in (0, 1)
    }
    checked = 0
    for kernel, code in kernels.items():
        fused = count(code, r"[FDH]FMA.*")
        if kernel.startswith("Update"):
            each, shared, _ = cost[is_double(kernel)]
            # A division for each element of a packet, for single elements, and for those by byte.
            width = 2 if is_double(kernel) else 4
            assert fused == each * (width + 2) + shared, kernel
            checked += 1
        elif kernel.startswith("Tile"):  # a lane has 8 elements; of a block's scale an inverse
            each, shared, inverse = cost[False]
            assert fused == 8 * each + shared + inverse * (numbers_of(kernel)[1] == 2), kernel
            checked += 1
        elif kernel.startswith("MakeGroups"):  # 1 / scale and the rate
            each, shared, _ = cost[True]
            assert fused == 2 * each + shared, kernel
            checked += 1
        elif kernel.startswith("MakeNumbers"):
            assert fused == cost[False][2], kernel
            checked += 1
        elif not kernel.startswith("Clip"):  # its divisions and roots are once a variable
            assert fused == 0, kernel
            assert count(code, r"MUFU.*") == 0, kernel
            checked += 1
    assert checked == 136


# ---- The checks themselves -----------------------------------------------------------------------

LISTING = """
		Function : kernel
        /*0000*/                   MOV R9, 0x7 ;                          /* 0x0000000700097802 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @P0  LDG.E.64 R12, desc[UR4][R16.64] ;
        {between}
        /*0040*/                   LDG.E.64 R10, desc[UR4][R8.64+0x10] ;
        /*0050*/                   FADD R4, R4, R10 ;
        /*0060*/              @!P1 BRA 0x10 ;
"""


@pytest.mark.parametrize(
    ("between", "is_late"),
    [
        ("IADD3 R20, R9, R3, RZ ;", False),
        ("BSSY B0, 0x60 ;", False),
        ("FADD R20, R9, R4 ;", True),
        ("FADD R20, R9, -|R7|.reuse ;", True),
        ("@P2 FADD R20, R9, R12 ;", True),
        ("MOV R6, 0x1 ;", True),  # it may not be overwritten either
        ("DADD R20, R20, R12 ;", True),
        ("F2F.F32.F64 R20, R12 ;", True),
        ("LDG.E R20, desc[UR4][R6.64] ;", True),
        ("R2UR UR6, R13 ;", True),
    ],
)
def test_waits_are_found(between, is_late):
    code = parsed(LISTING.format(between=f"/*0030*/ {between}"))["kernel"]
    assert len(code) == 7
    (stretch,) = (s for s in stretches(code) if loads(s))
    assert [i.address for i in loads(stretch) if i.address != 0x30] == [0x10, 0x40]
    assert bool(waits(stretch)) == is_late


@pytest.mark.parametrize(
    "between",
    [
        "STG.E desc[UR4][R2.64], R9 ;",
        "BAR.SYNC.DEFER_BLOCKING 0x0 ;",
        "@P0 BRA 0x60 ;",
        "BSYNC B0 ;",
        "CALL.REL.NOINC 0x60 ;",
        "@P3 BRA 0x40 ;",
    ],
)
def test_loads_are_parted_by_what_ends_a_stretch(between):
    code = parsed(LISTING.format(between=f"/*0030*/ {between}"))["kernel"]
    assert [len(loads(s)) for s in stretches(code) if loads(s)] == [1, 1]

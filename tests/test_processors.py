"""The program's bits on AArch64 and on Windows, and the choice of an instruction set, emulated."""

import contextlib
import functools
import itertools
import re
import shutil
import subprocess
from unittest import mock

import adamax_ext
import numpy as np
import pytest
from support import reference, reference_lowmem
from support.bits import (
    assert_same_bits,
    compute_dtype,
    dtype_of,
    every_16_bit_dtype,
    every_dtype,
    every_pair,
    rounded,
    spread,
)
from support.building import build_and_install, run
from support.low_memory import (
    STORAGES,
    Twins,
    assert_same,
    check_nans,
    check_zeroed_weights,
    needs_bfloat16,
)
from support.processors import (
    AARCH64_COMPILER,
    Processor,
    build_driver,
    on_aarch64,
    tool,
    windows_compiler,
)
from support.runs import AVERAGES, CLIPPINGS, DECAYS, MICRO_BATCHES, SCALES, SKIPPED, VARIABLES
from support.runs import MixedReference as Reference
from support.steps import (
    RULES,
    SETTINGS,
    assert_same_step,
    check_rules,
    check_special_values,
    random_arrays,
    special_values,
)

# With everything on: flush to zero, round to zero. FPCR: also of half precision; NaN without its
# bits; half precision without infinity. MXCSR: subnormals are zeros; no traps.
HOSTILE_MODES = {
    "aarch64": 1 << 24 | 1 << 19 | 3 << 22 | 1 << 25 | 1 << 26,
    "windows": 1 << 15 | 3 << 13 | 1 << 6 | 0x1F80,
}
MACHINES = [("aarch64", "scalar"), ("aarch64", "neon")]
MACHINES += [("windows", isa) for isa in ("scalar", "avx2", "avx512")]
VECTOR = 4  # floats
every_storage = pytest.mark.parametrize("storage", STORAGES, ids=str)


@pytest.fixture(scope="module")
def aarch64(aarch64_library, tmp_path_factory):
    """The library, and the command that runs its driver."""
    driver = build_driver(
        tool(AARCH64_COMPILER), aarch64_library, tmp_path_factory.mktemp("driver")
    )
    return aarch64_library, (*on_aarch64(), driver)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """The library, and the command that runs its driver on what Wine makes of this machine."""
    wine = tool("wine")
    folder = tmp_path_factory.mktemp("windows")
    compiler, archiver = windows_compiler(folder)
    library = build_and_install(
        folder,
        *("-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=AMD64"),
        *(f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_AR={archiver}", "-DCMAKE_RANLIB=true"),
    )
    driver = build_driver(compiler, library, folder)
    return library, ("env", f"WINEPREFIX={folder / 'wine'}", "WINEDEBUG=-all", wine, driver)


@pytest.fixture(scope="module", params=MACHINES, ids="-".join)
def processor(request):
    machine, isa = request.param
    if machine == "windows" and isa not in adamax_ext.available_isas():
        pytest.skip(f"{isa} does not run on this machine")
    with Processor(request.getfixturevalue(machine)[-1], isa, HOSTILE_MODES[machine]) as running:
        assert running.isa == isa
        yield running


# ---- Updates -------------------------------------------------------------------------------------


@every_pair
def test_every_rule_and_pair(processor, param, grad):
    check_rules(param, grad, processor.update)


@every_pair
def test_all_combinations_of_special_values(processor, param, grad):
    check_special_values(param, grad, processor.update)


@every_pair
def test_every_length_at_every_address(processor, param, grad):
    """The driver fails if anything around the arrays is written."""
    rng = np.random.default_rng(2)
    special = special_values(dtype_of(param))
    changes = itertools.cycle(itertools.product(RULES, (None, 0.61), (1.0, 0.37), (1, 5)))
    for size, offset in itertools.product(range(4 * VECTOR + 4), range(16)):
        rule, clipvalue, grad_scale, step = next(changes)
        arrays = random_arrays(rng, size, param, grad)
        for array in arrays.values():
            some = rng.random(size) < 0.2
            array[some] = rounded(rng.choice(special, some.sum()), array.dtype)
        settings = {**SETTINGS, **rule, "clipvalue": clipvalue, "grad_scale": grad_scale}

        def update(arrays, offset=offset, **settings):
            processor.update(arrays, offset, **settings)

        assert_same_step(arrays, f"{size} at {offset}, {settings}", update, step=step, **settings)


@pytest.mark.parametrize("sizes", [range(1, 4 * VECTOR + 4), (4095, 4097, 8200)], ids=str)
@every_pair
def test_without_a_gradient_and_at_the_end(processor, param, grad, sizes):
    """What was accumulated is the gradient then; a finalized weight is its average."""
    rng = np.random.default_rng(3)
    T = compute_dtype(dtype_of(param)).type
    for size in sizes:
        arrays = random_arrays(rng, size, param, grad)
        arrays["accumulator"] = arrays.pop("grad").astype(T)
        expected = {name: array.copy() for name, array in arrays.items()}
        w, h = expected["param"].astype(T), expected["accumulator"] * T(1 / 3)
        reference.update(w, h, expected["m"], expected["u"], step=2, **SETTINGS)
        expected["param"] = rounded(w, dtype_of(param))
        k = T(0.75)
        average = expected["average"] * k + expected["param"].astype(T) * (T(1) - k)
        expected |= {"accumulator": np.zeros(size, T), "average": average}
        settings = {**SETTINGS, "step": 2, "micro_batches": 3, "ema_momentum": 0.75}
        processor.call([arrays], accumulated=[0], **settings)
        for name, array in arrays.items():
            assert_same_bits(array, expected[name], f"{name} of {size}")
        del arrays["accumulator"]
        processor.call([arrays], phase="finalize")
        assert_same_bits(arrays["param"], rounded(average, dtype_of(param)), f"final, {size}")


# ---- State in fewer bits, and weights with their rounding ---------------------------------------


@contextlib.contextmanager
def stepping_on(processor, **options):
    """What is asked of the module is done by the processor."""
    update = functools.partial(processor.functional_update, **options)
    with mock.patch.object(adamax_ext, "update", update):
        yield


def some_gradient(rng, size):
    """Return values of many magnitudes, and zeros."""
    return spread(rng, size, np.float32, -12, 4) * (rng.random(size) > 0.2).astype(np.float32)


@every_storage
def test_few_bits_under_every_rule(processor, storage):
    rng = np.random.default_rng(11)
    changes = itertools.product(RULES, (None, 0.61), (1.0, 0.37))
    with stepping_on(processor):
        for number, (rule, clipvalue, grad_scale) in enumerate(changes):
            settings = {**SETTINGS, **rule, "clipvalue": clipvalue, "grad_scale": grad_scale}
            place = {"seed": 2**64 - 1 - number, "variable": 2**32 - 1 - number}
            twins = Twins(rng, 515, storage, is_fresh=number % 2 == 0, **place)
            for step in (1, 2, 7, 2**40):
                twins.step(some_gradient(rng, 515), f"{step} of {settings}", step=step, **settings)


@every_storage
def test_few_bits_of_special_values(processor, storage):
    rng = np.random.default_rng(12)
    table = np.append(special_values(np.dtype(np.float32)), np.float32([1e30, 1e-30, 3e38, -3e38]))
    with stepping_on(processor):
        for rule in RULES:
            twins = Twins(rng, 700, storage)
            for step in range(1, 8):
                gradient = some_gradient(rng, 700)
                some = rng.random(700) < (0, 0.1, 1)[step % 3]
                gradient[some] = rng.choice(table, some.sum())
                twins.step(gradient, f"step {step} of {rule}", step=step, **SETTINGS, **rule)


@every_storage
def test_few_bits_of_every_length_at_every_address(processor, storage):
    """The driver fails if anything around the arrays is written."""
    rng = np.random.default_rng(13)
    offsets = itertools.cycle(range(16))
    for size in (*range(1, 36), *range(250, 262), 511, 512, 513, 1100, 4099):
        first = int(rng.choice([0, 256, 2**33 - 512, 2**34 - 256, 2**52]))
        twins = Twins(rng, size, storage, average=size % 2 == 0, first_element=first)
        for step in (2, 3):
            offset = next(offsets)
            with stepping_on(processor, offset=offset):
                label = f"step {step} of {size} from element {first} at {offset}"
                twins.step(some_gradient(rng, size), label, step=step, **SETTINGS)


@every_storage
def test_few_bits_on_any_number_of_threads(processor, storage):
    """Around 70,000 elements one thread does all; at last seven have a MiB each to read."""
    rng = np.random.default_rng(15)
    for size in (4095, 4096, 69_999, 70_000, 70_001, 12 * 65_536 + 1):
        twins = Twins(rng, size, storage)
        for step, threads in enumerate((7, 2, 1) if size > 70_001 else (7,), 2):
            with stepping_on(processor, threads=threads):
                label = f"step {step} of {size} on {threads} threads"
                twins.step(some_gradient(rng, size), label, step=step, **SETTINGS)


@needs_bfloat16
def test_nans_and_zeroed_weights(processor):
    with stepping_on(processor):
        check_nans("stochastic")
        check_nans("remainder")
        check_zeroed_weights()


@pytest.mark.parametrize("epsilon_mode", ["outside", "inside"])
@pytest.mark.parametrize("storage", [s for s in STORAGES if s[1] == "float32"], ids=str)
def test_few_bits_of_accumulated_gradients_and_averages(processor, storage, epsilon_mode):
    """Half of twice a gradient is the gradient; an average overwrites weights to nearest."""
    rng = np.random.default_rng(14)
    settings = {**SETTINGS, "epsilon_mode": epsilon_mode, "step": 3, "weight_rounding": storage[3]}
    for size in (3, 300, 1100):
        gradient = some_gradient(rng, size)
        plain = Twins(rng, size, storage).buffers
        other = {name: array.copy() for name, array in plain.items()}
        other["accumulator"] = 2 * gradient
        processor.call([{**plain, "grad": gradient}], **settings)
        processor.call([other], accumulated=[0], micro_batches=2, overwrite=True, **settings)
        expected = {**plain, "accumulator": np.zeros_like(gradient)}
        expected["param"] = rounded(plain["average"], plain["param"].dtype)
        if "remainder" in plain:
            halves, expected["remainder"] = reference_lowmem.bf16_split(plain["average"])
            expected["param"] = halves.view(plain["param"].dtype)
        for name, array in other.items():
            assert_same(array, expected[name], f"{name} of {size}")


# ---- 16 bits -------------------------------------------------------------------------------------


def patterns(dtype):
    return np.arange(2**16, dtype=np.uint16).view(dtype_of(dtype))


@every_16_bit_dtype
def test_every_pattern_is_widened_exactly(processor, dtype):
    zeros = np.full(2**16, -0.0, np.float32)  # to which -0 adds without becoming 0
    arrays = {"param": zeros.copy(), "grad": patterns(dtype), "m": zeros.copy(), "u": zeros.copy()}
    arrays["accumulator"] = zeros.copy()
    processor.call([arrays], phase="accumulate")
    assert_same_bits(arrays["accumulator"], patterns(dtype).astype(np.float32), dtype)


@every_16_bit_dtype
def test_rounding_at_and_between_all_numbers(processor, dtype):
    exact = patterns(dtype).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    with np.errstate(over="ignore"):
        middles = (exact[:-1].astype(np.float64) + exact[1:]).astype(np.float32) / 2
        ends = np.array(
            [np.inf, -np.inf, 65519.99, 65520.0, 3.3961776e38, 3.4028235e38], np.float32
        )
        values = np.concatenate([exact, middles, ends])
        around = [np.nextafter(values, np.float32(to)) for to in (-np.inf, np.inf)]
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    values = np.concatenate([values, *around, nans.view(np.float32)])
    zeros = np.zeros_like(values)
    arrays = {"param": rounded(zeros, dtype_of(dtype)), "m": zeros, "u": zeros, "average": values}
    processor.call([arrays], phase="finalize")
    assert_same_bits(arrays["param"], rounded(values, dtype_of(dtype)), dtype)


# ---- Sums ----------------------------------------------------------------------------------------


def gradient_alone(grad):
    dtype = compute_dtype(grad.dtype)
    zeros = np.zeros(grad.size, dtype)
    return {"param": zeros, "grad": grad, "m": zeros.copy(), "u": zeros.copy()}


@every_dtype
def test_norms_at_the_edges_of_blocks(processor, dtype):
    rng = np.random.default_rng(4)
    arrays = []
    for size in (*range(36), 4080, 4095, 4096, 4097, 3 * 4096 + 5, 100_003):
        arrays.append(spread(rng, size, dtype_of(dtype), low=-10, high=4))
        norm, _ = processor.call([gradient_alone(arrays[-1])], offset=size % 16)
        assert norm == reference.global_norm([arrays[-1]]), size
    norm, _ = processor.call([gradient_alone(array) for array in arrays])
    assert norm == reference.global_norm(arrays)


@every_dtype
def test_finiteness_of_every_element_counts(processor, dtype):
    rng = np.random.default_rng(5)
    for size in (1, 3, 4, 5, 16, 21):
        arrays = gradient_alone(spread(rng, size, dtype_of(dtype)))
        for position, bad in itertools.product(range(size), (np.nan, np.inf, -np.inf)):
            poisoned = {name: array.copy() for name, array in arrays.items()}
            poisoned["grad"][position] = bad
            before = {name: array.copy() for name, array in poisoned.items()}
            assert processor.call([poisoned], require_finite=True)[1] is False
            for name, array in before.items():
                assert_same_bits(poisoned[name], array, f"{name} beside {bad} at {position}")
        assert processor.call([arrays], require_finite=True)[1] is True
        assert arrays["m"].all()


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES, ids=str)
def test_runs_of_calls(processor, clipping, micro_batches):
    for average, (decay, _), scale, skipped in itertools.product(
        AVERAGES, DECAYS, SCALES, ((), SKIPPED)
    ):
        check_run(processor, {**clipping, **micro_batches, **average, **decay, **scale}, skipped)


def check_run(processor, options, skipped, calls=6):
    """The program and the processor train variables of every pair; nothing differs after a call."""
    rng = np.random.default_rng(7)
    shapes = [(dtype_of(param), dtype_of(grad), shape) for _, param, grad, shape, _ in VARIABLES]
    weights = [spread(rng, int(np.prod(shape)), param) for param, _, shape in shapes]
    program = Reference(**SETTINGS, **options)
    program.build(weights)
    n = options.get("gradient_accumulation_steps", 1)
    variables = []
    for w in weights:
        T = compute_dtype(w.dtype)
        kinds = ["m", "u", *["average"] * ("use_ema" in options), *["accumulator"] * (n > 1)]
        variables.append({"param": w.copy(), **{kind: np.zeros(w.size, T) for kind in kinds}})
    settings = {**SETTINGS, "grad_scale": 1 / options.get("loss_scale_factor", 1.0)}
    settings |= {
        k: options[k] for k in ("weight_decay", "clipvalue", "ema_momentum") if k in options
    }
    for clip, name in (("norm", "clipnorm"), ("global_norm", "global_clipnorm")):
        if name in options:
            settings |= {"clip": clip, "limit": options[name]}
    for call in range(calls):
        accumulated = [i for i, pending in enumerate(program.pending) if pending]
        grads = [
            None if (call, i) in skipped else spread(rng, int(np.prod(shape)), grad)
            for i, (_, grad, shape) in enumerate(shapes)
        ]
        program.apply(grads)
        step = call // n + 1
        updates = (call + 1) % n == 0
        every = options.get("ema_overwrite_frequency")
        processor.call(
            [{**arrays, "grad": grad} for arrays, grad in zip(variables, grads, strict=True)],
            accumulated=accumulated,
            step=step,
            micro_batches=n,
            phase="update" if updates else "accumulate",
            overwrite=bool(updates and every and step % every == 0),
            **settings,
        )
        for i, arrays in enumerate(variables):
            expected = {kind: getattr(program, kind)[i] for kind in arrays if kind != "param"}
            expected["param"] = rounded(program.variables[i], shapes[i][0])
            for name, array in arrays.items():
                label = f"{name} of variable {i} after call {call} with {options}"
                assert_same_bits(array, expected[name], label)


# ---- Machine code --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neon_code(aarch64):
    """(mnemonic, operands) of every instruction of the kernels."""
    code = run(tool("aarch64-linux-gnu-objdump"), "-d", "--no-show-raw-insn", neon_object(aarch64))
    return re.findall(r"^ +[0-9a-f]+:\t([\w.]+)\t?(.*)$", code, re.M)


def neon_object(aarch64):
    return aarch64[0].objects["kernels_neon"]


def test_neon_works_on_whole_vectors(neon_code):
    for mnemonic in ("fdiv", "fmax", "fsub", "fmul"):
        operands = " ".join(o for name, o in neon_code if name == mnemonic)
        assert ".4s" in operands and ".2d" in operands, mnemonic
    assert {"fcvtl", "fcvtn"} <= {mnemonic for mnemonic, _ in neon_code}


def test_neon_neither_fuses_nor_approximates_nor_drops_nan(neon_code):
    wrong = re.compile(r"fn?m(add|sub|la|ls)\w*|fr(ecp|sqrt)\w+|f(max|min)nm\w*|bf\w+")
    assert not {m for m, _ in neon_code if wrong.fullmatch(m) and m not in ("bfi", "bfxil", "bfc")}


def test_neon_unit_exports_its_table_only(aarch64):
    names = run(tool("aarch64-linux-gnu-nm"), "-C", neon_object(aarch64))
    symbols = [line.split()[-2:] for line in names.splitlines()]
    exported = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert exported == ["adamax::cpu::neon::kTable"]
    assert {name for kind, name in symbols if kind == "U"} <= {"memcpy", "memset", "memmove"}


# ---- Which instruction set -----------------------------------------------------------------------


def refusal(command, isa):
    """Return why `isa` is refused."""
    environment = {"ADAMAX_EXT_ISA": isa}
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, input=""
    )
    assert result.returncode == 1 and not result.stdout
    return result.stderr


def test_aarch64_takes_neon(aarch64):
    with Processor(aarch64[1], "auto") as running:
        assert running.isa == "neon"
    assert "auto, scalar, neon on this processor; received 'avx2'\n" in refusal(aarch64[1], "avx2")


@pytest.mark.parametrize(("cpu", "best"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_x86_takes_what_the_processor_has(cpp_library, tmp_path, cpu, best):
    qemu = tool("qemu-x86_64")
    if "kernels_avx2" not in cpp_library.objects or shutil.which("c++") is None:
        pytest.skip("needs to build for x86-64")
    command = (qemu, "-cpu", cpu, build_driver("c++", cpp_library, tmp_path))
    with Processor(command, "auto") as running:
        assert running.isa == best
        check_rules("float32", "float16", running.update)
    message = refusal(command, "avx512")
    assert f"must be one of auto, scalar{', avx2' * (best == 'avx2')} on this" in message
    assert "received 'avx512', which needs avx512f avx512bw avx512dq avx512vl f16c" in message
    assert re.search(r": this processor lacks avx512f avx512bw avx512dq avx512vl\b", message)

"""Steps on a real GPU: the bits of the CPU, streams, launches, memory; see bench/gpu.sh."""

import hashlib
import itertools

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, schedules
from support.bits import PAIRS
from support.low_memory import STORAGES

torch = pytest.importorskip("torch", reason="needs torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not adamax_ext.build_info()["cuda_architectures"]:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)

SIZES = [0, 1, 3, 4097, 2**20 + 7]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38]
RATES = {"learning_rate": 0.0371, "beta_1": 0.83, "beta_2": 0.957, "epsilon": 3.1e-5}
SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 0.213},
    "clipvalue": {"clipvalue": 0.61},
    "clipnorm": {"clipnorm": 1.7, "weight_decay": 0.1},
    "global_clipnorm": {"global_clipnorm": 4.3, "loss_scale_factor": 3.7},
    "average": {"use_ema": True, "ema_momentum": 0.871, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "global_clipnorm": 2.0, "use_ema": True},
    "schedule": {"learning_rate": schedules.CosineDecay(0.1, 7)},
}


def make(seed, size, dtype, special=False):
    """Both signs, many magnitudes; with special values here and there if asked for."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.0, 1.0], size) * np.exp2(rng.uniform(-20, 2, size))
    if special and size > 3:
        some = rng.integers(0, size, 40)
        values[some] = rng.choice(SPECIAL, some.size)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def same(ours, theirs, label):
    """Require equal bits; any NaN equals any NaN."""
    ours, theirs = (torch.as_tensor(t).detach().cpu() for t in (ours, theirs))
    assert ours.dtype == theirs.dtype, label
    patterns = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    pattern = patterns[ours.element_size()]
    equal = (ours.contiguous().view(pattern) == theirs.contiguous().view(pattern)) | (
        ours.isnan() & theirs.isnan()
    )
    assert bool(equal.all()), f"{label}: {int((~equal).sum())} of {equal.numel()} differ"


def pair_of_optimizers(weights, make_optimizer):
    """The same optimizer on the GPU and on the CPU."""
    places = [[w.cuda() for w in weights], [w.clone() for w in weights]]
    optimizers = [make_optimizer() for _ in places]
    for optimizer, variables in zip(optimizers, places, strict=True):
        optimizer.build(variables)
    return optimizers, places


def assert_same_state(optimizers, places, label):
    for i, (ours, theirs) in enumerate(zip(*places, strict=True)):
        same(ours, theirs, f"weights {i} {label}")
    state, expected = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for name, kinds in expected.items():
        for kind, array in kinds.items():
            same(state[name][kind], array, f"{kind} of {name} {label}")


# ---- Bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_bits_of_the_cpu(param, grad, settings):
    weights = [make(i, n, param) for i, n in enumerate(SIZES)]
    optimizers, places = pair_of_optimizers(weights, lambda: Adamax(**{**RATES, **settings}))
    assert optimizers[0].state["variable_1"]["momentum"].is_cuda
    for step in range(20):
        special = step in (5, 11) and "norm" not in str(settings)
        grads = [make(100 * step + i, n, grad, special) for i, n in enumerate(SIZES)]
        optimizers[0].apply([g.cuda() for g in grads])
        optimizers[1].apply(grads)
        if step in (0, 1, 5, 19):
            assert_same_state(optimizers, places, f"after step {step}")


def test_poisoned_norms():
    for poison, clip in itertools.product((np.nan, np.inf), ("clipnorm", "global_clipnorm")):
        weights = [make(i, n, "float32") for i, n in enumerate(SIZES)]
        optimizers, places = pair_of_optimizers(weights, lambda clip=clip: Adamax(**{clip: 1.0}))
        grads = [make(50 + i, n, "float32") for i, n in enumerate(SIZES)]
        grads[3][7] = poison
        optimizers[0].apply([g.cuda() for g in grads])
        optimizers[1].apply(grads)
        assert_same_state(optimizers, places, f"after {poison} with {clip}")


@pytest.mark.parametrize("decay", ["decoupled", "l2"])
@pytest.mark.parametrize("mode", ["outside", "inside"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_update_at_any_offset(decay, mode, offset):
    size = 10_007
    arrays = [make(i, size + 8, "float32", special=i == 1) for i in range(5)]
    arrays[3] = arrays[3].abs()
    on_gpu = [a.cuda() for a in arrays]
    for variants in (arrays, on_gpu):
        w, g, m, u, average = (a[offset * (i % 3) :][:size] for i, a in enumerate(variants))
        adamax_ext.update(
            *(w, g, m, u),
            **{"step": 3, "average": average, "decay": decay, "epsilon_mode": mode},
            **{"weight_decay": 0.2, "grad_scale": 0.37, "clipvalue": 0.9},
        )
    for i, (ours, theirs) in enumerate(zip(on_gpu, arrays, strict=True)):
        same(ours, theirs, f"array {i}")


def few_bits(size, offset, storage):
    """Memory for `update`, on the CPU, as before the first step, and some elements before."""
    param, _, bits, rounding = storage
    kinds = {32: ("float32", "float32"), 16: ("bfloat16", "bfloat16"), 8: ("int8", "uint8")}[bits]
    dtypes = {"m": kinds[0], "u": kinds[1], "average": "float32"}
    if rounding == "remainder":
        dtypes["remainder"] = "int16"
    arrays = {
        name: torch.zeros(offset + size, dtype=getattr(torch, t)) for name, t in dtypes.items()
    }
    arrays["param"] = make(1, offset + size, param)
    if bits < 32:
        arrays["norm_scale"] = torch.ones(1) if bits == 16 else torch.zeros(-(-size // 256))
    return arrays


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_update_in_few_bits(storage, offset):
    for size, steps in ((1, 20), (255, 20), (257, 20), (70_001, 20), (2**20 + 7, 3)):
        arrays = few_bits(size, offset, storage)
        places = [{name: a.cuda() for name, a in arrays.items()}, arrays]
        for step in range(1, steps + 1):
            grad = make(100 + step, size, storage[1], special=step == 5)
            for place, g in zip(places, (grad.cuda(), grad), strict=True):
                adamax_ext.update(
                    **{name: a[-size:] for name, a in place.items() if name != "norm_scale"},
                    norm_scale=place.get("norm_scale"),
                    **{"grad": g, "step": step, "weight_rounding": storage[3], "seed": 2**63 + 7},
                    **{"weight_decay": 0.2, "grad_scale": 0.37, **RATES},
                )
        for name, array in arrays.items():
            same(places[0][name], array, f"{name} of {size}")


def test_transposed_and_many_variables():
    weights = [make(i, 12, "float32").reshape(3, 4).t() for i in range(1000)]
    optimizers, places = pair_of_optimizers(weights, Adamax)
    grads = [make(2000 + i, 12, "float32").reshape(3, 4).t() for i in range(1000)]
    optimizers[0].apply([g.cuda() for g in grads])
    optimizers[1].apply(grads)
    assert_same_state(optimizers, places, "of 1000 variables")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_global_norm(dtype):
    arrays = [make(i, n, dtype) for i, n in enumerate([*SIZES, 2**24 + 5000])]
    assert adamax_ext.global_norm([a.cuda() for a in arrays]) == adamax_ext.global_norm(arrays)


def test_more_than_2_31_elements():
    size, part = 2**31 + 4103, 9000
    if torch.cuda.mem_get_info()[0] < 14 * size:
        pytest.skip("needs 30 GB of free GPU memory")
    weights = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(weights)
    ends = [slice(0, part), slice(size - part, size)]
    for seed, end in enumerate(ends):
        weights[end] = make(seed, part, "bfloat16").cuda()
        grad[end] = make(seed + 9, part, "bfloat16").cuda()
    small = [weights[end].cpu() for end in ends]
    optimizers = [Adamax(), Adamax()]
    optimizers[0].build([weights])
    optimizers[1].build(small)
    optimizers[0].apply([grad])
    optimizers[1].apply([grad[end].cpu() for end in ends])
    for end, theirs in zip(ends, small, strict=True):
        same(weights[end], theirs, f"weights {end}")
    assert not weights[part : size - part].any()
    assert adamax_ext.global_norm([grad[ends[1]]]) > 0


def test_fifty_runs_one_hash():
    hashes = set()
    for _ in range(50):
        weights = [make(i, n, "float32").cuda() for i, n in enumerate(SIZES)]
        optimizer = Adamax(global_clipnorm=1.0, use_ema=True)
        optimizer.build(weights)
        for step in range(3):
            grads = [make(10 * step + i, n, "float32").cuda() for i, n in enumerate(SIZES)]
            optimizer.apply(grads)
        arrays = [*weights, *optimizer.variables[2:]]
        data = b"".join(np.asarray(torch.as_tensor(a).cpu()).tobytes() for a in arrays)
        hashes.add(hashlib.sha256(data).hexdigest())
    assert len(hashes) == 1


def test_loss_scale():
    weights = [make(i, n, "float16") for i, n in enumerate(SIZES)]
    inner = {"global_clipnorm": 1.0, "use_ema": True}
    optimizers, places = pair_of_optimizers(
        weights, lambda: LossScaleOptimizer(Adamax(**inner), 8.0, dynamic_growth_steps=3)
    )
    for step in range(9):
        grads = [make(10 * step + i, n, "float16") for i, n in enumerate(SIZES)]
        if step in (2, 6):
            grads[4][-1] = float("inf") if step == 2 else float("nan")
        optimizers[0].apply([g.cuda() for g in grads])
        optimizers[1].apply(grads)
        assert optimizers[0].dynamic_scale == optimizers[1].dynamic_scale
        assert_same_state(optimizers, places, f"after step {step}")


# ---- Streams, launches, memory -------------------------------------------------------------------


def test_current_stream_is_honoured():
    """Real gradients come late on a side stream; before, they are NaN."""
    for count in (1, 7):
        weights = [make(i, 2**20, "float32") for i in range(count)]
        optimizers, places = pair_of_optimizers(weights, lambda: Adamax(global_clipnorm=1.0))
        grads = [make(9 + i, 2**20, "float32") for i in range(count)]
        late = [torch.full((2**20,), float("nan"), device="cuda") for _ in grads]
        real = [g.cuda() for g in grads]
        for optimizer, first in zip(optimizers, (real, grads), strict=True):
            optimizer.apply(first)  # loads the kernels, for which CUDA may wait
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
            for target, source in zip(late, real, strict=True):
                target.copy_(source, non_blocking=True)
            optimizers[0].apply(late)
            assert not side.query(), "the step waited for the device"
            for target in late:
                target.fill_(float("nan"))  # after the step, on its stream
        side.synchronize()
        optimizers[1].apply(grads)
        assert_same_state(optimizers, places, f"of {count} on a side stream")


def profile(function):
    """Names of the runtime's calls and of the kernels while `function` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events()]


@pytest.mark.filterwarnings("default")  # torch's profiler has some of its own
def test_one_launch_and_no_synchronization():
    weights = [torch.ones(256, device="cuda") for _ in range(400)]
    grads = [torch.ones(256, device="cuda") for _ in range(400)]
    plain, scaled = Adamax(), LossScaleOptimizer(Adamax())
    for optimizer, waits in ((plain, 0), (scaled, 1)):
        optimizer.build(weights)
        optimizer.apply(grads)
        names = profile(lambda optimizer=optimizer: [optimizer.apply(grads) for _ in range(5)])
        assert sum("cuda::Update<" in name for name in names) == 5
        ours = [name for name in names if "Synchronize" in name]
        assert sum("EventSynchronize" in name for name in ours) == 5 * waits
        assert sum("StreamSynchronize" in name for name in ours) == 0
        assert sum("DeviceSynchronize" in name for name in ours) <= 2  # profile()'s own, torch's


def test_memory_and_device_stay():
    weights = [torch.ones(100_000, device="cuda") for _ in range(3)]
    optimizer = LossScaleOptimizer(Adamax(global_clipnorm=1.0))
    optimizer.build(weights)
    for _ in range(2):
        optimizer.apply(weights)
    torch.cuda.synchronize()
    free, device = torch.cuda.mem_get_info()[0], torch.cuda.current_device()
    for _ in range(100):
        optimizer.apply(weights)
    torch.cuda.synchronize()
    assert (torch.cuda.mem_get_info()[0], torch.cuda.current_device()) == (free, device)


def test_a_captured_step_is_refused():
    weights, grads = ([torch.ones(8, device="cuda")] for _ in range(2))
    optimizer = Adamax()
    optimizer.build(weights)
    optimizer.apply(grads)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grads[0].add_(0)  # torch warns of an empty graph
        optimizer.apply(grads)
    torch.cuda.synchronize()
    assert optimizer.apply(grads) == 2


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    weights = [make(i, n, "float32") for i, n in enumerate(SIZES)]
    optimizers = [Adamax(clipnorm=1.0, use_ema=True) for _ in range(2)]
    places = [[cupy.asarray(w.numpy()) for w in weights], [w.clone() for w in weights]]
    for optimizer, variables in zip(optimizers, places, strict=True):
        optimizer.build(variables)
    assert isinstance(optimizers[0].state["variable_1"]["norm"], cupy.ndarray)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for step in range(3):
            grads = [make(10 * step + i, n, "float32") for i, n in enumerate(SIZES)]
            optimizers[0].apply([cupy.asarray(g.numpy()) for g in grads])
            optimizers[1].apply(grads)
        stream.synchronize()
    places[0] = [cupy.asnumpy(w) for w in places[0]]
    assert_same_state(optimizers, places, "of CuPy")


# ---- State and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_state_moves(tmp_path, first, second):
    settings = {"use_ema": True, "clipnorm": 0.4, "gradient_accumulation_steps": 3}
    weights = [make(1, 10_007, "float32"), make(2, 30, "float64")]
    grads = [[make(9 + s, 10_007, "float32"), make(99 + s, 30, "float64")] for s in range(10)]
    whole = Adamax(**settings)
    expected = [w.clone() for w in weights]
    whole.build(expected)
    for g in grads:
        whole.apply(g)
    moved = [w.to(first) for w in weights]
    half = Adamax(**settings)
    half.build(moved)
    for g in grads[:5]:
        half.apply([x.to(first) for x in g])
    half.save(tmp_path / "state")
    moved = [w.to(second) for w in moved]
    rest = Adamax(**settings)
    rest.build(moved)
    rest.load(tmp_path / "state")
    for g in grads[5:]:
        rest.apply([x.to(second) for x in g])
    assert_same_state([rest, whole], [moved, expected], f"from {first} to {second}")


def test_refusals():
    weights = [torch.ones(6, device="cuda")]
    optimizer = Adamax()
    optimizer.build(weights)
    with pytest.raises(ValueError, match=r"grads\[0\].* is in host memory; expected memory on"):
        optimizer.apply([torch.ones(6)])
    with pytest.raises(TypeError, match=r"grads\[0\].* has dtype int32"):
        optimizer.apply([torch.ones(6, device="cuda", dtype=torch.int32)])
    with pytest.raises(ValueError, match=r"variables\[1\].* is in host memory"):
        Adamax().build([weights[0], torch.ones(6)])
    assert weights[0].tolist() == [1.0] * 6

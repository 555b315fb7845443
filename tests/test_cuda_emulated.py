"""Steps on an emulated GPU: the real bindings, launches and kernels have the program's bits.

The kernels run thread by thread on the host (tests/cpp/emulated_cuda.cpp); what needs a real GPU is
in test_cuda.py.
"""

import itertools
import pickle
import sys
import types

import adamax_ext
import emulated
import numpy as np
import pytest
import reference
from adamax_ext import Adamax, LossScaleOptimizer
from emulated import CudaArray, DLPackArray, TableArray, log_of, on_cuda
from support import assert_same_bits, bits, dtype_of, every_pair, spread
from test_kernel_bits import EMA_MOMENTUM, RULES, SETTINGS, expected_update
from test_optimizer_bits import (
    AVERAGES,
    CLIPPINGS,
    DECAYS,
    MICRO_BATCHES,
    SCALES,
    SKIPPED,
    check_run,
)

SIZES = [*range(1, 71), 255, 257, 1023, 1025, 4095, 4096, 4097, 3 * 4096 + 5]
OFFSETS = [0, 0, 0, 1, 2, 3, 4, 6, 8, 12, 13]  # bytes: whole vectors, elements, and neither
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 2.0**-102, 3e38]


def special(rng, shape, dtype):
    array = spread(rng, shape, dtype)
    some = rng.random(np.shape(array)) < 0.2
    with np.errstate(all="ignore"):
        array[some] = rng.choice(SPECIAL, some.sum()).astype(dtype)
    return array


# ---- Bits ----------------------------------------------------------------------------------------


def check_update(param, grad):
    rng = np.random.default_rng(3)
    dtypes = {"param": dtype_of(param), "grad": dtype_of(grad)}
    state = np.dtype(np.float64 if param == "float64" else np.float32)
    rules = itertools.cycle(itertools.product(RULES, (None, 0.61), (1, 4)))
    for size in SIZES * 2:
        rule, clipvalue, step = next(rules)
        arrays, memory = {}, {}
        for role in ("param", "grad", "m", "u", "average"):
            values = special(rng, size, dtypes.get(role, state))
            values = np.abs(values) if role == "u" else values
            arrays[role], memory[role] = emulated.unaligned(values, rng.choice(OFFSETS))
        settings = {**SETTINGS, **rule, "clipvalue": clipvalue, "step": step}
        expected = expected_update(arrays, grad_scale=0.37, **settings)
        lent = {role: on_cuda(array) for role, array in arrays.items()}
        adamax_ext.update(**lent, grad_scale=0.37, ema_momentum=EMA_MOMENTUM, **settings)
        for role, array in expected.items():
            assert_same_bits(arrays[role], array, f"{role} of {size}, {settings}")
            arrays[role].view(np.uint8)[...] = 0xA5
            assert np.all(memory[role] == 0xA5), f"memory around {role} of {size} was written"


@every_pair
def test_update(param, grad):
    emulated.run(check_update, param, grad)


def check_combinations(clipping, micro_batches):
    for average, (decay, excluded), scale, skipped in itertools.product(
        AVERAGES, DECAYS, SCALES, ((), SKIPPED)
    ):
        settings = {**clipping, **micro_batches, **average, **decay, **scale}
        check_run(settings, skipped=skipped, excluded=excluded, calls=6, place=on_cuda)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES, ids=str)
def test_every_combination_of_settings(clipping, micro_batches):
    emulated.run(check_combinations, clipping, micro_batches)


def check_many_steps():
    sizes = [0, 1, 3, 2**16 + 7, 70_001]
    variables = [(f"v{i}", "float32", "float32", (n,), "C") for i, n in enumerate(sizes)]
    settings = {"global_clipnorm": 0.7, "weight_decay": 0.1, **AVERAGES[2]}
    check_run(settings, variables=variables, calls=20, place=TableArray)


def test_many_steps():
    emulated.run(check_many_steps)


def check_norms():
    rng = np.random.default_rng(5)
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        arrays = [spread(rng, n, dtype_of(dtype)) for n in (1, 16, 4096, 0, 70_001)]
        ours = adamax_ext.global_norm([on_cuda(a) for a in arrays])
        assert ours == reference.global_norm(arrays), dtype
    # Three levels of sums: more than 4096 blocks of 4096.
    large = np.ones(4096 * 4096 + 5000, np.float32)
    large[::7] = 0.3
    assert adamax_ext.global_norm([CudaArray(large)]) == adamax_ext.global_norm([large])
    for value in (np.nan, np.inf):
        large[123_456] = value
        assert bits(np.array(adamax_ext.global_norm([CudaArray(large)]))) == bits(np.array(value))
    assert adamax_ext.global_norm([CudaArray(large[:0])]) == 0.0


def test_norms():
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    emulated.run(check_norms)


def check_index_arithmetic(size):
    """A variable beyond 2^31 elements, of which the last blocks run, and one behind it."""
    rng = np.random.default_rng(size)
    begin = size // 4096 * 4096 - 2 * 4096
    sizes = [size, 5000]
    variables = [emulated.sparse(n, np.float32) for n in sizes]
    grads = [emulated.sparse(n, np.float32) for n in sizes]
    parts = []
    for large, small in (variables, grads):
        parts.append([large[begin:], small])
        for part in parts[-1]:
            part[...] = spread(rng, part.size, np.float32)
    twins, twin_grads = ([part.copy() for part in pair] for pair in parts)
    optimizers = [Adamax(use_ema=True), Adamax(use_ema=True)]
    optimizers[0].build([SparseArray(v) for v in variables])
    optimizers[1].build(twins)
    emulated.set_first_block(begin // 4096)
    try:
        optimizers[0].apply([SparseArray(g) for g in grads])
    finally:
        emulated.set_first_block(0)
    optimizers[1].apply(twin_grads)
    states = [optimizer.state for optimizer in optimizers]
    for i, twin in enumerate(twins):
        kinds = {kind: states[0][f"variable_{i}"][kind].host for kind in ("momentum", "norm")}
        for kind, array in {"weights": variables[i], **kinds}.items():
            expected = twin if kind == "weights" else states[1][f"variable_{i}"][kind]
            assert_same_bits(array[-twin.size :], expected, f"{kind} of {sizes[i]}")


class SparseArray(CudaArray):
    """An array whose library makes sparse ones."""


SparseArray.__module__ = "sparse_library"


@pytest.mark.parametrize("size", [2**31 + 4103, 2**32 + 4103])
def test_index_arithmetic(size):
    emulated.run(use_sparse_library)
    emulated.run(check_index_arithmetic, size)


def use_sparse_library():
    sys.modules["sparse_library"] = types.SimpleNamespace(
        float32=np.float32,
        zeros_like=lambda array, dtype: CudaArray(emulated.sparse(array.host.size, dtype)),
    )


def check_large_norm():
    large = emulated.sparse(2**31 + 4103, np.float16)
    large[-7:] = np.arange(1, 8)
    assert adamax_ext.global_norm([CudaArray(large)]) == 140**0.5


def test_norm_of_more_than_2_31_elements():
    emulated.run(check_large_norm)


# ---- Dynamic loss scale --------------------------------------------------------------------------


def check_loss_scale(dtype, clipping):
    rng = np.random.default_rng(2)
    weights = [spread(rng, n, dtype) for n in (17, 5000)]
    twin = [w.copy() for w in weights]
    optimizers = []
    for variables in ([CudaArray(w) for w in weights], twin):
        inner = Adamax(gradient_accumulation_steps=2, use_ema=True, **clipping)
        optimizers.append(LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=3))
        optimizers[-1].build(variables)
    for call in range(12):
        grads = [spread(rng, w.size, dtype) for w in weights]
        if call in (3, 6, 7):
            grads[call % 2][call] = np.nan if call == 6 else -np.inf
        if call == 9 and dtype == np.float64:
            grads[0][:] = 1e200  # whose sum of squares overflows, and nothing else
        optimizers[0].apply([CudaArray(g) for g in grads])
        optimizers[1].apply(grads)
        scales = [(o.dynamic_scale, o.step_counter, o.inner_optimizer.calls) for o in optimizers]
        assert scales[0] == scales[1], call
        for device, host in zip(weights, twin, strict=True):
            assert_same_bits(device, host, f"weights after call {call}")
        for name, kinds in optimizers[1].state.items():
            for kind, array in kinds.items():
                ours = optimizers[0].state[name][kind].host
                assert_same_bits(ours, array, f"{kind} of {name} after call {call}")


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_loss_scale(dtype, clipping):
    emulated.run(check_loss_scale, dtype, clipping)


# ---- Launches, streams, memory -------------------------------------------------------------------


def check_launches():
    weights = [CudaArray(np.ones(256, np.float32), stream=5) for _ in range(400)]
    optimizer = Adamax(weight_decay=0.1, use_ema=True)
    optimizer.exclude_from_weight_decay(var_names=["_1"])
    optimizer.build(weights)
    update = "launch update on device 0 stream 5"
    assert log_of(lambda: optimizer.apply(weights)) == [update]
    many = [CudaArray(np.ones(2, np.float32), stream=5) for _ in range(1000)]
    optimizer = Adamax()
    optimizer.build(many)
    assert log_of(lambda: optimizer.apply(many)) == [update] * 3

    squares, clip = (
        line.replace("update", name) for line, name in ((update, "squares"), (update, "clip"))
    )
    optimizer = Adamax(global_clipnorm=1.0)
    optimizer.build(weights)
    assert log_of(lambda: optimizer.apply(weights)) == ["allocate", squares, clip, update]
    for _ in range(3):  # nothing is allocated again
        assert log_of(lambda: optimizer.apply(weights)) == [squares, clip, update]
    optimizer = LossScaleOptimizer(Adamax(clipnorm=1.0))
    optimizer.build(weights)
    optimizer.apply(weights)
    assert log_of(lambda: optimizer.apply(weights)) == [squares, clip, update, "synchronize"]


def test_launches():
    emulated.run(check_launches)


def check_streams():
    ones = [np.ones(10, np.float32) for _ in range(8)]
    optimizer = Adamax()
    TableArray.current_stream = 9
    optimizer.build([TableArray(ones[0]), CudaArray(ones[1], stream=4)])
    # Queued where the first variable is in use; the others are waited for, and wait.
    lent = [CudaArray(ones[2], stream=None), CudaArray(ones[3], stream=6)]
    assert log_of(lambda: optimizer.apply(lent)) == [
        *("wait for 4", "wait for 1", "wait for 6"),
        "launch update on device 0 stream 9",
        *("hold up 4", "hold up 1", "hold up 6"),
    ]
    TableArray.current_stream = 0  # CUDA's other name for the legacy default stream
    same = [TableArray(ones[4]), CudaArray(ones[5], stream=1)]
    assert "launch update on device 0 stream 1" in log_of(lambda: optimizer.apply(same))
    assert "wait for 0" not in log_of(lambda: optimizer.apply(same))
    # Whoever lends by DLPack's method gets its memory back when the device is done.
    lent = [DLPackArray(ones[6]), TableArray(ones[7])]
    assert log_of(lambda: optimizer.apply(lent))[-1] == "synchronize"
    assert lent[0].streams == [1]
    weights = [emulated.on_device_1(5, np.float32)]
    optimizer = Adamax()
    optimizer.build(weights)
    assert "launch update on device 1 stream 7" in log_of(lambda: optimizer.apply(weights))


def test_streams():
    emulated.run(check_streams)


def check_capture():
    weights = [CudaArray(np.ones(3, np.float32))]
    optimizer = Adamax()
    optimizer.build(weights)
    emulated.set_capture(True)
    try:
        with pytest.raises(RuntimeError, match=r"is being captured.*step number"):
            optimizer.apply([CudaArray(np.ones(3, np.float32))])
    finally:
        emulated.set_capture(False)
    assert optimizer.calls == 0
    assert weights[0].host.tolist() == [1, 1, 1]
    assert optimizer.apply([CudaArray(np.ones(3, np.float32))]) == 1


def test_a_captured_step_is_refused():
    emulated.run(check_capture)


# ---- State ---------------------------------------------------------------------------------------


def trained(place, optimizer, weights, calls):
    rng = np.random.default_rng(11)
    for call in range(8):
        grads = [spread(rng, w.shape, w.dtype) for w in weights]
        if call in calls:
            optimizer.apply([place(np.asarray(g, order="F")) for g in grads])


def check_moves(folder, source, target):
    """Half of the steps at one place, half at the other: as all of them at one."""
    places = {"host": lambda a: a, "cupy": CudaArray, "torch": TableArray}
    settings = {"use_ema": True, "gradient_accumulation_steps": 3, "clipnorm": 0.4}
    start = [np.asfortranarray(spread(np.random.default_rng(1), (5, 7), np.float32))]
    whole = [a.copy("K") for a in start]
    optimizer = Adamax(**settings)
    optimizer.build(whole)
    trained(places["host"], optimizer, whole, range(8))
    by_steps = optimizer.state_dict()

    for way in ("file", "dict", "keras"):
        weights = [a.copy("K") for a in start]
        first, second = Adamax(**settings), Adamax(**settings)
        first.build([places[source](w) for w in weights])
        trained(places[source], first, weights, range(4))
        second.build([places[target](w) for w in weights])
        if way == "file":
            first.save(folder / "state")
            second.load(folder / "state")
        elif way == "dict":
            second.load_state_dict(first.state_dict())
        else:
            store = {}
            first.save_own_variables(store)
            second.load_own_variables(store)
        trained(places[target], second, weights, range(4, 8))
        assert_same_bits(weights[0], whole[0], f"weights, {way}")
        for kind, array in second.state_dict()["state"]["variable_0"].items():
            assert type(array) is np.ndarray
            assert_same_bits(array, by_steps["state"]["variable_0"][kind], f"{kind}, {way}")


@pytest.mark.parametrize(
    ("source", "target"), [("cupy", "host"), ("host", "torch"), ("torch", "cupy")]
)
def test_state_moves(tmp_path, source, target):
    emulated.run(check_moves, tmp_path, source, target)


def check_state():
    weights = [CudaArray(np.asfortranarray(np.ones((2, 3), np.float16)))]
    optimizer = Adamax(use_ema=True)
    optimizer.build(weights)
    optimizer.apply([CudaArray(np.asfortranarray(np.ones((2, 3), np.float16)))])
    state = optimizer.state["variable_0"]
    assert {type(array) for array in state.values()} == {CudaArray}
    assert {array.host.dtype for array in state.values()} == {np.dtype(np.float32)}
    assert state["momentum"].host.flags.f_contiguous
    values = [np.full((2, 3), float(i)) for i in range(3)]
    optimizer.set_weights([np.int64(4), np.float32(0.5), *map(CudaArray, values)])
    assert state["norm"].host.tolist() == values[2].tolist()
    with pytest.raises(ValueError, match=r"weights\[3\] must have shape \(2, 3\)"):
        optimizer.set_weights([np.int64(4), np.float32(0.5), values[0], values[0][:1], values[0]])
    before = state["average"].host.copy()
    optimizer.finalize_variable_values()
    assert_same_bits(weights[0].host, before.astype(np.float16), "weights from averages")
    copy = pickle.loads(pickle.dumps(optimizer))
    assert copy.state["variable_0"]["norm"].host.tolist() == values[2].tolist()


def test_state():
    emulated.run(check_state)


# ---- Refusals ------------------------------------------------------------------------------------

MACHINES = {
    "no CUDA driver .*runtime 13.0 .*needs a driver for CUDA 13.0": {"driver": 0, "devices": 0},
    "driver supports CUDA 12.4; .*runtime 13.0 .*driver for CUDA 13.0": {"driver": 12040},
    "driver supports CUDA 12.0; .*runtime 12.8 .*CUDA 12.1": {"driver": 12000, "runtime": 12080},
    r"no CUDA device was found \(why\); .* CUDA 13.1; .* 13.0": {
        **{"driver": 13010, "devices": 0, "error": "why"}
    },
    "device 0 has compute capability 7.0; .*for 7.5, 8.6, 12.0 and newer than 12.0": {
        "capability": 70
    },
    "compute capability 8.0": {"capability": 80},
    "compute capability 9.0": {"capability": 90},
    "no CUDA device 1 among the 1": {"devices": 1},
}


def check_machine(message, machine):
    emulated.set_machine(**machine)
    try:
        weight = emulated.on_device_1(3, np.float32)
        for call in (Adamax().build, adamax_ext.global_norm):
            with pytest.raises(RuntimeError, match=rf"\[0\] is on a CUDA device: .*{message}"):
                call([weight])
        host = [np.ones(3, np.float32)]
        assert Adamax().apply(host, host) == 1  # the CPU does not care
    finally:
        emulated.set_machine()
    Adamax().build([weight])


@pytest.mark.parametrize(("message", "machine"), MACHINES.items(), ids=MACHINES)
def test_machines_that_cannot_run_kernels(message, machine):
    emulated.run(check_machine, message, machine)


@pytest.mark.parametrize("capability", [75, 86, 89, 120, 121, 130])
def test_machines_that_can(capability):
    emulated.run(emulated.set_machine, 13000, 13000, 2, capability)
    emulated.run(check_state)
    emulated.run(emulated.set_machine)


def ones(n=6):
    return np.ones(n, np.float32)


def read_only():
    return CudaArray(ones(), data=(ones().ctypes.data, True))


REFUSALS = {
    "grads is in host memory; expected memory on CUDA device 0": (ValueError, ones),
    "grads is on CUDA device 1; expected memory on CUDA device 0": (
        *(ValueError, lambda: emulated.on_device_1(6, np.float32)),
    ),
    "has 5 elements": (ValueError, lambda: CudaArray(ones(5))),
    "expected the layout": (ValueError, lambda: CudaArray(ones(12)[::2])),
    "has dtype '<i4'": (TypeError, lambda: CudaArray(np.ones(6, np.int32))),
    "has dtype '>f4'": (TypeError, lambda: CudaArray(np.ones(6, ">f4"))),
    "has dtype float64 but": (TypeError, lambda: CudaArray(np.ones(6))),
    "has a mask": (ValueError, lambda: CudaArray(ones(), mask=1)),
    "has no memory": (BufferError, lambda: CudaArray(ones(), data=(0, False))),
}


def check_refusal(message):
    error, make = REFUSALS[message]
    weights = [CudaArray(ones())]
    optimizer = Adamax()
    optimizer.build(weights)
    message = message.replace("grads", r"grads\[0\] \(variable 'variable_0'\)")
    with pytest.raises(error, match=message):
        optimizer.apply([make()])
    assert weights[0].host.tolist() == ones().tolist()
    assert optimizer.apply([CudaArray(ones())]) == 1


@pytest.mark.parametrize("message", REFUSALS)
def test_refused_gradients(message):
    emulated.run(check_refusal, message)


def check_refused_variables():
    with pytest.raises(BufferError, match=r"variables\[0\] is read-only"):
        Adamax().build([read_only()])
    with pytest.raises(ValueError, match=r"variables\[1\] .*in host memory; expected memory on"):
        Adamax().build([CudaArray(ones()), ones()])
    with pytest.raises(ValueError, match=r"variables\[1\] .*on CUDA device 1; expected .* host"):
        Adamax().build([ones(), emulated.on_device_1(6, np.float32)])
    with pytest.raises(TypeError, match=r"variables\[0\] is a StrangeArray on a GPU"):
        Adamax().build([StrangeArray(ones())])
    with pytest.raises(ValueError, match=r"buffers\[1\] is in host memory"):
        adamax_ext.global_norm([CudaArray(ones()), ones()])
    with pytest.raises(ValueError, match="u is in host memory"):
        adamax_ext.update(*map(CudaArray, (ones(), ones(), ones())), ones(), step=1)
    shared = ones()
    with pytest.raises(ValueError, match="overlaps"):
        Adamax().build([CudaArray(shared), CudaArray(shared)])


class StrangeArray:
    """Memory on a GPU, of a library without functions."""

    def __init__(self, host):
        self.array = CudaArray(host)

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


StrangeArray.__module__ = "strange"


def test_refused_variables():
    emulated.run(check_refused_variables)

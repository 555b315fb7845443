"""Device buffers under the real bindings, on an emulated GPU: launches, streams, memory."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, _core
from support import emulated
from support.bits import assert_same_bits
from support.emulated import GONE, BothArray, CudaArray, DLPackArray, JaxArray, TableArray, log_of


def ones(n=6):
    return np.ones(n, np.float32)


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
    assert log_of(lambda: optimizer.apply(weights)) == [squares, clip, update]
    optimizer = LossScaleOptimizer(Adamax(clipnorm=1.0))
    optimizer.build(weights)
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


def check_workspace_of_another_stream():
    """The sums of the step before can still be under way on the stream that it was queued on."""
    optimizer, grads = Adamax(global_clipnorm=1.0), [TableArray(ones())]
    optimizer.build([TableArray(ones())])
    plain, before = Adamax(), 0
    plain.build([TableArray(ones())])
    for stream in (9, 9, 5, 5, 9):
        TableArray.current_stream = stream
        log = log_of(lambda: optimizer.apply(grads))
        waits = [f"wait for the last use on {before}"] if before not in (0, stream) else []
        assert log[: -len(STEP)] == waits, stream
        assert log[-len(STEP) :] == [f"launch {name} on device 0 stream {stream}" for name in STEP]
        assert len(log_of(lambda: plain.apply(grads))) == 1  # which keeps nothing in it
        before = stream
    TableArray.current_stream = 9


STEP = ["squares", "clip", "update"]


def test_workspace_of_another_stream():
    emulated.run(check_workspace_of_another_stream)


def check_allocations():
    """Memory is had when an optimizer is built, and for the first norm; then never again."""
    kinds = {"use_ema": True, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    sizes = [3, 70_001, 0, 5]
    for wrap in (lambda adamax: adamax, LossScaleOptimizer):
        for clipping in ({}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}):
            adamax = Adamax(**kinds, **clipping)
            adamax.exclude_from_weight_decay(var_names=["_1"])
            optimizer = wrap(adamax)
            weights = [TableArray(ones(n)) for n in sizes]
            assert log_of(lambda o=optimizer, w=weights: o.build(w)).count("allocate") == 1
            log = []
            for step in range(20):
                TableArray.current_stream = 5 + step // 2 % 3
                grads = [TableArray(ones(n)) for n in sizes]
                grads[1].host[step] = np.inf if step % 5 == 4 else 1
                log += log_of(lambda o=optimizer, g=grads: o.apply(g))
            log += log_of(adamax.finalize_variable_values)
            assert sum("launch update" in line for line in log) >= 7
            assert not [line for line in log if "allocate" in line]
            del adamax, optimizer
    TableArray.current_stream = 9
    arrays = [[TableArray(ones()) for _ in range(20)] for _ in range(4)]
    plan = _core.Plan(
        *(tuple(arrays[0]), [f"v{i}" for i in range(20)], list(range(20))),
        **{"momentum": arrays[1], "norm": arrays[2], "averages": None, "accumulators": None},
    )
    call = _core.Call()
    call.clipnorm, call.require_finite = 1.0, True
    groups = [_core.Group() for _ in range(20)]
    log = log_of(lambda: plan.step(tuple(arrays[3]), None, groups, call))
    assert "upload" in log and "allocate" not in log

    large, small = CudaArray(ones(70_001)), CudaArray(ones(3), stream=5)
    adamax_ext.global_norm([large])  # memory of another call may be there, or not
    log = log_of(lambda: [adamax_ext.global_norm([a]) for a in (large, small, large) * 5])
    assert log.count("synchronize") == 15
    assert not [line for line in log if "allocate" in line]
    larger = CudaArray(ones(300_001))
    assert log_of(lambda: adamax_ext.global_norm([larger])).count("allocate") == 1
    assert "allocate" not in log_of(lambda: adamax_ext.global_norm([larger]))
    arrays = [CudaArray(ones()) for _ in range(4)]
    assert "allocate" not in log_of(lambda: adamax_ext.update(*arrays, step=1))


def test_allocations():
    emulated.run(check_allocations)


def check_norms_at_once():
    """Each thread has memory of its own, kept for whoever calls next."""
    sizes = [5, 5000, 70_001, 300_001]
    expected = [adamax_ext.global_norm([ones(n)]) for n in sizes]
    arrays = [CudaArray(ones(n), stream=n) for n in sizes]
    with ThreadPoolExecutor(4) as pool:
        norms = list(pool.map(lambda array: adamax_ext.global_norm([array]), arrays * 10))
    assert norms == expected * 10


def test_norms_at_once():
    emulated.run(check_norms_at_once)


# ---- Work that is still pending on what is lent --------------------------------------------------


class LateBothArray(BothArray):
    """A gradient that is computed when the library is told who waits for it."""

    def compute(self):
        self.host[...] = 0.5


UNTOLD = {  # what an interface may say of streams without telling one
    "version 2": {"version": 2},
    "version 2 with an entry": {"version": 2, "stream": 7},
    "no entry": {"version": 3},
    "no version": {"version": GONE, "stream": 7},
    "none": {"version": 3, "stream": None},
}


def late(**entries):
    """Return arrays for which the device has still to compute 0.5, by one protocol and by both."""
    both = LateBothArray(np.full(6, np.nan, np.float32), **entries)
    alone = CudaArray(np.full(6, np.nan, np.float32), **{"stream": GONE, **entries})
    emulated.when_synchronized(lambda: alone.host.fill(0.5))
    return both, alone


USES = {  # with a pending array
    "apply": lambda o, late: o.apply([late]),
    "norm": lambda o, late: adamax_ext.global_norm([CudaArray(ones()), late]),
    "update": lambda o, late: adamax_ext.update(
        *(CudaArray(ones()), late, CudaArray(ones()), CudaArray(ones())), step=1
    ),
    "copy": lambda o, late: _core.copy(CudaArray(ones()), late),
    "copy to the host": lambda o, late: _core.copy(ones(), late),
}


def check_pending(entries, use):
    optimizer, weights = Adamax(), [CudaArray(ones())]
    optimizer.build(weights)
    both, alone = late(**entries)
    # DLPack, where there is it, lets the library see to it.
    log = log_of(lambda: use(optimizer, both))
    assert both.streams == [1]
    assert "synchronize device" not in log
    assert "synchronize" in log[-2:]
    log = log_of(lambda: use(optimizer, alone))
    if entries == UNTOLD["none"]:  # a promise
        assert "synchronize device" not in log
        emulated.finish()
    else:
        assert log[0] == "synchronize device"
        assert "synchronize" in log[-2:]  # what comes later would not wait for us
        assert np.all(alone.host == 0.5)
    twin, host = Adamax(), [ones()]
    twin.build(host)
    if use is USES["apply"] and entries != UNTOLD["none"]:
        for _ in range(2):
            twin.apply([np.full(6, 0.5, np.float32)])
        assert_same_bits(weights[0].host, host[0], "weights")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("entries", UNTOLD)
def test_interfaces_that_tell_no_stream(entries, use):
    emulated.run(_check_pending, entries, use)


def _check_pending(entries, use):
    check_pending(UNTOLD[entries], USES[use])


def check_told_stream():
    """Where the interface tells a stream, nobody waits; JAX's tells none."""
    optimizer = Adamax()
    optimizer.build([CudaArray(ones())])
    grad = BothArray(ones(), version=3, stream=5)
    update = "launch update on device 0 stream 7"
    assert log_of(lambda: optimizer.apply([grad])) == ["wait for 5", update, "hold up 5"]
    assert grad.streams == []
    grad = JaxArray(ones())
    log = log_of(lambda: optimizer.apply([grad]))
    assert log == ["wait for 1", update, "hold up 1", "synchronize"]
    assert grad.streams == [1]


def test_interfaces_that_tell_a_stream():
    emulated.run(check_told_stream)


def check_late_zeros():
    """The library fills the state on its current stream; the first step is on another one."""
    made = []

    def zeros_like(array, dtype):
        made.append(CudaArray(np.full(array.host.shape, np.nan, dtype), stream=3))
        host = made[-1].host
        emulated.when_synchronized(lambda: host.fill(0))
        return made[-1]

    sys.modules["late_library"] = SimpleNamespace(float32=np.float32, zeros_like=zeros_like)
    settings = {"use_ema": True, "gradient_accumulation_steps": 2}
    weights, host = [LateZeros(ones()), LateZeros(ones(70_001))], [ones(), ones(70_001)]
    optimizer, twin = Adamax(**settings), Adamax(**settings)
    log = log_of(lambda: optimizer.build(weights))
    assert log == ["synchronize device", "synchronize", "allocate"]
    assert len(made) == 8
    twin.build(host)
    for _ in range(4):
        optimizer.apply([CudaArray(w.copy(), stream=5) for w in host])
        twin.apply([w.copy() for w in host])
    for ours, theirs in zip(weights, host, strict=True):
        assert_same_bits(ours.host, theirs, "weights")


class LateZeros(CudaArray):
    """An array whose library is late with its zeros."""


LateZeros.__module__ = "late_library"


def test_zeros_that_are_late():
    emulated.run(check_late_zeros)


# ---- Captures ------------------------------------------------------------------------------------


def check_capture(stream):
    """Stream 7 is the one that work is queued on; 5, and 1 of DLPack, are waited for."""

    def refused(call):
        with pytest.raises(RuntimeError, match=r"is being captured.*step number"):
            call()

    def arrays():
        return CudaArray(ones()), CudaArray(ones(), stream=5), DLPackArray(ones())

    pending, large = [], CudaArray(emulated.sparse(2**34, np.float16))
    unknown = CudaArray(ones(), version=2)
    for settings in ({}, {"global_clipnorm": 1.0}):
        weights = [CudaArray(ones()) for _ in range(3)]
        optimizer, fresh = LossScaleOptimizer(Adamax(**settings)), Adamax(**settings)
        optimizer.build(weights)
        emulated.when_synchronized(lambda: pending.append(1))
        calls = {
            "step": lambda o=optimizer: o.apply(arrays()),
            "with an unknown stream": lambda o=optimizer: o.apply([*arrays()[:2], unknown]),
            "first step": lambda f=fresh: f.apply(arrays(), arrays()),
            "update": lambda: adamax_ext.update(*arrays(), CudaArray(ones()), step=1),
            "norm": lambda: adamax_ext.global_norm(arrays()),
            "norm that needs more memory": lambda: adamax_ext.global_norm([*arrays(), large]),
            "copy": lambda: _core.copy(arrays()[0], arrays()[1 if stream != 1 else 2]),
            "copy from the host": lambda: _core.copy(CudaArray(ones(), stream=stream), ones()),
            "copy to the host": lambda: _core.copy(ones(), CudaArray(ones(), stream=stream)),
        }
        for name, call in calls.items():
            with emulated.captured(stream):
                assert log_of(lambda call=call: refused(call)) == [], name
        assert optimizer.inner_optimizer.calls == fresh.calls == 0
        assert not pending and not fresh.built
        assert all(w.host.tolist() == [1] * 6 for w in weights)
        optimizer.apply(arrays())
        assert optimizer.inner_optimizer.calls == 1
        emulated.finish()
        pending.clear()


@pytest.mark.parametrize("stream", [7, 5, 1])
def test_captures_are_refused(stream):
    emulated.run(check_capture, stream)

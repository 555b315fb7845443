"""Variables that share memory are stepped in turn, as by torch; no interrupt leaves half a step."""

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")

from adamax_ext.torch import Adamax  # noqa: E402

OPTIONS = {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3}


def with_gap(seed):
    return torch.nn.Parameter(torch.randn(6, 2, generator=generator(seed))[:, 0])


def dense(seed):
    return torch.nn.Parameter(torch.randn(6, generator=generator(seed)))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def state_with(param, **shared):
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(6), "exp_inf": torch.zeros(6)}
    return {**state, **shared}


def shared_count(make, params):
    count = torch.zeros((), dtype=torch.int64)
    return {param: state_with(param, step=count) for param in params}


def shared_moment(make, params):
    moment = make(3).detach().abs()
    return {param: state_with(param, exp_avg=moment) for param in params}


def results_of(kind, make, shares):
    params = [make(1), make(2)]
    optimizer = kind(params, **OPTIONS)
    optimizer.state.update(shares(make, params))
    for step in range(5):
        for param in params:
            param.grad = torch.randn(6, generator=generator(10 + step))
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    return [*(p.detach() for p in params), *(state[k] for state in states for k in sorted(state))]


@pytest.mark.parametrize("make", [dense, with_gap])
@pytest.mark.parametrize("shares", [shared_count, shared_moment])
def test_shared_state_is_written_in_turn(make, shares):
    ours, theirs = (results_of(kind, make, shares) for kind in (Adamax, torch.optim.Adamax))
    for tensor, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert float(ours[4]) == (10 if shares is shared_count else 5)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("beside", [None, with_gap])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_gradient_may_lie_across_its_parameter(is_ahead, twice, beside):
    """Ahead or behind, where a loop over longer vectors would have written it before it is read."""

    def run(kind):
        base = torch.randn(201, generator=generator(4))
        ends = base[:-1], base[1:]
        params = [torch.nn.Parameter(ends[not is_ahead]) for _ in range(1 + twice)]
        for param in params:
            param.grad = ends[is_ahead]
        if beside is not None:
            params.append(beside(5))
            params[-1].grad = torch.ones(6)
        kind(params, **OPTIONS).step()
        return base, params[-1].detach()

    for tensor, expected in zip(run(Adamax), run(torch.optim.Adamax), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


def test_what_came_to_share_memory_before_a_step_that_failed():
    params = [dense(seed) for seed in range(3)]
    optimizer = Adamax(params)
    for param in params:
        param.grad = torch.ones(6)
    optimizer.step()
    first, second = (optimizer.state[param] for param in params[:2])
    second["step"] = first["step"]
    params[2].grad = torch.ones(6).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    params[2].grad = torch.ones(6)
    optimizer.step()
    assert first["step"] == 3  # each of the two has counted


def test_zero_gradients_with_a_tiny_epsilon():
    """The limit below which state is quiet would make zero by zero of it."""
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Adamax([param], eps=torch.finfo(torch.float32).tiny)
    for _ in range(3):
        param.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
        optimizer.step()
    assert (param[1:] == 1).all()
    assert (param[0] < 1).all()


def test_a_first_step_in_turn_that_fails_leaves_no_state():
    whole = torch.ones(6, 2)
    twins = [torch.nn.Parameter(whole[:, 0]) for _ in range(2)]
    groups = [{"params": twins}, {"params": [dense(1)], "lr": float("inf")}]
    optimizer = Adamax(groups)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones(6)
    with pytest.raises(ValueError, match="learning_rate must be finite"):
        optimizer.step()
    assert not optimizer.state
    assert (whole == 1).all()


class Interrupt(Exception):
    pass


def snapshot(optimizer):
    """Return the first weight and the count of each parameter."""
    states = optimizer.state.items()
    return tuple(
        torch.stack(tensors)
        for tensors in (
            [param.detach()[0] for param, _ in states],
            [state["step"] for _, state in states],
        )
    )


def check_interrupts():
    def interrupt(number, frame):
        raise Interrupt

    params = [torch.nn.Parameter(torch.ones(400, 2)[:, 0]) for _ in range(60)]
    optimizer = Adamax(params)
    for param in params:
        param.grad = torch.ones(400)
    optimizer.step()
    start = time.perf_counter()
    optimizer.step()
    whole = time.perf_counter() - start
    interrupted = 0
    signal.signal(signal.SIGALRM, interrupt)
    for k in range(60):
        weights, counts = snapshot(optimizer)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(whole * (k + 1) / 50, 1e-6))
            optimizer.step()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            interrupted += 1
        now = snapshot(optimizer)
        moved = (now[0] != weights).unique()
        assert moved.tolist() == (now[1] != counts).unique().tolist()
        assert len(moved) == 1
    assert interrupted


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")
def test_an_interrupt_leaves_no_half_step():
    """At any moment of a step: before the native call, in it, or while results are copied back.

    In a process of its own: an interrupt may hit torch's contexts, such as no_grad, at their end.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check_interrupts).result()

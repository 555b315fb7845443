"""Steps in JAX from several threads at once, beside other work, and with threads of our own."""

import threading

import adamax_ext
import numpy as np
import pytest
from support.jax_runs import SETTINGS, Twin, adamax, jax, jnp, on_device, on_host
from support.processes import in_own_process, use_threads

THREADS, STEPS = 4, 15


def host_weights():
    rng = np.random.default_rng(0)
    shapes = [(257, 301), (7,), (300_007,)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def host_grads(t):
    rng = np.random.default_rng(1 + t)
    return [rng.normal(size=w.shape).astype(np.float32) for w in host_weights()]


def train(tx, step, others=lambda: None):
    params = on_device(host_weights())
    state = tx.init(params)
    for t in range(STEPS):
        grads = on_device(host_grads(t))
        params, state = step(params, grads, state)
        others()
    return params, state


def expected():
    twin = Twin(host_weights(), **SETTINGS, weight_decay=0.1)
    for t in range(STEPS):
        twin.step(host_grads(t))
    return twin


def run_in_threads(work, count=THREADS):
    """Call work(i) in threads; return the results, or raise what the first of them raised."""
    results, errors = [None] * count, []

    def call(i):
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def check_threads():
    """Each with a training of its own, all with one compiled step, and none waiting for results."""
    use_threads()
    tx = adamax(**SETTINGS, weight_decay=0.1)
    step = jax.jit(tx.apply, donate_argnums=(0, 2))
    matrix = jnp.ones((400, 400))
    multiply = jax.jit(lambda a: a @ a)
    twin = expected()
    for params, state in run_in_threads(lambda i: train(tx, step, lambda: multiply(matrix))):
        twin.assert_same(params, state, "threads")


def test_several_threads_at_once():
    in_own_process(check_threads)


def check_first_steps():
    """Where every thread registers and compiles at the same time."""
    settings = SETTINGS | {"weight_decay": 0.1}
    barrier = threading.Barrier(THREADS)

    def work(i):
        tx = adamax(**settings)
        barrier.wait()
        return train(tx, jax.jit(tx.apply))

    twin = expected()
    for params, state in run_in_threads(work):
        twin.assert_same(params, state, "threads")


def test_first_steps_at_once():
    in_own_process(check_first_steps)


def check_two_calls_of_a_program():
    """XLA may run both at the same time, on threads of its own."""
    use_threads()
    tx = adamax(**SETTINGS, weight_decay=0.1)

    @jax.jit
    def two(params, grads, states):
        done = [tx.apply(p, grads, s) for p, s in zip(params, states, strict=True)]
        return [p for p, _ in done], [s for _, s in done]

    params = [on_device(host_weights()) for _ in range(2)]
    states = [tx.init(p) for p in params]
    for t in range(STEPS):
        params, states = two(params, on_device(host_grads(t)), states)
    twin = expected()
    for p, s in zip(params, states, strict=True):
        twin.assert_same(p, s, "two calls")


def test_two_calls_in_one_program():
    in_own_process(check_two_calls_of_a_program)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_threads_of_our_own(count):
    adamax_ext.set_num_threads(count)
    tx = adamax(**SETTINGS, weight_decay=0.1)
    expected().assert_same(*on_host(train(tx, jax.jit(tx.apply))), f"{count} threads")


def check_changing_threads():
    """The number of threads is changed while steps are in flight."""
    use_threads()
    tx = adamax(**SETTINGS, weight_decay=0.1)
    step = jax.jit(tx.apply, donate_argnums=(0, 2))
    counts = iter([1, 4, 2, 3] * STEPS)
    twin = expected()
    twin.assert_same(
        *train(tx, step, lambda: adamax_ext.set_num_threads(next(counts))), "changing threads"
    )


def test_the_number_of_threads_changes_meanwhile():
    in_own_process(check_changing_threads)


def test_steps_in_flight_beside_numpy():
    """A step of `adamax_ext.update` runs while JAX's are not done."""
    tx = adamax(**SETTINGS, weight_decay=0.1)
    arrays = [np.ones(5000, np.float32) for _ in range(4)]

    def others():
        adamax_ext.update(*arrays, step=1)

    expected().assert_same(*train(tx, jax.jit(tx.apply), others), "steps in flight")

"""Where a step in JAX writes: into donated arrays, without a copy, and into no other."""

import re

import numpy as np
import pytest
from support.jax_runs import (
    SETTINGS,
    adamax,
    assert_same_trees,
    grads_like,
    jax,
    jnp,
    on_device,
    on_host,
    weights,
    x64,
)

DECAY = SETTINGS | {"weight_decay": 0.1}


def places(*trees):
    """Return the addresses of arrays that have elements."""
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(trees) if array.size]


def compiled_text(step, *args):
    return step.lower(*args).compile().as_text()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_donated_arrays_are_overwritten(dtype):
    with x64(dtype == "float64"):
        tx = adamax(**DECAY)
        step = jax.jit(tx.apply, donate_argnums=(0, 2))
        host = weights(dtype=dtype, large=True)
        params = on_device(host)
        state = tx.init(params)
        where = places(params, state)
        assert len(set(where)) == len(where)
        for t in range(5):
            given = jax.tree.leaves((params, state))
            grads = on_device(grads_like(host, t))
            params, state = step(params, grads, state)
            assert places(params, state) == where
            assert all(array.is_deleted() for array in given if array.size)
            assert not any(array.is_deleted() for array in jax.tree.leaves(grads))


def test_a_schedule_and_an_array_as_rate_do_not_move_anything():
    for rate in (lambda count: 0.1 / (1 + count), jnp.array(0.1)):
        tx = adamax(rate)
        params = on_device(weights())
        state = tx.init(params)
        where = places(params, state)
        step = jax.jit(tx.apply, donate_argnums=(0, 2))
        for t in range(3):
            params, state = step(params, on_device(grads_like(weights(), t)), state)
            assert places(params, state) == where


def test_the_compiled_step_is_one_call_and_no_copy():
    tx = adamax(**DECAY)
    params = on_device(weights())
    step = jax.jit(tx.apply, donate_argnums=(0, 2))
    text = compiled_text(step, params, params, tx.init(params))
    assert len(re.findall(r'custom_call_target="adamax_ext_step"', text)) == 1
    # XLA makes the arrays without elements anew.
    assert not re.findall(r"= \w+\[(?!0,3\])[\d,]+\]\S* copy(?:-start)?\(", text)
    assert "copy(" in text
    aliased = text.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
    leaves = len(jax.tree.leaves((params, tx.init(params))))
    assert len(re.findall(r"(?:may|must)-alias", aliased)) == leaves


def test_numbers_are_built_in():
    """Also 0: on a GPU an array other than the rate is refused."""
    params = on_device(weights())
    tx = adamax(0.1)
    text = jax.jit(tx.apply).lower(params, params, tx.init(params)).as_text()
    for name in ("learning_rate", "b1", "b2", "eps", "weight_decay"):
        assert re.search(rf"\b{name} = [\d.e+-]+ : f64", text), name


def test_a_loop_does_not_copy():
    tx = adamax(**DECAY)
    params = on_device({"a": np.ones((64, 3), np.float32), "b": np.ones(5, np.float32)})
    grads = jax.tree.map(lambda w: jnp.stack([w] * 6), params)

    def train(params, state, grads):
        def body(carry, grad):
            return tx.apply(carry[0], grad, carry[1]), None

        return jax.lax.scan(body, (params, state), grads)[0]

    step = jax.jit(train, donate_argnums=(0, 1))
    text = compiled_text(step, params, tx.init(params), grads)
    assert not re.findall(r"= f32\[64,3\]\S* copy\(", text)


def test_without_donation_nothing_given_is_changed():
    tx = adamax(**DECAY)
    host = weights(large=True)
    params, grads = on_device(host), on_device(grads_like(host, 0))
    state = tx.init(params)
    before = on_host((params, grads, state))
    copies = jax.tree.map(np.copy, before)
    for call in (tx.apply, jax.jit(tx.apply), lambda p, g, s: tx.update(g, s, p)):
        results = call(params, grads, state)
        jax.block_until_ready(results)
        assert_same_trees((params, grads, state), copies)
        assert not set(places(results)) & set(places(params, grads, state))


def test_arrays_that_are_given_twice():
    tx = adamax(**SETTINGS)
    w = jnp.linspace(-1, 1, 1001)
    params = {"a": w, "b": w}
    new, _ = jax.jit(tx.apply)(params, params, tx.init(params))
    assert_same_trees(new["a"], new["b"])
    alone, _ = tx.apply(w, w, tx.init(w))
    assert_same_trees(new["a"], alone)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        *(("float16", "float32"), ("bfloat16", "float32")),
        *(("float32", "float32"), ("float64", "float64")),
    ],
)
def test_the_state_is_float32_or_wider(dtype, state_dtype):
    with x64(dtype == "float64"):
        tx = adamax(**SETTINGS)
        params = on_device(weights(dtype=dtype))
        state = tx.init(params)
        for now in (state, tx.apply(params, params, state)[1]):
            assert {a.dtype.name for a in jax.tree.leaves((now.mu, now.nu))} == {state_dtype}
            assert now.count.dtype == np.int32


def test_arrays_in_another_memory_order():
    if jax.__version_info__ < (0, 7):
        pytest.skip("needs the layouts of jax 0.7")
    from jax.experimental import layout

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    columns = layout.Format(layout.Layout(major_to_minor=(1, 0)), device)
    rng = np.random.default_rng(0)
    host = rng.normal(size=(37, 11)).astype(np.float32)
    tx = adamax(**DECAY)
    expected = tx.apply(jnp.array(host), jnp.array(host), tx.init(jnp.array(host)))
    other = jax.device_put(host, columns)
    assert_same_trees(tx.apply(other, jnp.array(host), tx.init(other)), expected)
    assert_same_trees(jax.jit(tx.apply)(jnp.array(host), other, tx.init(other)), expected)

"""vmap of a step in JAX: each member as if alone, with its own step number and rate."""

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
    weights,
)

MEMBERS = 3
TX = adamax(**SETTINGS, weight_decay=0.1)


def stacked(make):
    """Return the trees of all members as one, on a new first axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(make, range(MEMBERS)))


def member(tree, i):
    return jax.tree.map(lambda array: array[i], tree)


PARAMS = stacked(lambda i: on_device(weights(i)))
GRADS = stacked(lambda i: on_device(grads_like(weights(), i)))


def states(counts):
    """Return states that have seen a step; members differ in their number of steps."""
    _, state = jax.vmap(TX.apply)(PARAMS, GRADS, jax.vmap(TX.init)(PARAMS))
    return state._replace(count=jnp.array(counts, jnp.int32))


def assert_as_one_by_one(results, expected):
    assert_same_trees(results, stacked(expected))


@pytest.mark.parametrize("counts", [(1, 1, 1), (0, 7, 100)])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_members_are_as_if_alone(transform, counts):
    state = states(counts)
    results = transform(jax.vmap(TX.apply))(PARAMS, GRADS, state)
    assert results[1].count.tolist() == [n + 1 for n in counts]
    assert_as_one_by_one(
        results, lambda i: TX.apply(member(PARAMS, i), member(GRADS, i), member(state, i))
    )


def test_updates():
    state = states((0, 3, 5))
    results = jax.vmap(TX.update)(GRADS, state, PARAMS)
    assert_as_one_by_one(
        results, lambda i: TX.update(member(GRADS, i), member(state, i), member(PARAMS, i))
    )


# Which of params, grads, count, mu and nu have an axis of members.
PARTLY = [(0, 0, 0, 1, 1), (1, 0, 0, 1, 1), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (1, 1, 0, 1, 1)]


@pytest.mark.parametrize("batched", [*PARTLY, (0, 0, 0, 1, 0)])
def test_what_has_no_axis_is_shared(batched):
    state = states((0, 7, 100))
    all_ = [PARAMS, GRADS, state.count, state.mu, state.nu]
    given = [x if has_axis else member(x, 1) for x, has_axis in zip(all_, batched, strict=True)]

    def apply(params, grads, count, mu, nu):
        return TX.apply(params, grads, type(state)(count, mu, nu))

    axes = tuple(0 if has_axis else None for has_axis in batched)
    results = jax.jit(jax.vmap(apply, in_axes=axes))(*given)
    assert_as_one_by_one(
        results,
        lambda i: apply(
            *(member(x, i if has_axis else 1) for x, has_axis in zip(all_, batched, strict=True))
        ),
    )


def test_axes_that_are_not_the_first():
    axes = jax.tree.map(lambda array: array.ndim - 1, PARAMS)
    moved = jax.tree.map(lambda array, axis: jnp.moveaxis(array, 0, axis), PARAMS, axes)
    state = states((1, 2, 3))
    results = jax.vmap(TX.apply, in_axes=(axes, 0, 0))(moved, GRADS, state)
    assert_same_trees(results, jax.vmap(TX.apply)(PARAMS, GRADS, state))


def test_rates_of_members():
    rates = jnp.array([0.1, 0.02, 0.3])

    def apply(rate, params, grads, state):
        return adamax(rate, 0.8).apply(params, grads, state)

    state = states((0, 7, 100))
    results = jax.jit(jax.vmap(apply))(rates, PARAMS, GRADS, state)
    assert_as_one_by_one(results, lambda i: apply(*member((rates, PARAMS, GRADS, state), i)))


def test_schedules_of_members():
    tx = adamax(lambda count: 0.1 / (1 + count))
    state = states((0, 7, 100))
    results = jax.vmap(tx.apply)(PARAMS, GRADS, state)
    assert_as_one_by_one(
        results, lambda i: tx.apply(member(PARAMS, i), member(GRADS, i), member(state, i))
    )


def test_nested():
    state = states((0, 7, 100))
    two = jax.tree.map(lambda array: jnp.stack([array, array[::-1]]), (PARAMS, GRADS, state))
    results = jax.jit(jax.vmap(jax.vmap(TX.apply)))(*two)
    for i, order in enumerate((slice(None), slice(None, None, -1))):
        given = jax.tree.map(lambda array, order=order: array[order], (PARAMS, GRADS, state))
        assert_same_trees(member(results, i), jax.vmap(TX.apply)(*given))


def test_of_a_scan_and_a_scan_of_it():
    def train(params, state, grads):
        def body(carry, _):
            return TX.apply(carry[0], grads, carry[1]), None

        return jax.lax.scan(body, (params, state), None, length=4)[0]

    def train_all(params, state, grads):
        def body(carry, _):
            return jax.vmap(TX.apply)(carry[0], grads, carry[1]), None

        return jax.lax.scan(body, (params, state), None, length=4)[0]

    state = states((0, 7, 100))
    results = jax.jit(jax.vmap(train))(PARAMS, state, GRADS)
    assert_as_one_by_one(results, lambda i: train(*member((PARAMS, state, GRADS), i)))
    assert_same_trees(jax.jit(train_all)(PARAMS, state, GRADS), results)


def test_no_members_and_members_of_nothing():
    none = jax.tree.map(lambda array: array[:0], (PARAMS, GRADS, states((1, 2, 3))))
    params, state = jax.vmap(TX.apply)(*none)
    assert state.count.shape == (0,)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, none[0])
    _, state = jax.vmap(TX.apply)({}, {}, jax.vmap(TX.init, axis_size=3)({}))
    assert state.count.tolist() == [1, 1, 1]


def test_a_batch_without_vmap_is_refused():
    """One step number for all members would be silently wrong."""
    with pytest.raises(ValueError, match=r"count must be one int32; received int32\[3\]"):
        TX.apply(PARAMS, GRADS, states((1, 1, 1)))


def test_differentiating_a_batch_is_refused():
    state = states((1, 1, 1))
    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(lambda w: jax.vmap(TX.apply)(w, GRADS, state)[0]["rest"][0].sum())(PARAMS)


def test_numbers_of_members_as_numpy_arrays():
    state = states((2, 3, 4))
    state = state._replace(count=np.asarray(state.count))
    results = jax.vmap(TX.apply)(PARAMS, GRADS, state)
    assert results[1].count.tolist() == [3, 4, 5]

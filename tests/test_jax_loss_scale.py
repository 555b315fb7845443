"""`apply(..., loss_scale)` of JAX divides the gradients within the step."""

import adamax_ext
import numpy as np
import pytest
from support.jax_runs import (
    SETTINGS,
    Twin,
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

STEPS = 5
STEP = {"step": 1, "learning_rate": 0.1}


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", [float, np.float64, np.array, jnp.float32], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_has_the_bits_of_a_scaled_update(dtype, kind, way):
    host = weights(dtype=dtype)
    twin, ours = Twin(host, **SETTINGS), on_device(host)
    tx = adamax(**SETTINGS)
    state = tx.init(ours)
    apply = way(tx.apply) if kind is jnp.float32 else tx.apply
    for t in range(STEPS):
        scale = 3.0 + t
        grads = grads_like(host, t)
        ours, state = apply(ours, on_device(grads), state, kind(scale))
        twin.step(grads, grad_scale=1 / scale)
    twin.assert_same(*on_host((ours, state)), "scaled steps")


def test_an_array_of_another_dtype_or_shape_is_one_number():
    host = weights()
    tx = adamax(**SETTINGS)
    grads = on_device(grads_like(host, 0))

    def step(scale):
        return tx.apply(on_device(host), grads, tx.init(host), scale)[0]

    expected = step(3.0)
    with x64():
        for scale in (jnp.full((1, 1), 3), jnp.array([3.0], jnp.float16), jnp.float64(3.0)):
            assert_same_trees(on_host(step(scale)), on_host(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_array_that_is_not_finite_makes_all_weights_nan(bad):
    host = weights()
    tx = adamax(**SETTINGS)
    grads = on_device(grads_like(host, 0))
    for step in (tx.apply, jax.jit(tx.apply)):
        params, state = step(on_device(host), grads, tx.init(host), jnp.float32(bad))
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(on_host(params)))
        assert int(state.count) == 1


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, np.nan, np.inf, "3"])
def test_numbers_out_of_range_are_refused(bad):
    params = {"w": jnp.ones(3)}
    tx = adamax(0.1)
    with pytest.raises((TypeError, ValueError), match="loss_scale must be a number > 0"):
        tx.apply(params, params, tx.init(params), bad)


def test_more_than_one_number_is_refused():
    params = {"w": jnp.ones(3)}
    tx = adamax(0.1)
    with pytest.raises(ValueError, match="loss_scale must be a real number or an array of one"):
        tx.apply(params, params, tx.init(params), jnp.ones(2))


def test_a_scaled_update_of_arrays_still_wants_a_number():
    arrays = [np.ones(3, np.float32) for _ in range(4)]
    with pytest.raises(ValueError, match="grad_scale must be"):
        adamax_ext.update(*arrays, **STEP, grad_scale=np.nan)

"""A step in JAX has the bits of `adamax_ext.update`: parameters, moments and step number."""

import numpy as np
import pytest
from support.bits import assert_same_bits, every_pair
from support.jax_runs import (
    RULES,
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

STEPS = 20


def check_steps(params, settings, *, grad_dtype=None, steps=STEPS, init=None):
    """Donate to jitted steps, and compare after each."""
    tx, twin = adamax(**settings), Twin(params, **settings)
    step = jax.jit(tx.apply, donate_argnums=(0, 2))
    ours = on_device(params)
    state = tx.init(ours)
    for t in range(steps):
        grads = grads_like(params, t, grad_dtype)
        ours, state = step(ours, on_device(grads), state)
        twin.step(grads)
        twin.assert_same(ours, state, f"step {t}")


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_jitted_steps(rules):
    check_steps(weights(large=True), SETTINGS | rules)


def test_defaults():
    check_steps(weights(), {"learning_rate": 0.01})


@every_pair
def test_storages(param, grad):
    with x64(param == "float64"):
        rules = {"weight_decay": 0.1, "epsilon_mode": "outside"}
        check_steps(weights(dtype=param), SETTINGS | rules, grad_dtype=grad, steps=4)


def test_a_tree_of_several_dtypes():
    half, single = weights(dtype="float16"), weights()
    check_steps({"a": half, "b": single, "c": half["layers"]}, SETTINGS, steps=4)


@pytest.mark.parametrize("params", [{}, (), None, {"a": np.zeros((0, 4), np.float32)}])
def test_trees_without_elements_are_counted(params):
    check_steps(params, SETTINGS, steps=3)


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 1023, 4097])
def test_sizes(size):
    check_steps([np.linspace(-1, 1, size, dtype=np.float32)], SETTINGS, steps=2)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_special_values(rules):
    info = np.finfo(np.float32)
    values = np.array(
        [0.0, -0.0, np.nan, np.inf, -np.inf, info.max, info.tiny, info.smallest_subnormal, -1.5],
        np.float32,
    )
    params, grads = (np.array(a) for a in np.meshgrid(values, values))
    tx, twin = adamax(**SETTINGS, **rules), Twin(params, **SETTINGS, **rules)
    ours = jnp.array(params)
    state = tx.init(ours)
    for t in range(3):
        ours, state = jax.jit(tx.apply)(ours, jnp.array(grads), state)
        twin.step(grads)
        twin.assert_same(ours, state, f"step {t}")


# ---- In JAX's loops and modes --------------------------------------------------------------------


def test_scan():
    params, tx, twin = weights(), adamax(**SETTINGS), Twin(weights(), **SETTINGS)
    grads = [grads_like(params, t) for t in range(STEPS)]

    @jax.jit
    def train(params, state, grads):
        def body(carry, grad):
            return tx.apply(carry[0], grad, carry[1]), None

        return jax.lax.scan(body, (params, state), grads)[0]

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *grads)
    ours, state = train(on_device(params), tx.init(on_device(params)), stacked)
    for grad in grads:
        twin.step(grad)
    twin.assert_same(ours, state, "a scan")


def test_loops_and_branches():
    params, tx, twin = weights(), adamax(**SETTINGS), Twin(weights(), **SETTINGS)
    grads = on_device(grads_like(params, 0))

    @jax.jit
    def train(params, steps):
        def body(i, carry):
            return jax.lax.cond(
                i % 2 == 0, lambda c: tx.apply(c[0], grads, c[1]), lambda c: c, carry
            )

        return jax.lax.fori_loop(0, steps, body, (params, tx.init(params)))

    ours, state = train(on_device(params), 7)
    for _ in range(4):
        twin.step(on_host(grads))
    twin.assert_same(ours, state, "a loop")


def test_eager_steps_and_disabled_jit():
    params, tx, twin = weights(), adamax(**SETTINGS), Twin(weights(), **SETTINGS)
    ours, state = on_device(params), tx.init(on_device(params))
    for t in range(4):
        grads = grads_like(params, t)
        with jax.disable_jit(t % 2 == 1):
            ours, state = tx.apply(ours, on_device(grads), state)
        twin.step(grads)
        twin.assert_same(ours, state, f"step {t}")


def test_state_that_is_made_in_the_same_program():
    """Where the two moments begin as one constant, and gradients are the parameters."""
    params, twin = weights(), Twin(weights(), **SETTINGS)
    tx = adamax(**SETTINGS)
    ours, state = jax.jit(lambda p: tx.apply(p, p, tx.init(p)))(on_device(params))
    twin.step(params)
    twin.assert_same(ours, state, "a step")


def test_numbers_and_arrays_of_numpy_as_leaves():
    params = {"a": 1.5, "b": np.float32(0.5), "c": np.ones((2, 3), np.float32), "d": np.ones(3)}
    grads = {"a": -0.3, "b": np.float32(0.7), "c": np.ones((2, 3), np.float32), "d": np.ones(3)}
    single = [jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (params, grads)]
    tx, twin = adamax(**SETTINGS), Twin(single[0], **SETTINGS)
    state = tx.init(params)
    for t in range(2):
        params, state = tx.apply(params, grads, state)
        twin.step(single[1])
        twin.assert_same(params, state, f"step {t}")


# ---- The step number -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 2**24, 2**31 - 2, 2**31 - 1])
def test_the_count_is_raised_to_the_largest_and_stays(before):
    params = {"w": np.ones(3, np.float32)}
    settings = SETTINGS | {"b1": 1 - 2.0**-30}  # for which late steps are still not alike
    tx, twin = adamax(**settings), Twin(params, **settings)
    twin.count = before
    state = tx.init(on_device(params))._replace(count=jnp.array(before, jnp.int32))
    ours, state = jax.jit(tx.apply)(on_device(params), on_device(params), state)
    twin.step(params)
    twin.count = min(twin.count, 2**31 - 1)
    twin.assert_same(ours, state, "a step")


# ---- update, and the updates applied -------------------------------------------------------------


def train_by_updates(params, settings, *, with_params=True, grad_dtype=None, atol=None):
    tx, twin = adamax(**settings), Twin(params, **settings)

    @jax.jit
    def step(params, grads, state):
        updates, state = tx.update(grads, state, params if with_params else None)
        return jax.tree.map(lambda w, update: w + update, params, updates), state

    ours = on_device(params)
    state = tx.init(ours)
    for t in range(STEPS):
        grads = grads_like(params, t, grad_dtype)
        updates, _ = tx.update(on_device(grads), state, ours)
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda w: w.dtype, ours)
        ours, state = step(ours, on_device(grads), state)
        twin.step(grads)
        twin.assert_same(ours, state, f"step {t}", atol)
        if atol is not None:  # or roundings of many steps add up
            twin.params = [np.array(w) for w in jax.tree.leaves(on_host(ours))]


@pytest.mark.parametrize("with_params", [True, False])
@pytest.mark.parametrize("mode", ["inside", "outside"])
def test_updates_without_decay_are_the_step(mode, with_params):
    train_by_updates(weights(), SETTINGS | {"epsilon_mode": mode}, with_params=with_params)


@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_updates_with_decay_are_the_step_but_for_a_rounding(decay):
    rules = {"weight_decay": 0.213, "decay": decay}
    train_by_updates(weights(), SETTINGS | rules, atol=np.spacing(np.float32(4)))


def test_updates_of_16_bit_gradients_without_parameters():
    grads = {"w": jnp.array([0.5, -3.0], jnp.float16)}
    tx = adamax(**SETTINGS)
    state = tx.init({"w": jnp.zeros(2)})
    updates, state = tx.update(grads, state)
    assert updates["w"].dtype == np.float16
    expected, _ = tx.apply({"w": jnp.zeros(2)}, grads, tx.init({"w": jnp.zeros(2)}))
    assert_same_bits(np.asarray(updates["w"]), np.asarray(expected["w"], np.float16), "updates")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_have_the_dtypes_of_the_parameters(decay):
    tx = adamax(**SETTINGS, weight_decay=decay)
    params = {"half": jnp.ones(3, jnp.float16), "brain": jnp.ones(3, jnp.bfloat16)}
    grads = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    updates, state = tx.update(grads, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype.name, updates) == {"half": "float16", "brain": "bfloat16"}
    assert state.mu["half"].dtype == np.float32


def test_results_have_the_tree_of_the_parameters():
    params = weights()
    tx = adamax(**SETTINGS)
    state = tx.init(params)
    new, after = tx.apply(params, grads_like(params, 0), state)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert after._fields == ("count", "mu", "nu")
    assert_same_trees(state, tx.init(params))  # of which nothing was changed

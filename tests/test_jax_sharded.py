"""Arrays in shards on two devices: each steps its own, nothing is gathered, and the bits are same.

The devices are two of the CPU, in a process of its own.
"""

import re

import pytest
from support import jax_devices
from support.jax_runs import Twin, adamax, assert_same_trees, grads_like, jax, jnp, on_host
from support.jax_shards import (
    COLLECTIVE,
    KINDS,
    SETTINGS,
    SPECS,
    STEPS,
    NamedSharding,
    P,
    assert_as_on_the_host,
    assert_cut,
    host_weights,
    shardings,
)


def check_jit(kind, shape, names, specs, donates, rate=None):
    assert jax.device_count() == 2
    mesh = KINDS[kind](shape, names)
    where = shardings(mesh, specs)
    tx = adamax(**SETTINGS if rate is None else SETTINGS | {"learning_rate": rate})
    params = jax.device_put(host_weights(), where)
    state = tx.init(params)
    step = jax.jit(tx.apply, donate_argnums=(0, 2) if donates else ())
    grads = jax.device_put(grads_like(host_weights(), 0), where)
    assert not COLLECTIVE.search(step.lower(params, grads, state).compile().as_text())
    for t in range(STEPS):
        grads = jax.device_put(grads_like(host_weights(), t), where)
        places = [s.data.unsafe_buffer_pointer() for s in params["kernel"].addressable_shards]
        params, state = step(params, grads, state)
        after = [s.data.unsafe_buffer_pointer() for s in params["kernel"].addressable_shards]
        assert t == 0 or (places == after) == donates  # JAX may have borrowed NumPy's memory
        for tree in (params, state.mu, state.nu):
            assert_cut(tree, specs)
        assert state.count.sharding.is_fully_replicated
    if rate is None:
        assert_as_on_the_host(params, state)
    return on_host((params, state))


@pytest.mark.parametrize("donates", [True, False], ids=["donates", "keeps"])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_keeps_the_shards(kind, donates):
    jax_devices.run(check_jit, kind, (2,), ("x",), SPECS, donates)


TWO_AXES = {"kernel": P("x", "y"), "columns": P("y", "x"), "bias": P(("x", "y"))}
TWO_AXES |= {"gain": P(), "whole": P()}


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_of_two_axes(kind, shape):
    jax_devices.run(check_jit, kind, shape, ("x", "y"), TWO_AXES, True)


def schedule(count):
    return 0.1 / (1 + count)


def test_a_schedule():
    twin = Twin(host_weights(), **SETTINGS)
    for t in range(STEPS):
        rate = float(schedule(jnp.array(t, jnp.int32)))
        twin.step(grads_like(host_weights(), t), learning_rate=rate)
    for kind in KINDS:
        results = jax_devices.run(check_jit, kind, (2,), ("x",), SPECS, True, schedule)
        twin.assert_same(*results, kind)


def check_init():
    mesh = KINDS["Auto"]((2,), ("x",))
    params = jax.device_put(host_weights(), shardings(mesh, SPECS))
    state = adamax(**SETTINGS).init(params)
    assert_cut(state.mu, SPECS)
    assert_cut(state.nu, SPECS)


def test_init_has_the_shards_of_the_parameters():
    jax_devices.run(check_init)


def check_updates():
    where = shardings(KINDS["Auto"]((2,), ("x",)), SPECS)
    tx = adamax(**SETTINGS)
    params = jax.device_put(host_weights(), where)
    grads = jax.device_put(grads_like(host_weights(), 0), where)
    step = jax.jit(tx.update)
    state = tx.init(params)
    assert not COLLECTIVE.search(step.lower(grads, state, params).compile().as_text())
    updates, state = step(grads, state, params)
    assert_cut(updates, SPECS)
    assert_same_trees(updates, tx.update(*map(on_host, (grads, tx.init(params), params)))[0])


def test_updates_have_the_shards_of_the_parameters():
    jax_devices.run(check_updates)


def check_zero_1():
    """The state is cut, and parameters and gradients are on both devices."""
    mesh = KINDS["Auto"]((2,), ("x",))
    whole = shardings(mesh, dict.fromkeys(SPECS, P()))
    tx = adamax(**SETTINGS)
    params = jax.device_put(host_weights(), whole)
    state = tx.init(params)
    cut = shardings(mesh, SPECS)
    state = state._replace(mu=jax.device_put(state.mu, cut), nu=jax.device_put(state.nu, cut))
    count = NamedSharding(mesh, P())
    step = jax.jit(tx.apply, out_shardings=(whole, type(state)(count, cut, cut)))
    for t in range(STEPS):
        grads = jax.device_put(grads_like(host_weights(), t), whole)
        params, state = step(params, grads, state)
        assert_cut(state.mu, SPECS)
        assert params["kernel"].sharding.is_fully_replicated
    assert_as_on_the_host(params, state)
    text = step.lower(params, grads, state).compile().as_text()
    assert set(COLLECTIVE.findall(text)) == {"all-gather"}  # of the parameters
    assert len(re.findall(r"f32\[4,6\]\S* all-gather\(", text)) == 1
    free = jax.jit(tx.apply)(params, grads, state)
    assert_same_trees(*map(on_host, (free, step(params, grads, state))))


def test_state_in_shards_and_parameters_whole():
    jax_devices.run(check_zero_1)


def check_gradients_elsewhere():
    """Of another sharding than their parameters, and of one that the compiler chooses."""
    mesh = KINDS["Auto"]((2,), ("x",))
    tx = adamax(**SETTINGS)
    params = jax.device_put(host_weights(), shardings(mesh, SPECS))
    state = tx.init(params)
    others = {"kernel": P(None, "x"), "columns": P(), "bias": P(), "gain": P(), "whole": P()}

    @jax.jit
    def step(params, grads, state):
        halves = jax.tree.map(lambda g: 0.5 * g, grads)
        return tx.apply(params, jax.tree.map(jnp.add, halves, halves), state)

    for t in range(STEPS):
        grads = jax.device_put(grads_like(host_weights(), t), shardings(mesh, others))
        params, state = step(params, grads, state)
    assert_as_on_the_host(params, state)


def test_gradients_in_other_shards():
    jax_devices.run(check_gradients_elsewhere)


def check_one_that_is_cut(which):
    """Among whole arrays: the step follows it, and gathers nothing."""
    mesh = KINDS["Auto"]((2,), ("x",))
    tx = adamax(**SETTINGS)
    cut, whole = shardings(mesh, SPECS), shardings(mesh, dict.fromkeys(SPECS, P()))
    params = jax.device_put(host_weights(), whole)
    state = tx.init(params)
    grads = jax.device_put(grads_like(host_weights(), 0), cut if which == "grads" else whole)
    outputs = {}
    if which == "results":
        outputs = {"out_shardings": (cut, type(state)(NamedSharding(mesh, P()), cut, cut))}
    step = jax.jit(tx.apply, **outputs)
    text = step.lower(params, grads, state).compile().as_text()
    assert not COLLECTIVE.search(text)
    (call,) = (line for line in text.splitlines() if "adamax_ext_step" in line)
    assert "f32[2,6]" in call
    assert "f32[4,6]" not in call
    params, state = step(params, grads, state)
    assert_cut(params, SPECS)
    assert_as_on_the_host(params, state, steps=1)


@pytest.mark.parametrize("which", ["grads", "results"])
def test_one_array_of_a_leaf_in_shards(which):
    jax_devices.run(check_one_that_is_cut, which)


def check_uneven():
    """Shards of 4 and 3 elements, of which XLA pads the second."""
    sharding = NamedSharding(KINDS["Auto"]((2,), ("x",)), P("x"))
    tx, w = adamax(**SETTINGS), jnp.linspace(-1, 1, 7)

    @jax.jit
    def step(w, state):
        w = jax.lax.with_sharding_constraint(w, sharding)
        return tx.apply(w, w, state)

    assert_same_trees(*map(on_host, (step(w, tx.init(w)), tx.apply(w, w, tx.init(w)))))


def test_uneven_shards():
    jax_devices.run(check_uneven)

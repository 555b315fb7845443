"""Arrays in shards on two devices: each steps its own, nothing is gathered, and the bits are same.

The devices are two of the CPU, in a process of its own.
"""

import re

import numpy as np
import pytest
from support import jax_devices
from support.jax_runs import (
    FAILED,
    SETTINGS,
    Twin,
    adamax,
    assert_same_trees,
    grads_like,
    jax,
    jnp,
    on_host,
    trained_twin,
)

AxisType, Mesh, NamedSharding, P = (
    getattr(jax.sharding, name) for name in ("AxisType", "Mesh", "NamedSharding", "PartitionSpec")
)

STEPS = 4
SETTINGS = SETTINGS | {"weight_decay": 0.1}
SPECS = {"kernel": P("x", None), "columns": P(None, "x"), "bias": P("x"), "gain": P(), "whole": P()}
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)")
KINDS = {
    "Mesh": lambda shape, names: Mesh(np.array(jax.devices()).reshape(shape), names),
    "Auto": lambda shape, names: jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names)
    ),
    "Explicit": lambda shape, names: jax.make_mesh(
        shape, names, axis_types=(AxisType.Explicit,) * len(names)
    ),
}


def host_weights():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 6), "columns": (6, 8), "bias": (8,), "gain": (), "whole": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def shardings(mesh, specs):
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def assert_as_on_the_host(params, state, steps=STEPS):
    trained_twin(host_weights(), steps, **SETTINGS).assert_same(*on_host((params, state)), "shards")


def assert_cut(tree, specs):
    for name, array in tree.items():
        expected = NamedSharding(array.sharding.mesh, specs[name])
        assert array.sharding.is_equivalent_to(expected, array.ndim), name


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


# ---- Where the caller says what is on which device -----------------------------------------------


def shard_map(function, **arguments):
    if jax.__version_info__ < (0, 8):  # cannot tell of a native call what is on all devices
        arguments["check_vma"] = False
    return jax.shard_map(function, **arguments)


def state_specs(tx, specs):
    return type(tx.init({}))(P(), specs, specs)


def check_shard_map(kind, **checks):
    mesh = KINDS[kind]((2,), ("x",))
    tx = adamax(**SETTINGS)
    specs = (SPECS, SPECS, state_specs(tx, SPECS))
    step = jax.jit(shard_map(tx.apply, mesh=mesh, in_specs=specs, out_specs=specs[::2], **checks))
    params = jax.device_put(host_weights(), shardings(mesh, SPECS))
    state = tx.init(params)
    for t in range(STEPS):
        grads = jax.device_put(grads_like(host_weights(), t), shardings(mesh, SPECS))
        params, state = step(params, grads, state)
    assert_as_on_the_host(params, state)
    assert not COLLECTIVE.search(step.lower(params, grads, state).compile().as_text())


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map, of jax 0.6.1")
@pytest.mark.parametrize("kind", KINDS)
def test_shard_map(kind):
    jax_devices.run(check_shard_map, kind)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map, of jax 0.6.1")
def test_shard_map_without_checks():
    jax_devices.run(check_shard_map_without_checks)


def check_shard_map_without_checks():
    check_shard_map("Auto", check_vma=False)


def check_partial_shard_map():
    """Over one of two axes: an error, and not wrong numbers."""
    mesh = KINDS["Auto"]((2, 1), ("x", "y"))
    tx = adamax(**SETTINGS)
    specs = (SPECS, SPECS, state_specs(tx, SPECS))
    mapped = jax.shard_map(
        tx.apply, mesh=mesh, in_specs=specs, out_specs=specs[::2], axis_names={"x"}
    )
    with pytest.raises((*FAILED, NotImplementedError), match=r"\w"):
        jax.jit(mapped)(host_weights(), grads_like(host_weights(), 0), tx.init(host_weights()))


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map, of jax 0.6.1")
def test_shard_map_over_some_axes_is_refused():
    jax_devices.run(check_partial_shard_map)


def check_vmap_over_shards():
    """Members on two devices: wherever they are computed, they are as if alone."""
    mesh = KINDS["Auto"]((2,), ("x",))
    tx = adamax(**SETTINGS)
    members = jax.tree.map(lambda w: np.stack([w, 2 * w]), host_weights())
    state = jax.vmap(tx.init)(members)
    expected = jax.vmap(tx.apply)(members, members, state)
    cut = jax.device_put((members, members, state), NamedSharding(mesh, P("x")))
    assert_same_trees(*map(on_host, (jax.jit(jax.vmap(tx.apply))(*cut), expected)))


def test_vmap_over_members_on_two_devices():
    jax_devices.run(check_vmap_over_shards)


def check_pmap():
    tx = adamax(**SETTINGS)
    members = jax.tree.map(lambda w: np.stack([w, 2 * w]), host_weights())
    state = jax.vmap(tx.init)(members)
    expected = jax.vmap(tx.apply)(members, members, state)
    assert_same_trees(*map(on_host, (jax.pmap(tx.apply)(members, members, state), expected)))


def test_pmap():
    jax_devices.run(check_pmap)

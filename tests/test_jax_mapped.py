"""A step in JAX where the caller says what is on which device: shard_map, vmap of shards, pmap.

The devices are two of the CPU, in a process of its own.
"""

import numpy as np
import pytest
from support import jax_devices
from support.jax_runs import FAILED, adamax, assert_same_trees, grads_like, jax, on_host
from support.jax_shards import (
    COLLECTIVE,
    KINDS,
    SETTINGS,
    SPECS,
    STEPS,
    NamedSharding,
    P,
    assert_as_on_the_host,
    host_weights,
    shardings,
)

needs_shard_map = pytest.mark.skipif(
    not hasattr(jax, "shard_map"), reason="needs jax.shard_map, of jax 0.6.1"
)


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


@needs_shard_map
@pytest.mark.parametrize("kind", KINDS)
def test_shard_map(kind):
    jax_devices.run(check_shard_map, kind)


@needs_shard_map
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
        tx.apply, mesh=mesh, in_specs=specs, out_specs=specs[::2], axis_names={"x"}, check_vma=False
    )
    with pytest.raises(FAILED, match="custom_partitioner"):
        jax.jit(mapped)(host_weights(), grads_like(host_weights(), 0), tx.init(host_weights()))


@needs_shard_map
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

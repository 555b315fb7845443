"""Arrays in shards on two devices, and how they are compared with a training on the host."""

import re

import numpy as np

from support.jax_runs import SETTINGS as PLAIN
from support.jax_runs import jax, on_host, trained_twin

AxisType, Mesh, NamedSharding, P = (
    getattr(jax.sharding, name) for name in ("AxisType", "Mesh", "NamedSharding", "PartitionSpec")
)

STEPS = 4
SETTINGS = PLAIN | {"weight_decay": 0.1}
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

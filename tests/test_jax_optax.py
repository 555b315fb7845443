"""Under optax's wrappers a training is that of optax.adamax: parameters and moments."""

import contextlib

import numpy as np
import pytest
from support.frameworks import load_optax
from support.jax_runs import AdamaxState, adamax, assert_same_trees, jax, jnp

optax = load_optax()

STEPS = 12
SETTINGS = {"learning_rate": 0.0371, "b1": 0.83, "b2": 0.957, "eps": 3.1e-5}
RATE = 0.0371


def schedule(count):
    return RATE * 0.8**count


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (13, 7), "bias": (7,)}, "head": {"kernel": (7, 3)}, "gain": ()}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def losses(params, t):
    x = jnp.asarray(np.random.default_rng(t).normal(size=(5, 13)), jnp.float32)
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] * params["gain"] - 1) ** 2)


def gradients(t):
    """Return those of a step: the same for both, or small differences would grow with the steps."""
    return jax.grad(losses)(params_of(), t)


def moments(tree):
    """Return mu and nu from wherever the state of Adamax is."""
    found = []

    def visit(node):
        names = getattr(node, "_fields", ())
        if "mu" in names and "nu" in names:
            found.append({"mu": node.mu, "nu": node.nu})
            return True
        return False

    jax.tree.map(lambda _: None, tree, is_leaf=visit)
    assert found
    return [leaf for state in found for leaf in jax.tree.leaves(state)]


def train(tx, steps=STEPS, change=lambda grads, t: grads, params=None):
    """Return the parameters and the state after a training of `losses`."""
    params = params_of() if params is None else params
    state = tx.init(params)

    @jax.jit
    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, change(gradients(t), t), state)
    return params, state


def assert_close(actual, expected):
    """Within 1e-6 of the largest element."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        largest = np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(largest, 1e-30))


def by_layer(params):
    return {name: jax.tree.map(lambda _, name=name: name, layer) for name, layer in params.items()}


def adamaxw(make, **settings):
    return make(**SETTINGS, weight_decay=0.1, **settings)


WRAPPED = {
    "alone": lambda make: make(**SETTINGS),
    "defaults": lambda make: make(0.01),
    "ascending": lambda make: make(**SETTINGS | {"learning_rate": -0.01}),
    "schedule": lambda make: make(**SETTINGS | {"learning_rate": schedule}),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(0.1), make(**SETTINGS)),
    "named_chain": lambda make: optax.named_chain(
        ("clip", optax.clip(0.01)), ("adamax", make(**SETTINGS)), ("half", optax.scale(0.5))
    ),
    "masked": lambda make: optax.masked(
        make(**SETTINGS), lambda params: jax.tree.map(lambda w: w.ndim > 0, params)
    ),
    "MultiSteps": lambda make: optax.MultiSteps(make(**SETTINGS), every_k_schedule=3),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(**SETTINGS), 5),
    "multi_transform": lambda make: optax.multi_transform(
        {"dense": make(0.01), "head": make(**SETTINGS), "gain": optax.set_to_zero()}, by_layer
    ),
    "partition": lambda make: optax.partition(
        {"dense": make(schedule), "head": optax.sgd(0.1), "gain": make(0.3)}, by_layer
    ),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(**SETTINGS),
    "inject_schedule": lambda make: optax.inject_hyperparams(make)(
        **SETTINGS | {"learning_rate": schedule}
    ),
    "inject_static": lambda make: optax.inject_hyperparams(make, static_args=("b1", "b2", "eps"))(
        **SETTINGS | {"learning_rate": schedule}
    ),
    "with_extra_args_support": lambda make: optax.with_extra_args_support(make(**SETTINGS)),
    "flatten": lambda make: optax.flatten(make(**SETTINGS)),
    "lookahead": lambda make: optax.lookahead(make(**SETTINGS), 3, 0.5),
    "conditionally_mask": lambda make: optax.transforms.conditionally_mask(
        make(**SETTINGS), lambda step, **_: step % 3 != 1
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_as_with_adamax_of_optax(name):
    wrap = WRAPPED[name]
    change = grads_with_nan if name == "apply_if_finite" else lambda grads, t: grads
    runs = []
    for make in (adamax, optax.adamax):
        tx = wrap(make)
        params = params_of()
        if name == "lookahead":
            params = optax.LookaheadParams.init_synced(params)
        runs.append(train(tx, change=change, params=params))
    (ours, our_state), (theirs, their_state) = runs
    assert_close(ours, theirs)
    assert_close(moments(our_state), moments(their_state))
    if name == "apply_if_finite":
        assert int(our_state.total_notfinite) == 2


def grads_with_nan(grads, t):
    if t not in (2, 5):
        return grads
    return jax.tree.map(lambda g: g.at[...].set(jnp.nan), grads)


@pytest.mark.parametrize(
    "wrap",
    [
        adamaxw,
        lambda make: optax.chain(optax.clip_by_global_norm(0.1), adamaxw(make)),
        lambda make: optax.MultiSteps(adamaxw(make), every_k_schedule=2),
        lambda make: optax.inject_hyperparams(make)(**SETTINGS, weight_decay=0.1),
        lambda make: optax.flatten(adamaxw(make)),
    ],
    ids=["alone", "chain", "MultiSteps", "inject_hyperparams", "flatten"],
)
def test_as_with_adamaxw_of_optax(wrap):
    (ours, our_state), (theirs, their_state) = (train(wrap(m)) for m in (adamax, optax.adamaxw))
    assert_close(ours, theirs)
    assert_close(moments(our_state), moments(their_state))


def test_apply_is_update_and_apply_updates_of_optax():
    """The step that is fused, with gradients of the same parameters."""
    tx, theirs = adamax(**SETTINGS, weight_decay=0.1), optax.adamaxw(**SETTINGS, weight_decay=0.1)
    params = params_of()
    state = tx.init(params)
    step = jax.jit(tx.apply, donate_argnums=(0, 2))
    for t in range(STEPS):
        params, state = step(params, gradients(t), state)
    expected, their_state = train(theirs)
    assert_close(params, expected)
    assert_close(moments(state), moments(their_state))
    assert int(state.count) == STEPS


def test_a_state_of_optax_goes_on_here_and_ours_there():
    """The names are the same; optax keeps them in a chain."""
    tx, theirs = adamax(**SETTINGS), optax.adamax(**SETTINGS)
    half, their_state = train(theirs, steps=6)
    inner = their_state[0]
    state = AdamaxState(inner.count, inner.mu, inner.nu)
    expected, _ = train(theirs)
    params, back = half, None
    for t in range(6, STEPS):
        params, state = tx.apply(params, gradients(t), state)
    assert_close(params, expected)
    back = (type(inner)(state.count, state.mu, state.nu), *their_state[1:])
    theirs.update(params, back, params)


def test_what_optax_finds_in_a_state():
    tx = adamax(**SETTINGS)
    params = params_of()
    state = optax.chain(optax.clip(1.0), tx).init(params)
    assert_same_trees(optax.tree_utils.tree_get(state, "mu"), jax.tree.map(jnp.zeros_like, params))
    state = optax.tree_utils.tree_set(state, count=jnp.array(7, jnp.int32))
    assert int(optax.tree_utils.tree_get(state, "count")) == 7
    doubled = optax.tree_utils.tree_map_params(
        tx, lambda leaf: leaf + 1, tx.init(params), transform_non_params=lambda count: count
    )
    assert float(doubled.mu["gain"]) == float(doubled.nu["gain"]) == 1.0
    assert int(doubled.count) == 0


# ---- flax ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def flax_warnings_allowed():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_flax(name):
    with flax_warnings_allowed():
        return pytest.importorskip(name, reason=f"needs {name}, which cannot be imported")


def test_a_train_state_of_flax():
    train_state = load_flax("flax.training.train_state")
    results = []
    for make in (adamax, optax.adamax):
        state = train_state.TrainState.create(
            apply_fn=losses, params=params_of(), tx=make(**SETTINGS)
        )
        step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
        for t in range(STEPS):
            state = step(state, gradients(t))
        results.append(state)
    assert_close(results[0].params, results[1].params)
    assert int(results[0].step) == STEPS


def test_an_optimizer_of_nnx():
    nnx = load_flax("flax.nnx")
    results = []
    with flax_warnings_allowed():
        for make in (adamax, optax.adamax):
            model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, make(**SETTINGS), wrt=nnx.Param)

            @nnx.jit
            def step(model, optimizer, x):
                grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
                optimizer.update(model, grads)

            for t in range(STEPS):
                step(model, optimizer, jnp.full((2, 4), 1.0 + t))
            results.append(nnx.state(model))
    assert_close(results[0], results[1])

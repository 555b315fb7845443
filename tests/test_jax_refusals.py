"""What adamax_ext.jax refuses: it says which argument, what came, and what would be right."""

import importlib

import numpy as np
import pytest
from support.jax_runs import (
    FAILED,
    adamax,
    assert_same_trees,
    grads_like,
    jax,
    jnp,
    on_device,
    weights,
)

TX = adamax(0.1)


# ---- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (TypeError, "learning_rate must be a number.*'fast'", {"learning_rate": "fast"}),
        (TypeError, "learning_rate must be a number.*None", {"learning_rate": None}),
        (TypeError, "learning_rate must be a number.*True", {"learning_rate": True}),
        (TypeError, "learning_rate must be a number.*True", {"learning_rate": np.array(True)}),
        (TypeError, "learning_rate must be a number.*1j", {"learning_rate": np.array([1j])}),
        (TypeError, "learning_rate must be a number.*1., 1.", {"learning_rate": np.ones(2)}),
        (ValueError, "learning_rate must be.*array of one.*1. 1.", {"learning_rate": jnp.ones(2)}),
        (ValueError, "learning_rate must be a number.*nan", {"learning_rate": np.nan}),
        (ValueError, "learning_rate must be a number.*inf", {"learning_rate": np.float32("inf")}),
        (ValueError, r"b1 must be a number in \[0, 1\); received 1.0", {"b1": 1.0}),
        (ValueError, r"b1 must be a number in \[0, 1\); received -0.1", {"b1": -0.1}),
        (ValueError, r"b2 must be a number in \[0, 1\); received 1", {"b2": 1}),
        (ValueError, r"b2 must be a number in \[0, 1\); received nan", {"b2": np.nan}),
        (ValueError, "eps must be a number >= 0; received -1e-08", {"eps": -1e-8}),
        (ValueError, "eps must.*> 0 with.*received 0", {"eps": 0.0, "epsilon_mode": "outside"}),
        (ValueError, "weight_decay must be a number >= 0; received -1", {"weight_decay": -1}),
        (TypeError, r"weight_decay must be a number >= 0; received \[1\]", {"weight_decay": [1]}),
        (ValueError, "eps must be a real number or an array of one", {"eps": jnp.ones((2, 1))}),
        (ValueError, "epsilon_mode must be one of.*'inside'.*'below'", {"epsilon_mode": "below"}),
        (ValueError, "epsilon_mode must be one of.*None", {"epsilon_mode": None}),
        (ValueError, "decay must be one of.*'decoupled'.*'L2'", {"decay": "L2"}),
    ],
)
def test_settings(error, message, settings):
    with pytest.raises(error, match=message):
        adamax(**{"learning_rate": 0.1, **settings})


def test_settings_by_position_are_those_of_optax():
    with pytest.raises(TypeError, match="positional"):
        adamax(0.1, 0.9, 0.999, 1e-8, 0.0, "inside")
    with pytest.raises(ValueError, match="b1 must"):
        adamax(0.1, 5)
    with pytest.raises(ValueError, match="b2 must"):
        adamax(0.1, 0.9, 5)
    with pytest.raises(ValueError, match="eps must"):
        adamax(0.1, 0.9, 0.9, -5)
    with pytest.raises(ValueError, match="weight_decay must"):
        adamax(0.1, 0.9, 0.9, 5, -5)


# ---- Trees, shapes, dtypes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "leaf",
    [
        *(jnp.arange(3), jnp.ones(2, bool), jnp.ones(2, jnp.complex64), 3, True),
        *(jax.random.key(0), jnp.ones(2, jnp.float8_e4m3fn)),
    ],
    ids=lambda leaf: str(getattr(leaf, "dtype", leaf)),
)
def test_dtypes_without_a_state(leaf):
    with pytest.raises(TypeError, match=r"params\['b'\]\[1\] has dtype .*; expected float32 or fl"):
        TX.init({"a": jnp.ones(2), "b": [jnp.ones(2), leaf]})


def changed(tree, leaf):
    return {**tree, "rest": (leaf, *tree["rest"][1:])}


PARAMS = weights()
STATE = TX.init(PARAMS)
TREES = {
    "params has another leaf": (changed(PARAMS, jnp.ones(3)), PARAMS, STATE),
    "grads has another leaf": (PARAMS, changed(PARAMS, jnp.ones(())[None]), STATE),
    "grads has none": (PARAMS, changed(PARAMS, None), STATE),
    "mu has another leaf": (PARAMS, PARAMS, STATE._replace(mu=changed(STATE.mu, jnp.ones(2)))),
    "nu has another leaf": (PARAMS, PARAMS, STATE._replace(nu=changed(STATE.nu, jnp.ones(2)))),
    "grads lacks a key": (PARAMS, {"layers": PARAMS["layers"]}, STATE),
    "grads is nothing": (PARAMS, None, STATE),
    "mu is a leaf": (PARAMS, PARAMS, STATE._replace(mu=jnp.ones(3))),
    "nu is a tuple": (PARAMS, PARAMS, STATE._replace(nu=())),
}
MESSAGES = {
    "params has another leaf": r"\['rest'\]\[0\] must have the shape \(3,\) of its parameter; "
    r"received \(\)",
    "grads has another leaf": r"grads\['rest'\]\[0\] must have the shape \(\) of.*; received \(1,",
    "grads has none": r"grads\['rest'\]\[0\] must have the shape \(\) of its par.*; received None",
    "mu has another leaf": r"mu\['rest'\]\[0\] must have the shape \(\) of.*; received \(2,",
    "nu has another leaf": r"nu\['rest'\]\[0\] must have the shape \(\) of.*; received \(2,",
    "grads lacks a key": "grads must be a tree as params; .*rest",
    "grads is nothing": "grads must be a tree as params; .*None",
    "mu is a leaf": "mu must be a tree as params; ",
    "nu is a tuple": "nu must be a tree as params; ",
}


@pytest.mark.parametrize("what", TREES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_trees_and_shapes(what, transform):
    with pytest.raises(ValueError, match=MESSAGES[what]):
        transform(TX.apply)(*TREES[what])


@pytest.mark.parametrize("what", ["grads has another leaf", "mu is a leaf", "grads lacks a key"])
def test_trees_and_shapes_of_updates(what):
    params, grads, state = TREES[what]
    with pytest.raises(ValueError, match=r"mu|grads|\['rest'\]\[0\]"):
        TX.update(grads, state, params)


@pytest.mark.parametrize(
    ("param", "grad", "state"),
    [
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "float16", "float32"),
        ("float32", "int32", "float32"),
        ("float32", "float32", "float16"),
        ("float16", "float16", "float16"),
        ("int32", "float32", "float32"),
    ],
)
def test_dtypes_that_do_not_fit(param, grad, state):
    params, grads = ({"a": [jnp.ones(2, dtype)]} for dtype in (param, grad))
    moments = {"a": [jnp.zeros(2, state)]}
    given = TX.init({})._replace(mu=moments, nu=moments)
    message = rf"params\['a'\]\[0\] has dtype {param}, its gradient {grad}, its state {state}; exp"
    with pytest.raises(TypeError, match=message):
        TX.apply(params, grads, given)


def test_moments_of_two_dtypes():
    w = jnp.ones(2)
    given = TX.init(w)._replace(nu=jnp.zeros(2, jnp.float16))
    with pytest.raises(TypeError, match="float16"):
        TX.apply(w, w, given)


def test_gradients_of_what_cannot_be_differentiated():
    w = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype float32, its gradient"):
        TX.apply(w, {"w": np.zeros(2, jax.dtypes.float0)}, TX.init(w))


@pytest.mark.parametrize(
    ("count", "received"),
    [
        *((jnp.zeros(2, jnp.int32), r"int32\[2\]"), (jnp.zeros(()), r"float32\[\]")),
        *((np.zeros((), np.int16), r"int16\[\]"), (0.0, "float32")),
    ],
)
def test_counts(count, received):
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=f"count must be one int32; received {received}"):
        TX.apply(w, w, TX.init(w)._replace(count=count))


def test_a_negative_count_fails_at_the_step():
    w = jnp.ones(2)
    state = TX.init(w)._replace(count=jnp.array(-1, jnp.int32))
    with pytest.raises(FAILED, match="step must be >= 1; received 0"):
        jax.block_until_ready(TX.apply(w, w, state))


@pytest.mark.parametrize("decay", [0.1, jnp.array(0.0)], ids=["number", "array"])
def test_updates_with_decay_need_parameters(decay):
    tx = adamax(0.1, weight_decay=decay)
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"params must be given to update\(\) with weight_decay"):
        tx.update(w, tx.init(w))


# ---- What JAX cannot do with it ------------------------------------------------------------------


def stepped(params):
    return TX.apply(params, PARAMS, STATE)[0]["rest"][0]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.grad(f),
        lambda f: jax.jit(jax.grad(f)),
        lambda f: jax.grad(jax.jit(f)),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: lambda w: jax.jvp(f, (w,), (w,)),
        lambda f: lambda w: jax.linearize(f, w),
        lambda f: lambda w: jax.vjp(f, w),
        lambda f: jax.jacfwd(f),
        lambda f: jax.hessian(f),
    ],
    ids=["grad", "jit", "of_jit", "checkpoint", "jvp", "linearize", "vjp", "jacfwd", "hessian"],
)
def test_differentiation(transform):
    params = on_device({k: v for k, v in PARAMS.items()})
    with pytest.raises(TypeError, match=r"adamax_ext.jax cannot be differentiated.*optax.adamax"):
        transform(stepped)(params)


def test_differentiation_of_a_rate():
    w = jnp.ones(2)

    def loss(rate):
        return adamax(rate).apply(w, w, TX.init(w))[0].sum()

    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(loss)(0.1)


def test_differentiation_of_the_rest_goes_on():
    """Where no tangent reaches a step, there is nothing to refuse."""

    def loss(x, params):
        still = jax.lax.stop_gradient(jax.tree.map(lambda w: w * x, params))
        new, _ = TX.apply(still, still, TX.init(still))
        return x * new["rest"][0]

    params = on_device(PARAMS)
    for transform in (lambda f: f, jax.jit):
        value, slope = transform(jax.value_and_grad(loss))(2.0, params)
        assert float(slope) == pytest.approx(float(value) / 2)


def test_export_names_the_step():
    with pytest.raises(ValueError, match=r"adamax_ext_step"):
        importlib.import_module("jax.export").export(jax.jit(TX.apply))(PARAMS, PARAMS, STATE)


# ---- After an error ------------------------------------------------------------------------------


def test_after_an_error_nothing_has_changed():
    tx = adamax(0.1, jnp.float32(1.5))
    host = weights(large=True)
    params, grads = on_device(host), on_device(grads_like(host, 0))
    state = tx.init(params)
    for apply in (tx.apply, jax.jit(tx.apply), lambda p, g, s: tx.update(g, s, p)):
        with pytest.raises(FAILED, match="beta_1 must be in"):
            jax.block_until_ready(apply(params, grads, state))
        assert_same_trees((params, grads), (on_device(host), on_device(grads_like(host, 0))))
        assert_same_trees(state, tx.init(params))
    good = adamax(0.1)
    assert int(good.apply(params, grads, state)[1].count) == 1

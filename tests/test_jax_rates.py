"""The rate and the other settings of a step in JAX: numbers, arrays, schedules, hyperparameters."""

import functools

import numpy as np
import pytest
from support.frameworks import load_optax
from support.jax_runs import (
    FAILED,
    NAMES,
    SETTINGS,
    Twin,
    adamax,
    assert_same_trees,
    grads_like,
    jax,
    jnp,
    on_device,
    trained,
    weights,
    x64,
)

optax = load_optax()

OTHERS = {name: value for name, value in SETTINGS.items() if name != "learning_rate"}
STEPS = 8


def check_rate(rate, numbers, step=jax.jit):
    """Train with `rate`, and beside it with the number of each step."""
    tx, twin = adamax(rate, **OTHERS), Twin(weights(), learning_rate=0.1, **OTHERS)
    apply, ours = step(tx.apply), on_device(weights())
    state = tx.init(ours)
    for t in range(STEPS):
        grads = grads_like(weights(), t)
        ours, state = apply(ours, on_device(grads), state)
        twin.step(grads, learning_rate=numbers(t))
        twin.assert_same(ours, state, f"step {t}")


@pytest.mark.parametrize(
    "rate",
    [
        *(0.1, 2, 0.0, np.float64(0.1), np.float32(0.1), np.int64(3), np.float16(0.3)),
        *(np.array(0.1), np.array([0.1]), np.array([[3]]), np.float32([0.1])),
    ],
    ids=repr,
)
def test_numbers(rate):
    check_rate(rate, lambda t: float(np.squeeze(rate)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "int16"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_arrays_of_jax(dtype, shape):
    rate = jnp.full(shape, 3.7).astype(dtype)
    check_rate(rate, lambda t: float(rate.reshape(())))


def test_an_array_that_is_rounded_is_no_number():
    """0.1 as float32 is another rate than 0.1: the difference is seen in 64 bits."""
    with x64():
        params = {"w": np.linspace(-1, 1, 5)}
        ours = {
            name: trained(adamax(rate), params, 1)[0]["w"]
            for name, rate in (("double", jnp.array(0.1)), ("single", jnp.float32(0.1)))
        }
        assert jnp.array(0.1).dtype == np.float64
        for name, rate in (("double", 0.1), ("single", float(np.float32(0.1)))):
            twin = Twin(params, learning_rate=rate)
            twin.step(grads_like(params, 0))
            assert_same_trees(ours[name], twin.params[0])
        assert (ours["double"] != ours["single"]).any()


@pytest.mark.parametrize("step", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.1),
        optax.exponential_decay(0.1, 3, 0.5),
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, STEPS),
        optax.piecewise_constant_schedule(0.1, {2: 0.5, 5: 0.1}),
        lambda count: 3,
        lambda count: np.float32(0.1),
        lambda count: count,
        lambda count: jnp.full((1, 1), 0.1) / (1 + count),
    ],
    ids=["constant", "exponential", "cosine", "piecewise", "int", "numpy", "count", "one_element"],
)
def test_schedules_get_the_number_of_completed_steps(schedule, step):
    compiled = jax.jit(lambda count: jnp.asarray(schedule(count), jnp.float32).reshape(()))

    def number(t):
        count = jnp.array(t, jnp.int32)
        raw = schedule(count)
        if step is jax.jit and isinstance(raw, jax.Array):
            raw = compiled(count)  # which may round otherwise
        return float(np.squeeze(raw))

    check_rate(schedule, number, step)


def test_every_setting_can_be_an_array():
    settings = SETTINGS | {"weight_decay": 0.213}
    arrays = {name: jnp.array(value) for name, value in settings.items()}
    rounded = {name: float(array) for name, array in arrays.items()}
    for some in ([*arrays], ["b1"], ["b2", "eps"], ["weight_decay", "learning_rate"], ["eps"]):
        given = settings | {name: arrays[name] for name in some}
        same = settings | {name: rounded[name] for name in some}
        ours, state = trained(adamax(**given), weights(), 3)
        twin = Twin(weights(), **same)
        for t in range(3):
            twin.step(grads_like(weights(), t))
        twin.assert_same(ours, state, str(some))


def test_settings_that_are_traced():
    """As where a user differentiates a loop or tries many: they are arguments of the program."""

    @jax.jit
    def train(b1, rate, params):
        tx = adamax(rate, b1, decay="l2", weight_decay=0.1)
        return tx.apply(params, params, tx.init(params))

    ours, state = train(0.8, 2, on_device(weights()))
    twin = Twin(
        weights(), learning_rate=2.0, b1=float(np.float32(0.8)), decay="l2", weight_decay=0.1
    )
    twin.step(weights())
    twin.assert_same(ours, state, "a step")


# ---- optax.inject_hyperparams --------------------------------------------------------------------


@pytest.mark.parametrize("static", [(), ("b1", "b2", "eps", "weight_decay")], ids=["all", "rate"])
def test_injected_hyperparameters(static):
    settings = SETTINGS | {"weight_decay": 0.1}
    tx = optax.inject_hyperparams(adamax, static_args=static)(**settings)
    params = on_device(weights())
    state = tx.init(params)
    assert state.hyperparams.keys() == settings.keys() - set(static)
    twin = Twin(weights(), **settings)
    single = {name: float(np.float32(settings[name])) for name in state.hyperparams}
    twin.settings |= {NAMES.get(name, name): value for name, value in single.items()}
    update = jax.jit(tx.update)
    for t in range(4):
        if t == 2:  # a user changes one
            state.hyperparams["learning_rate"] = jnp.array(0.5)
            twin.settings["learning_rate"] = 0.5
        grads = grads_like(weights(), t)
        updates, state = update(on_device(grads), state, params)
        params = optax.apply_updates(params, updates)
        twin.step(grads)
        twin.assert_same(params, state.inner_state, f"step {t}", atol=1e-5)


def test_an_injected_schedule():
    schedule = optax.exponential_decay(0.1, 3, 0.5)
    static = ("b1", "b2", "eps", "weight_decay")
    injected = optax.inject_hyperparams(adamax, static_args=static)(schedule, **OTHERS)
    plain = adamax(schedule, **OTHERS)
    params = on_device(weights())
    states = injected.init(params), plain.init(params)
    for t in range(4):
        grads = on_device(grads_like(weights(), t))
        ours, state = jax.jit(injected.update)(grads, states[0])
        theirs, other = jax.jit(plain.update)(grads, states[1])
        assert_same_trees(ours, theirs)
        states = state, other


def test_an_array_as_decay_needs_parameters_in_update():
    """Nobody can know whether it is zero."""
    tx = optax.inject_hyperparams(adamax)(0.1)
    params = on_device(weights())
    with pytest.raises(ValueError, match=r"params must be given.*static_args"):
        tx.update(params, tx.init(params))


# ---- No compilation from step to step ------------------------------------------------------------

_compiled = []  # all that JAX tells of compilations, from when a test first asks


@functools.cache
def compilations():
    def listen(event, _seconds, **_):
        if "compile" in event:
            _compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return _compiled


@pytest.mark.parametrize("how", ["jit", "eager", "update"])
@pytest.mark.parametrize("rate", [0.1, lambda count: 0.1 / (1 + count)], ids=["number", "schedule"])
def test_nothing_is_compiled_after_the_first_steps(rate, how):
    tx = adamax(rate, weight_decay=0.1)
    params = on_device(weights())
    state = tx.init(params)
    grads = [on_device(grads_like(weights(), t)) for t in range(6)]
    apply = jax.jit(tx.apply) if how == "jit" else tx.apply
    compiled = compilations()
    jax.clear_caches()
    for t, grad in enumerate(grads):
        compiled.clear()
        if how == "update":
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        else:
            params, state = apply(params, grad, state)
        assert (compiled == []) == (t > 0)
    if how == "jit":
        assert apply._cache_size() == 1


# ---- Arrays and schedules that are wrong ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b1", 1.0, r"beta_1 must be in \[0, 1\); received 1"),
        ("b2", -0.5, r"beta_2 must be in \[0, 1\); received -0.5"),
        ("eps", -1.0, "epsilon must be finite and >= 0; received -1"),
        ("weight_decay", np.inf, "weight_decay must be finite and >= 0; received inf"),
    ],
)
def test_arrays_out_of_range_fail_at_the_step(name, value, message):
    params = on_device(weights())
    tx = adamax(**{"learning_rate": 0.1, name: jnp.array(value)})
    state = tx.init(params)
    for apply in (tx.apply, jax.jit(tx.apply)):
        with pytest.raises(FAILED, match=message):
            jax.block_until_ready(apply(params, params, state))
    assert_same_trees(params, on_device(weights()))
    assert_same_trees(state, tx.init(params))


@pytest.mark.parametrize("rate", [np.nan, np.inf])
def test_a_rate_that_is_not_finite_makes_all_weights_nan(rate):
    """As with optax: an error would come when donated arrays are gone."""
    params = on_device(weights())
    tx = adamax(lambda count: jnp.where(count == 1, rate, 0.1))
    step = jax.jit(tx.apply)
    first = step(params, params, tx.init(params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first[0]))
    second = step(first[0], params, first[1])
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(second[0]))


def test_a_schedule_out_of_range():
    params = on_device(weights())
    tx = adamax(lambda count: float("nan"))
    with pytest.raises(ValueError, match=r"learning_rate must be a number.* finite; received nan"):
        tx.apply(params, params, tx.init(params))


@pytest.mark.parametrize("value", [jnp.ones(2), jnp.ones(()) > 0, jnp.ones((), jnp.complex64)])
def test_schedules_of_what_is_no_number(value):
    params = on_device(weights())
    tx = adamax(lambda count: value)
    for apply in (tx.apply, jax.jit(tx.apply)):
        with pytest.raises(ValueError, match="learning_rate must be a real number or an array of"):
            apply(params, params, tx.init(params))

"""A step in JAX's ways to compile and to check: ahead of time, from a cache, for leaks and NaN."""

import re
import subprocess
import sys

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

TX = adamax(**SETTINGS, weight_decay=0.1)
HOST = weights()


def given():
    params = on_device(HOST)
    return params, on_device(grads_like(HOST, 0)), TX.init(params)


EXPECTED = TX.apply(*given())


# ---- Shapes alone --------------------------------------------------------------------------------


def test_shapes_of_a_state():
    params, _, state = given()
    shapes = jax.eval_shape(TX.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert_same_trees(TX.init(jax.eval_shape(lambda: params)), state)  # as optax's init does


def test_shapes_of_a_step():
    shapes = jax.eval_shape(TX.apply, *given())
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(EXPECTED), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert not any(shape.weak_type for shape in jax.tree.leaves(shapes))


def test_ahead_of_time():
    shapes = jax.eval_shape(lambda: given())
    compiled = jax.jit(TX.apply, donate_argnums=(0, 2)).lower(*shapes).compile()
    assert_same_trees(compiled(*given()), EXPECTED)


def test_xla_does_not_try_to_fuse_the_step():
    """It leaves alone what has effects; else 400 leaves compile for 7 s, ten times as long."""
    text = jax.jit(TX.apply).lower(*given()).as_text()
    (call,) = re.findall(r"stablehlo\.custom_call @adamax_ext_step.*", text)
    assert "has_side_effect = true" in call


def test_a_program_that_is_lowered_for_a_gpu():
    lowered = jax.jit(TX.apply).trace(*given()).lower(lowering_platforms=("cuda",))
    assert "adamax_ext_step" in lowered.as_text()


# ---- Checks --------------------------------------------------------------------------------------


def test_checks_for_leaks_find_none():
    """Of traced arrays, which a cache would keep."""
    params, grads, state = given()
    many = jax.tree.map(lambda w: jnp.stack([w, w]), params)
    with jax.checking_leaks():
        assert_same_trees(jax.jit(TX.apply)(params, grads, state), EXPECTED)
        jax.jit(jax.vmap(TX.apply, in_axes=(0, None, None)))(many, grads, state)
        jax.jit(lambda p, g, s: TX.update(g, s, p))(params, grads, state)
        traced = jax.jit(lambda rate, p: adamax(rate).apply(p, p, adamax(rate).init(p)))
        traced(0.1, params)


def test_checks_for_nan():
    params, grads, state = given()
    grads["layers"][0]["bias"] = grads["layers"][0]["bias"].at[2].set(jnp.nan)
    with jax.debug_nans(True):
        assert_same_trees(jax.jit(TX.apply)(*given()), EXPECTED)
        for apply in (TX.apply, jax.jit(TX.apply)):
            with pytest.raises(FloatingPointError, match="nan"):
                apply(params, grads, state)
    assert_same_trees(params, given()[0])


def test_a_step_that_is_computed_twice_in_a_backward_pass():
    """A checkpoint replays what it holds: pure, so with the same result."""

    @jax.checkpoint
    def loss(x, params, grads, state):
        new, after = TX.apply(params, grads, state)
        return jnp.sin(x * new["rest"][0]) * after.count

    value, slope = jax.value_and_grad(loss)(0.5, *given())
    gain = EXPECTED[0]["rest"][0]
    assert np.asarray(value) == pytest.approx(float(jnp.sin(0.5 * gain)))
    assert np.asarray(slope) == pytest.approx(float(gain * jnp.cos(0.5 * gain)))


def test_what_nobody_asks_for_is_not_computed():
    text = jax.jit(lambda *a: TX.apply(*a) and a[0]).lower(*given()).compile().as_text()
    assert "adamax_ext_step" not in text


# ---- A cache on disk -----------------------------------------------------------------------------

CACHED = """
import sys
from time import perf_counter
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
from adamax_ext.jax import adamax
tx = adamax(lambda count: 0.1 / (1 + count), weight_decay=0.1)
params = {"w": jnp.linspace(-1, 1, 1001), "b": jnp.ones((3, 2))}
state = tx.init(params)
step = jax.jit(tx.apply, donate_argnums=(0, 2))
jax.block_until_ready(params)
events.clear()
for _ in range(3):
    grads = jax.tree.map(lambda w: w * 0.5, params)
    params, state = step(params, grads, state)
hits = sum(event.endswith("cache_hits") for event in events)
print(hits, b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves((params, state))).hex())
"""


def test_a_program_from_a_cache_on_disk(tmp_path):
    """Another process loads it before it has compiled anything: the step is registered by then."""
    lines = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", CACHED, tmp_path], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        lines.append(result.stdout.split())
    (first_hits, first), (second_hits, second) = lines
    assert first == second
    assert int(second_hits) > int(first_hits)
    assert any("jit_apply" in path.name for path in tmp_path.iterdir())

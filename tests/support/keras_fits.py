"""Trains with Keras' Adamax and ours by `fit`, in a process for each backend of Keras."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

BACKENDS = ("torch", "jax")

RULE = {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.02}
EMA = {"use_ema": True, "ema_momentum": 0.75}
# What is not an argument of Adamax tells how to train. Under accumulation the averages of ours
# count updates on torch, so there Keras gets batches that are as large as two of ours.
SETTINGS = [
    {},
    RULE,
    {**RULE, "weight_decay": 0.25},
    {**RULE, "weight_decay": 0.25, "excluded": ["bias"]},
    {**RULE, "clipnorm": 0.3},
    {**RULE, "clipvalue": 0.05},
    {**RULE, "global_clipnorm": 0.5},
    {**RULE, **EMA},
    {**RULE, **EMA, "ema_overwrite_frequency": 3},
    {**RULE, "loss_scale_factor": 64.0},
    {**RULE, "gradient_accumulation_steps": 3},
    {**RULE, "gradient_accumulation_steps": 3, "clipnorm": 0.3, "weight_decay": 0.25},
    {**RULE, **EMA, "gradient_accumulation_steps": 2, "ema_overwrite_frequency": 3},
    {**RULE, "learning_rate": "schedule"},
    {**RULE, "learning_rate": "callable"},
    {**RULE, "constraint": True},
    {**RULE, "frozen": True},
    {**RULE, "loss_scaling": True},
    {**RULE, **EMA, "weight_decay": 0.25, "global_clipnorm": 0.5, "loss_scale_factor": 8.0},
    {**RULE, "policy": "mixed_bfloat16", "global_clipnorm": 0.5},
    {**RULE, "policy": "mixed_float16", "loss_scale_factor": 8.0},
    {**RULE, "policy": "float64", "weight_decay": 0.25},
]
BATCH = 8


def train(keras, cls, setting):
    """Return weights and state by name after two epochs."""
    settings = dict(setting)
    keras.backend.clear_session(free_memory=False)  # so that names begin anew
    keras.utils.set_random_seed(5)
    keras.config.set_dtype_policy(settings.pop("policy", "float32"))
    constraint = keras.constraints.MaxNorm(0.7) if settings.pop("constraint", False) else None
    layers = keras.layers
    if keras.backend.backend() == "torch":  # whose kernels are made transposed
        first = [layers.SimpleRNN(8, kernel_constraint=constraint, name="recurrent")]
    else:  # of which the compiler makes shorter work
        first = [layers.Flatten(), layers.Dense(8, kernel_constraint=constraint, name="first")]
    model = keras.Sequential(
        [
            keras.Input((2, 8)),
            *first,
            layers.Dense(12, activation="tanh", kernel_constraint=constraint, name="hidden"),
            layers.Dense(3, dtype="float32", name="out"),
        ]
    )
    if settings.pop("frozen", False):
        model.get_layer("hidden").trainable = False
    rate, batch = settings.get("learning_rate"), BATCH
    if rate == "schedule":
        schedules = keras.optimizers.schedules
        settings["learning_rate"] = schedules.ExponentialDecay(0.03, 4, 0.5, staircase=True)
    if rate == "callable":
        settings["learning_rate"] = lambda: 0.03
    is_theirs = cls is keras.optimizers.Adamax
    counts_updates = is_theirs and keras.backend.backend() == "torch"
    if counts_updates and settings.get("use_ema") and "gradient_accumulation_steps" in settings:
        batch *= settings.pop("gradient_accumulation_steps")
    excluded, scales = settings.pop("excluded", ()), settings.pop("loss_scaling", False)
    optimizer = inner = cls(**settings)
    inner.exclude_from_weight_decay(var_names=excluded)
    if scales:
        optimizer = keras.optimizers.LossScaleOptimizer(inner, 2.0**10, dynamic_growth_steps=4)
    model.compile(optimizer, loss="mse")
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(48, 2, 8)).astype("f"), rng.normal(size=(48, 3)).astype("f")
    model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
    result = {f"weight {v.path}": np.array(v.numpy()) for v in model.weights}
    for kind, variables in (("m", inner._m), ("u", inner._u)):
        result |= {f"{kind} {i}": np.array(v.numpy()) for i, v in enumerate(variables)}
    return result


def main(path):
    import keras
    from adamax_ext.keras import Adamax

    results = {}
    for i, setting in enumerate(SETTINGS):
        for side, cls in (("ours", Adamax), ("theirs", keras.optimizers.Adamax)):
            arrays = train(keras, cls, setting)
            results |= {f"{i}/{side}/{name}": array for name, array in arrays.items()}
    np.savez(path, **results)


def run(backend, path):
    """Return the results for each of SETTINGS, as pairs of ours and theirs by name."""
    done = subprocess.run(
        [sys.executable, "-m", "support.keras_fits", str(path)],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "OMP_NUM_THREADS": "1",
            "JAX_ENABLE_X64": "1",  # for float64
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [{} for _ in SETTINGS]
    with np.load(path) as arrays:
        for key in arrays:
            i, side, name = key.split("/", 2)
            if side == "ours":
                results[int(i)][name] = arrays[key], arrays[f"{i}/theirs/{name}"]
    return results


if __name__ == "__main__":
    main(sys.argv[1])

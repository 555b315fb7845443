"""Trains a network on handwritten digits with Keras' Adamax, and with one import changed.

pip install ".[demo,keras]" && KERAS_BACKEND=torch python examples/keras_digits.py
"""

import argparse
import hashlib
import os
from pathlib import Path
from statistics import median
from time import perf_counter

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from adamax_ext.keras import Adamax  # instead of: from keras.optimizers import Adamax
from matplotlib.figure import Figure  # no pyplot: it would choose a display backend
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = {"adamax_ext.keras": Adamax, "keras.optimizers": keras.optimizers.Adamax}
TARGET_ACCURACY = 0.95
BATCH, PEAK, WEIGHT_DECAY, CLIP = 64, 0.01, 0.01, 1.0


def load_data():
    """Return images (n, 64) in [0, 1] and labels (n,): to learn from, and held out."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=450, stratify=y, random_state=0
    )
    return (train_x, train_y), (test_x, test_y)


def make_model(optimizer_class, steps):
    """The same weights at every call; a rate that decays to nothing in so many steps."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(256, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, "softmax")])
    rate = keras.optimizers.schedules.CosineDecay(PEAK, steps)
    optimizer = optimizer_class(rate, weight_decay=WEIGHT_DECAY, global_clipnorm=CLIP)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(model, data, epochs, save_before=None, path=None):
    """Return loss and held-out accuracy of each epoch, whose order depends on its number alone."""
    (x, y), test_set = data
    history = []
    for epoch in epochs:
        if epoch == save_before:
            model.save(path)
        order = np.random.default_rng(epoch).permutation(len(x))
        done = model.fit(
            x[order], y[order], BATCH, shuffle=False, verbose=0, validation_data=test_set
        )
        history.append((done.history["loss"][0], done.history["val_accuracy"][0]))
    return history


def resume(path, data, epochs):
    """Return the model of a file, trained on; what is no setting of a model is told again."""
    model = keras.models.load_model(path)
    model.optimizer.exclude_from_weight_decay(var_names=["bias"])
    train(model, data, epochs)
    return model


def digest(model):
    """Return a short name for the bits of all weights."""
    bits = b"".join(np.asarray(weight).tobytes() for weight in model.get_weights())
    return hashlib.sha256(bits).hexdigest()[:16]


def step_times(model, train_set, repeats=50):
    """Return median microseconds in the optimizer, and of a training step; changes the model."""
    x, y = (part[:BATCH] for part in train_set)
    variables, optimizer = model.trainable_variables, model.optimizer
    grads = [keras.ops.full(v.shape, 1e-3) for v in variables]
    if keras.backend.backend() == "jax":  # where fit() compiles a step without side effects
        import jax

        compiled = jax.jit(optimizer.stateless_apply)
        arguments = [v.value for v in optimizer.variables], grads, [v.value for v in variables]

        def step():
            jax.block_until_ready(compiled(*arguments))
    else:

        def step():
            optimizer.apply(grads, variables)

    times = []
    for function in (step, lambda: model.train_on_batch(x, y)):
        function()
        starts = [perf_counter()]
        for _ in range(repeats):
            function()
            starts.append(perf_counter())
        times.append(1e6 * median(np.diff(starts)))
    return times


def draw(histories, times, path):
    """Write loss, accuracy and times to a PNG."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    panels = losses, accuracies, bars = figure.subplots(1, 3)
    looks = {"color": "C0", "linewidth": 4, "alpha": 0.5}, {"color": "black", "linestyle": ":"}
    for i, ((name, history), look) in enumerate(zip(histories.items(), looks, strict=True)):
        loss, accuracy = zip(*history, strict=True)
        epochs, percent = range(1, len(loss) + 1), 100 * np.array(accuracy)
        losses.semilogy(epochs, loss, label=name, **look)
        accuracies.plot(epochs, percent, label=f"{name}: {percent[-1]:.1f}% at the end", **look)
        in_step, in_all = times[name]
        bars.barh(i, in_step, 0.6, color="C1", label=None if i else "optimizer")
        bars.barh(i, in_all - in_step, 0.6, in_step, color="0.88", label=None if i else "the rest")
        bars.text(in_step, i, f"  {in_step:.0f} µs, {in_step / in_all:.0%}", va="center")
    losses.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    accuracies.set(title="Held-out accuracy", xlabel="epoch", ylabel="correct, %")
    bars.set(title="A training step (median)", xlabel="µs", ylim=(len(times) - 0.4, -1.2))
    bars.set_yticks(range(len(times)), list(times))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    backend = keras.backend.backend()
    figure.suptitle(f"Handwritten digits in Keras on {backend}: one import changed")
    figure.savefig(path, format="png", dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default="keras_digits.png", help="the picture")
    parser.add_argument("--checkpoint", type=Path, default="keras_digits.keras")
    args = parser.parse_args(argv)
    data, histories, times, resumes = load_data(), {}, {}, True
    steps, half = args.epochs * -(-len(data[0][0]) // BATCH), args.epochs // 2
    for name, optimizer_class in CLASSES.items():
        model = make_model(optimizer_class, steps)
        histories[name] = train(model, data, range(args.epochs), half, args.checkpoint)
        resumed = resume(args.checkpoint, data, range(half, args.epochs))
        resumes &= digest(resumed) == digest(model)
        print(f"{name:16}  held-out accuracy {histories[name][-1][1]:.2%}", end=", ")
        print(f"weights {digest(model)}, resumed in the middle {digest(resumed)}")
        times[name] = in_step, in_all = step_times(model, data[0])
        print(f"{'':16}  optimizer {in_step:.0f} us ({in_step / in_all:.0%}) a step")
    draw(histories, times, args.output)
    print(f"picture           {args.output}")
    is_learned = histories["adamax_ext.keras"][-1][1] > TARGET_ACCURACY
    return 0 if is_learned and resumes else 1


if __name__ == "__main__":
    raise SystemExit(main())

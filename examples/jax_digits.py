"""Trains a network on handwritten digits with optax's Adamax, and with ours in its place.

pip install ".[demo]" jax optax && python examples/jax_digits.py
"""

import argparse
import hashlib
import json
import os
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adamax_ext.jax import adamax  # instead of optax.adamaxw
from matplotlib.figure import Figure  # no pyplot: it would choose a display backend
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TARGET_ACCURACY = 0.95
BATCH, PEAK, WEIGHT_DECAY, CLIP, DROPOUT = 64, 0.01, 1e-4, 1.0, 0.2
SIZES = (64, 256, 256, 10)


def load_data():
    """Return images (n, 64) in [0, 1] and labels (n,): to learn from, and held out."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=450, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = map(np.asarray, parts)
    return (train_x.astype(np.float32), train_y), (test_x.astype(np.float32), test_y)


def init_params(key):
    layers = []
    for fan_in, fan_out in pairwise(SIZES):
        key, layer_key = jax.random.split(key)
        kernel = jax.random.normal(layer_key, (fan_in, fan_out)) * (2 / fan_in) ** 0.5
        layers.append({"kernel": kernel, "bias": jnp.zeros(fan_out)})
    return layers


def predict(params, x, key=None):
    """Return logits; with a key, drop some of the hidden values."""
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        if i + 1 < len(params):
            x = jax.nn.relu(x)
            if key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - DROPOUT, x.shape)
                x = jnp.where(kept, x / (1 - DROPOUT), 0)
    return x


@jax.jit
def loss_and_grads(params, x, y, key):
    def loss(params):
        logits = predict(params, x, key)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    grads, _ = optax.clip_by_global_norm(CLIP).update(grads, optax.EmptyState())
    return value, grads


@jax.jit
def accuracy(params, x, y):
    return (predict(params, x).argmax(axis=1) == y).mean()


def optax_step(tx, params, grads, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


class Run:
    """A training with one of the optimizers, and what the picture shows of it."""

    def __init__(self, make, epochs, data):
        self.train_set, self.test_set = data
        steps = epochs * -(-len(self.train_set[0]) // BATCH)
        # The rate warms up and decays; it is computed in the compiled step.
        schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps)
        tx = make(schedule, weight_decay=WEIGHT_DECAY)
        step = getattr(tx, "apply", None) or partial(optax_step, tx)
        # Parameters and state are overwritten where they are: they must not be used again.
        self.step = jax.jit(step, donate_argnums=(0, 2))
        self.params = init_params(jax.random.key(0))
        self.state = tx.init(self.params)
        self.history = {"loss": [], "accuracy": [], "step_us": [], "all_us": []}

    def train_epoch(self, epoch):
        """Train on every image once; order and dropout depend on nothing but the epoch."""
        key = jax.random.key(1 + epoch)  # so a resumed run goes on with the same random numbers
        (x, y), losses = self.train_set, []
        order = np.random.default_rng(epoch).permutation(len(x))
        for i, begin in enumerate(range(0, len(x), BATCH)):
            batch = order[begin : begin + BATCH]
            start = perf_counter()
            loss, grads = loss_and_grads(
                self.params, x[batch], y[batch], jax.random.fold_in(key, i)
            )
            jax.block_until_ready(grads)  # only to time what follows
            before_step = perf_counter()
            self.params, self.state = self.step(self.params, grads, self.state)
            jax.block_until_ready(self.params)
            self.history["step_us"].append(1e6 * (perf_counter() - before_step))
            losses.append(float(loss))
            self.history["all_us"].append(1e6 * (perf_counter() - start))
        self.history["loss"].append(mean(losses))
        self.history["accuracy"].append(float(accuracy(self.params, *self.test_set)))

    def step_times(self):
        """Return microseconds in the optimizer, and of a whole training step."""
        return median(self.history["step_us"]), median(self.history["all_us"])

    def weights_digest(self):
        """Return a short name for the bits of all weights."""
        bits = b"".join(np.asarray(w).tobytes() for w in jax.tree.leaves(self.params))
        return hashlib.sha256(bits).hexdigest()[:16]

    def arrays(self):
        """Return parameters and state by their paths."""
        leaves, _ = jax.tree_util.tree_flatten_with_path((self.params, self.state))
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def load(self, arrays, history):
        leaves = map(jnp.array, map(arrays.__getitem__, self.arrays()))
        tree = jax.tree.structure((self.params, self.state))
        self.params, self.state = jax.tree.unflatten(tree, leaves)
        self.history = history


def save(path, runs, **about):
    """Write all runs to a file; there is always a whole one."""
    arrays = {f"{name}/{key}": a for name, run in runs.items() for key, a in run.arrays().items()}
    about["histories"] = {name: run.history for name, run in runs.items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(arrays, unfinished, {"about": json.dumps(about)})
    os.replace(unfinished, path)


def load(path):
    """Return the arrays of a file by run and path, and what was said about them."""
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["about"])
    arrays = {name: {} for name in about["histories"]}
    for key, array in load_file(path).items():
        name, _, key = key.partition("/")
        arrays[name][key] = array
    return arrays, about


def draw(runs, path):
    """Write loss, accuracy and times of the runs to a PNG."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    panels = losses, accuracies, times = figure.subplots(1, 3)
    looks = {"color": "C0", "linewidth": 4, "alpha": 0.5}, {"color": "black", "linestyle": ":"}
    for i, ((name, run), look) in enumerate(zip(runs.items(), looks, strict=True)):
        epochs = range(1, len(run.history["loss"]) + 1)
        losses.semilogy(epochs, run.history["loss"], label=name, **look)
        percent = [100 * accuracy for accuracy in run.history["accuracy"]]
        accuracies.plot(epochs, percent, label=f"{name}: {percent[-1]:.1f}% at the end", **look)
        in_step, in_all = run.step_times()
        times.barh(i, in_step, 0.6, color="C1", label=None if i else "the optimizer")
        times.barh(i, in_all - in_step, 0.6, in_step, color="0.88", label=None if i else "the rest")
        times.text(in_step, i, f"  {in_step:.0f} µs, {in_step / in_all:.0%}", va="center")
    losses.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy, with dropout")
    accuracies.set(title="Held-out accuracy", xlabel="epoch", ylabel="correct, %")
    accuracies.set_ylim(min(85, percent[-1] - 10), 100.3)
    times.set(title="A training step (median)", xlabel="µs", ylim=(len(runs) - 0.4, -1.2))
    times.set_yticks(range(len(runs)), list(runs))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle("Handwritten digits in JAX: one optimizer changed")
    figure.savefig(path, format="png", dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default="jax_digits.png", help="the picture")
    parser.add_argument("--checkpoint", type=Path, default="jax_digits.safetensors")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="EPOCH", help="as if interrupted")
    args = parser.parse_args(argv)
    makes, data = {"adamax_ext.jax": adamax, "optax": optax.adamaxw}, load_data()
    runs = {name: Run(make, args.epochs, data) for name, make in makes.items()}
    arrays, about = load(args.checkpoint) if args.resume else ({}, {"done": 0})
    if about.get("epochs", args.epochs) != args.epochs:
        parser.error(f"the schedule of the checkpoint is made for --epochs {about['epochs']}")
    for name, saved in arrays.items():
        runs[name].load(saved, about["histories"][name])
    for epoch in range(about["done"], args.epochs):
        for run in runs.values():
            run.train_epoch(epoch)
        save(args.checkpoint, runs, epochs=args.epochs, done=epoch + 1)
        if epoch + 1 == args.stop_after:
            return print(f"stopped after epoch {epoch + 1} of {args.epochs}: --resume goes on")
    for name, run in runs.items():
        in_step, in_all = run.step_times()
        print(f"{name:14}  held-out accuracy {run.history['accuracy'][-1]:.2%}, optimizer", end=" ")
        print(f"{in_step:.0f} us ({in_step / in_all:.0%}) a step, weights {run.weights_digest()}")
    draw(runs, args.output)
    print(f"picture         {args.output}")
    return 0 if runs["adamax_ext.jax"].history["accuracy"][-1] > TARGET_ACCURACY else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The demonstration: a network in plain NumPy learns to read digits, trained by Adamax."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure  # no pyplot: it would choose a display backend
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from adamax_ext import Adamax, __version__, active_isa
from adamax_ext.schedules import CosineDecay, LearningRateSchedule

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Variables = dict[str, Array]
Digits = dict[str, tuple[Array, Labels]]
Turn = tuple[list[float], Callable[[Sequence[Array]], object]]  # times, and what is timed

TARGET_ACCURACY = 0.97
# Chosen by cross-validation inside the training set; the held-out images had no say.
EPOCHS, BATCH_SIZE, HIDDEN_UNITS, INPUT_NOISE = 60, 32, 256, np.float32(0.2)
PEAK, WARMUP, WEIGHT_DECAY, CLIP, EMA = 0.02, 0.05, 0.01, 1.0, 0.99
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # the defaults of Adamax


def load_data() -> Digits:
    """Return images (n, 64) in [0, 1] and labels (n,), in a split that no seed changes."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    split = train_test_split(x, y, test_size=450, stratify=y, random_state=0)
    return {"training set": (split[0], split[2]), "test set": (split[1], split[3])}


def initial_weights(rng: np.random.Generator) -> Variables:
    """Return weights for 64 -> ReLU -> 10; for a ReLU, He's scale."""

    def normal(fan_in: int, fan_out: int) -> Array:
        return rng.normal(0, math.sqrt(2 / fan_in), (fan_in, fan_out)).astype(np.float32)

    return {
        "hidden/kernel": normal(64, HIDDEN_UNITS),
        "hidden/bias": np.zeros(HIDDEN_UNITS, np.float32),
        "output/kernel": normal(HIDDEN_UNITS, 10),
        "output/bias": np.zeros(10, np.float32),
    }


def forward(weights: Variables, x: Array) -> tuple[Array, Array]:
    """Return the hidden activations (n, hidden) and the logits (n, 10)."""
    hidden = np.maximum(x @ weights["hidden/kernel"] + weights["hidden/bias"], 0)
    return hidden, hidden @ weights["output/kernel"] + weights["output/bias"]


def loss_and_gradients(weights: Variables, x: Array, y: Labels) -> tuple[float, list[Array]]:
    """Return the mean softmax cross-entropy and its gradients, in the order of `weights`."""
    hidden, logits = forward(weights, x)
    rows = np.arange(len(y))
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp() cannot overflow
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    d_logits = np.exp(log_softmax)
    d_logits[rows, y] -= 1
    d_logits /= np.float32(len(y))
    d_hidden = (d_logits @ weights["output/kernel"].T) * (hidden > 0)
    grads = [x.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_logits, d_logits.sum(axis=0)]
    return -float(log_softmax[rows, y].mean()), grads


def accuracy(weights: Variables, x: Array, y: Labels) -> float:
    """Return the share of images whose largest logit is their label's."""
    return float(np.mean(forward(weights, x)[1].argmax(axis=1) == y))


class NumpyAdamax:
    """The formula of the optimizer, one plain NumPy expression a line: the yardstick.

    Its norm adds up in another order, in float64. To show, that would have to change `clip` after
    rounding to float32, which happens about once in 10 ** 8 steps.
    """

    def __init__(self, weights: Variables, schedule: LearningRateSchedule) -> None:
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.state = {
            name: {kind: np.zeros_like(w) for kind in ("momentum", "norm", "average")}
            for name, w in weights.items()
        }
        self.schedule, self.step = schedule, 0

    def apply(self, grads: Sequence[Array]) -> None:
        """Take one step in place."""
        f32, tiny = np.float32, np.float32(2.0**-102)
        lr = self.schedule(self.step)
        self.step += 1
        rate = f32(lr / -math.expm1(self.step * math.log(BETA_1)))
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads))
        clip = f32(min(CLIP / norm, 1.0) if norm > 0 else 1.0)
        for (name, w), g in zip(self.weights.items(), grads, strict=True):
            m, u, average = self.state[name].values()
            h = g * clip
            if not name.endswith("bias"):
                w[...] = w - w * f32(lr * WEIGHT_DECAY)
            m[...] = m + (h - m) * f32(1 - BETA_1)
            u[...] = np.maximum(u * f32(BETA_2), np.abs(h))
            m[np.abs(m) < tiny] = 0
            u[u < tiny] = 0
            w[...] = w - (rate * m) / (u + f32(EPSILON))
            mixed = average * f32(EMA) + w * (f32(1) - f32(EMA))
            average[...] = w if self.step == 1 else mixed

    def same_bits(self, weights: Variables, optimizer: Adamax) -> bool:
        """Whether `weights` and the state of `optimizer` equal these, bit for bit."""
        return all(
            weights[name].tobytes() == self.weights[name].tobytes()
            and all(optimizer.state[name][kind].tobytes() == a.tobytes() for kind, a in own.items())
            for name, own in self.state.items()
        )


@dataclass
class History:
    """What report and picture show: a value per step, `accuracy` one per epoch."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    native_us: list[float] = field(default_factory=list)
    numpy_us: list[float] = field(default_factory=list)
    accuracy: dict[str, list[float]] = field(default_factory=dict)


def train(
    weights: Variables, digits: Digits, epochs: int, rng: np.random.Generator
) -> tuple[Adamax, NumpyAdamax, History]:
    """Train `weights` in place; the yardstick takes the same gradients, step by step."""
    train_x, train_y = digits["training set"]
    steps_per_epoch = math.ceil(len(train_x) / BATCH_SIZE)
    warmup = round(WARMUP * epochs * steps_per_epoch)
    rest = epochs * steps_per_epoch - warmup
    schedule = CosineDecay(PEAK / 10, rest, warmup_target=PEAK, warmup_steps=warmup)
    optimizer = Adamax(
        schedule, weight_decay=WEIGHT_DECAY, global_clipnorm=CLIP, use_ema=True, ema_momentum=EMA
    )
    optimizer.exclude_from_weight_decay(var_names=["bias$"])
    optimizer.build(weights)
    averages: Variables = {name: state["average"] for name, state in optimizer.state.items()}
    yardstick, history = NumpyAdamax(weights, schedule), History()
    turns: list[Turn] = [(history.native_us, optimizer.apply), (history.numpy_us, yardstick.apply)]
    progress = tqdm(range(epochs), desc="training", unit="epoch", ascii=" =")
    for _ in progress:
        for batch in np.array_split(rng.permutation(len(train_x)), steps_per_epoch):
            x, y = train_x[batch], train_y[batch]
            # Noise on the images keeps a network of this size from learning them by heart.
            x = x + INPUT_NOISE * rng.standard_normal(x.shape, np.float32)
            loss, grads = loss_and_gradients(weights, x, y)
            history.loss.append(loss)
            history.learning_rate.append(schedule(yardstick.step))
            for times, take_step in turns:
                start = time.perf_counter_ns()
                take_step(grads)
                times.append((time.perf_counter_ns() - start) / 1e3)
            turns.reverse()  # who comes second finds the gradients in cache
        for split, (x, y) in digits.items():
            for kind, variables in (("raw", weights), ("averaged", averages)):
                values = history.accuracy.setdefault(f"{split}, {kind} weights", [])
                values.append(accuracy(variables, x, y))
        progress.set_postfix_str(f"loss {loss:.4f}, test {values[-1]:.2%}", refresh=False)
    return optimizer, yardstick, history


def draw(history: History, path: Path) -> None:
    """Write loss, accuracy and learning rate over the steps to a PNG at `path`."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = losses, accuracies, rates = figure.subplots(1, 3)
    steps = np.arange(1, len(history.loss) + 1)
    epochs = len(next(iter(history.accuracy.values())))
    epoch_ends = steps.reshape(epochs, -1)[:, -1]
    dot = "." if epochs < 10 else ""  # a line of one point is invisible
    losses.semilogy(steps, history.loss, color="0.8", linewidth=0.8, label="each batch")
    mean_loss = np.reshape(history.loss, (epochs, -1)).mean(axis=1)
    losses.semilogy(epoch_ends, mean_loss, "C0", marker=dot, label="mean of an epoch")
    losses.set(title="Training loss (noisy images)", ylabel="cross-entropy")
    for label, values in history.accuracy.items():
        color, percent = "C0" if "training" in label else "C1", np.multiply(100, values)
        look = {"linewidth": 0.9, "alpha": 0.6} if "raw" in label else {"linewidth": 1.6}
        accuracies.plot(epoch_ends, percent, color, marker=dot, label=label, **look)
    accuracies.axhline(100 * TARGET_ACCURACY, color="0.4", linestyle=":", label="target")
    if values[-1] > 0.9:  # the interesting part of a run that went well
        accuracies.set_ylim(90, 100.3)
    accuracies.set(title=f"Accuracy (test, averaged: {values[-1]:.2%})", ylabel="correct, %")
    rates.plot(steps, history.learning_rate, "C2", label="warm-up, then cosine")
    rates.set(title="Learning rate", ylabel="learning rate")
    for axes in panels:
        axes.set(xlabel=f"step ({len(steps) // epochs} to an epoch)", xlim=(0, len(steps) * 1.02))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle("adamax_ext on handwritten digits: a two-layer network in NumPy")
    figure.savefig(path, format="png", dpi=120)


def run(output: Path, epochs: int = EPOCHS, seed: int = 0) -> int:
    """Train, report to the terminal and write the picture.

    Parameters
    ----------
    output : Path
        Where the PNG goes.
    epochs : int
        Passes over the training set; too few miss the target.
    seed : int
        Of the weights, the order and the noise; the split into training and test set is fixed.

    Returns
    -------
    int
        Exit status: 0 if the test accuracy reaches `TARGET_ACCURACY` and the bits agree, else 1.
    """
    start, rng = time.perf_counter(), np.random.default_rng(seed)
    digits, weights = load_data(), initial_weights(rng)
    sizes, count = [len(y) for _, y in digits.values()], sum(w.size for w in weights.values())
    print(f"""adamax_ext {__version__} on handwritten digits, 8 x 8 pixels each
  data       {sizes[0]:,} images to learn from, {sizes[1]} held out
  network    64 -> {HIDDEN_UNITS} (ReLU) -> 10 in NumPy, {count:,} float32 parameters
  optimizer  Adamax on {active_isa()}: cosine schedule with warm-up, weight decay without
             biases, clipping by the global norm, averaged weights\n""")
    sys.stdout.flush()  # the progress bar goes to stderr
    optimizer, yardstick, history = train(weights, digits, epochs, rng)
    same_bits = yardstick.same_bits(weights, optimizer)
    raw = accuracy(weights, *digits["test set"])
    optimizer.finalize_variable_values()  # the weights become their averages
    averaged = accuracy(weights, *digits["test set"])
    draw(history, output)
    native, plain = median(history.native_us), median(history.numpy_us)
    reached = averaged >= TARGET_ACCURACY
    print(f"""
test accuracy   {averaged:.2%} with averaged weights, {raw:.2%} without
                target {TARGET_ACCURACY:.0%}: {"reached" if reached else "MISSED"}
optimizer step  {native:.1f} us, the same formula in plain NumPy {plain:.1f} us
                {plain / native:.1f} times as fast (medians of {yardstick.step:,} steps, in turns)
same bits       {"yes" if same_bits else "NO"}: weights, moments and averages of both, at the end
picture         {output}
time            {time.perf_counter() - start:.1f} s""")
    return 0 if reached and same_bits else 1

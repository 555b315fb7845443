"""Trains a network on handwritten digits with torch's Adamax, and with one import changed.

pip install ".[demo,torch]" && python examples/torch_digits.py
"""

import argparse
import hashlib
import os
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
from adamax_ext.torch import Adamax  # instead of: from torch.optim import Adamax
from matplotlib.figure import Figure  # no pyplot: it would choose a display backend
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

TARGET_ACCURACY = 0.95
BATCH, PEAK, WEIGHT_DECAY, CLIP = 64, 0.01, 1e-4, 1.0
STATE = ("model", "optimizer", "schedule")  # what a checkpoint has of a run, with its history


def load_data():
    """Return images (n, 64) in [0, 1] and labels (n,): to learn from, and held out."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=450, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.tensor, parts)
    return (train_x.float(), train_y), (test_x.float(), test_y)


class Run:
    """A training with one of the optimizers, and what the picture shows of it."""

    def __init__(self, optimizer_class, epochs, data):
        self.train_set, self.test_set = data
        torch.manual_seed(0)
        layers = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(256, 10))
        self.optimizer = optimizer_class(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        steps = epochs * -(-len(self.train_set[0]) // BATCH)
        # The rate warms up and decays, the first of the betas goes the other way.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK, steps)
        self.history = {"loss": [], "accuracy": [], "step_us": [], "all_us": []}

    def train_epoch(self, epoch):
        """Train on every image once; order and dropout depend on nothing but the epoch."""
        torch.manual_seed(1 + epoch)  # so a resumed run goes on with the same random numbers
        (x, y), model, losses = self.train_set, self.model.train(), []
        for batch in torch.randperm(len(x)).split(BATCH):
            start = perf_counter()
            # bfloat16 has the range of float32: the loss need not be scaled.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            before_step = perf_counter()
            self.optimizer.step()
            self.history["step_us"].append(1e6 * (perf_counter() - before_step))
            self.optimizer.zero_grad()
            self.schedule.step()
            losses.append(loss.item())
            self.history["all_us"].append(1e6 * (perf_counter() - start))
        self.history["loss"].append(mean(losses))
        (x, y), model = self.test_set, self.model.eval()
        with torch.no_grad():
            self.history["accuracy"].append((model(x).argmax(dim=1) == y).float().mean().item())

    def step_times(self):
        """Return microseconds in the optimizer, and of a whole training step."""
        return median(self.history["step_us"]), median(self.history["all_us"])

    def weights_digest(self):
        """Return a short name for the bits of all weights."""
        bits = b"".join(w.numpy().tobytes() for w in self.model.state_dict().values())
        return hashlib.sha256(bits).hexdigest()[:16]

    def state_dict(self):
        return {"history": self.history} | {k: getattr(self, k).state_dict() for k in STATE}

    def load_state_dict(self, state):
        self.history = state["history"]
        for key in STATE:
            getattr(self, key).load_state_dict(state[key])


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
        times.barh(i, in_step, 0.6, color="C1", label=None if i else "optimizer.step()")
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
    figure.suptitle("Handwritten digits in torch, autocast to bfloat16: one import changed")
    figure.savefig(path, format="png", dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default="torch_digits.png", help="the picture")
    parser.add_argument("--checkpoint", type=Path, default="torch_digits.pt")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="EPOCH", help="as if interrupted")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # more would mostly wait for each other
    classes, data = {"adamax_ext.torch": Adamax, "torch.optim": torch.optim.Adamax}, load_data()
    runs = {name: Run(cls, args.epochs, data) for name, cls in classes.items()}
    saved = torch.load(args.checkpoint, weights_only=True) if args.resume else {"done": 0}
    if saved.get("epochs", args.epochs) != args.epochs:
        parser.error(f"the schedule of the checkpoint is made for --epochs {saved['epochs']}")
    for name in runs.keys() & saved.keys():
        runs[name].load_state_dict(saved[name])
    for epoch in range(saved["done"], args.epochs):
        for run in runs.values():
            run.train_epoch(epoch)
        states = {name: run.state_dict() for name, run in runs.items()}
        unfinished = args.checkpoint.with_suffix(".unfinished")
        torch.save({"epochs": args.epochs, "done": epoch + 1, **states}, unfinished)
        os.replace(unfinished, args.checkpoint)  # so there is always a whole one
        if epoch + 1 == args.stop_after:
            return print(f"stopped after epoch {epoch + 1} of {args.epochs}: --resume goes on")
    for name, run in runs.items():
        in_step, in_all = run.step_times()
        print(f"{name:16}  held-out accuracy {run.history['accuracy'][-1]:.2%}, optimizer", end=" ")
        print(f"{in_step:.0f} us ({in_step / in_all:.0%}) a step, weights {run.weights_digest()}")
    draw(runs, args.output)
    print(f"picture           {args.output}")
    return 0 if runs["adamax_ext.torch"].history["accuracy"][-1] > TARGET_ACCURACY else 1


if __name__ == "__main__":
    raise SystemExit(main())

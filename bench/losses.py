"""Final losses and times of trainings, for each way of keeping weights and state, over five seeds.

Run as ``python bench/losses.py``, with torch and scikit-learn. The 8-bit optimizers of torchao and
bitsandbytes take part where they are installed, beside torch's own with the same rule.
"""

import argparse
import datetime
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import adamax_ext
import torch
from adamax_ext.torch import Adamax
from machine import default_name, machine, machine_text, versions
from rows import table
from sklearn.datasets import load_digits
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))
import torch_bf16  # noqa: E402

SEEDS = range(5)
FIRST = "float32, state in 32 bits"
Training = Callable[[Callable[[Any], Any], torch.dtype, int], float]


def digits_and_model(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, nn.Module]:
    images, labels = load_digits(return_X_y=True)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 10)]
    return (
        torch.tensor(images / 16).to(dtype),
        torch.tensor(labels),
        nn.Sequential(*layers).to(dtype),
    )


def train_batch(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x).float(), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def digits(make_optimizer: Callable[[Any], Any], dtype: torch.dtype, seed: int) -> float:
    """Return the loss on all digits after 2,000 steps; the rate decays as a cosine."""
    x, y, model = digits_and_model(dtype, seed)
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        batch = torch.randint(len(x), (64,))
        train_batch(model, optimizer, x[batch], y[batch])
        schedule.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x).float(), y).item()


def time_to_accuracy(
    make_optimizer: Callable[[Any], Any], dtype: torch.dtype, seed: int
) -> dict[str, float]:
    """Return steps, and their seconds, until 97 % of the digits held out are told rightly.

    Those are every fifth. They are looked at after every 25 steps, which is not timed; NaN if it
    takes more than 5,000.
    """
    x, y, model = digits_and_model(dtype, seed)
    optimizer = make_optimizer(model.parameters())
    is_held_out = torch.arange(len(x)) % 5 == 0
    shown = is_held_out.logical_not().nonzero()[:, 0]
    seconds = 0.0
    for steps in range(25, 5001, 25):
        batches = shown[torch.randint(len(shown), (25, 64))]
        start = time.perf_counter()
        for batch in batches:
            train_batch(model, optimizer, x[batch], y[batch])
        seconds += time.perf_counter() - start
        with torch.no_grad():
            is_right = model(x[is_held_out]).argmax(1) == y[is_held_out]
        if is_right.float().mean() >= 0.97:
            return {"steps": steps, "seconds": seconds}
    return {"steps": math.nan, "seconds": math.nan}


def transformer(make_optimizer: Callable[[Any], Any], dtype: torch.dtype, seed: int) -> float:
    """Return the held-out loss of examples/torch_bf16.py."""
    _, held_out, _ = torch_bf16.train(make_optimizer, dtype, 400, seed)
    return float(held_out)


TRAININGS: dict[str, tuple[Training, float]] = {  # with a learning rate
    "digits": (digits, 1e-3),
    "transformer": (transformer, torch_bf16.PEAK),
}


def contestants() -> dict[str, tuple[torch.dtype, Callable[..., Any]]]:
    """Return the type of the weights, and what makes an optimizer of parameters and a rate."""
    found: dict[str, tuple[torch.dtype, Callable[..., Any]]] = {}
    for rounding in ("", "nearest", "stochastic", "remainder"):
        dtype = torch.bfloat16 if rounding else torch.float32
        for bits in (32, 16, 8):
            name = f"{str(dtype)[6:]} {rounding}".strip() + f", state in {bits} bits"
            options = {"weight_rounding": rounding or "nearest", "state_bits": bits}
            found[name] = dtype, partial(Adamax, **options)
    found["torch.optim.Adam"] = torch.float32, torch.optim.Adam
    for library in ("bitsandbytes", "torchao"):
        try:
            optimizers = importlib.import_module(f"{library}.optim")
        except ImportError as error:
            print(f"{library} is left out: {error}")
        else:
            found[f"{library} Adam8bit"] = torch.float32, optimizers.Adam8bit
    return found


Losses = dict[str, dict[str, list[float]]]  # by training and contestant, of each seed
Times = dict[str, list[dict[str, float]]]  # by contestant


def report(losses: Losses, times: Times) -> str:
    """Return a table: means, how far from the first of the same rule, and medians of times."""
    lines = []
    for name in times:
        line = [name]
        for of_training in losses.values():
            first = of_training["torch.optim.Adam" if "Adam" in name else FIRST]
            mean, spread = statistics.mean(of_training[name]), statistics.stdev(of_training[name])
            distance = (mean - statistics.mean(first)) / statistics.stdev(first)
            line += [f"{mean:.5f} ({spread:.5f})", f"{distance:+.2f}"]
        for key, form in (("steps", ".0f"), ("seconds", ".2f")):
            line.append(format(statistics.median(one[key] for one in times[name]), form))
        lines.append(line)
    header = ["weights and state"]
    for training in losses:
        header += [f"{training}: final loss (std)", "from float32, in std"]
    header += ["steps to 97 % of digits", "seconds"]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a second one would mostly wait
    losses: Losses = {}
    for training, (train, rate) in TRAININGS.items():
        losses[training] = {}
        for name, (dtype, make) in contestants().items():
            losses[training][name] = [train(partial(make, lr=rate), dtype, s) for s in SEEDS]
            print(f"{training}, {name}: {losses[training][name]}", flush=True)
    times: Times = {name: [] for name in contestants()}
    for seed in SEEDS:  # in turns, as the speed of a machine drifts
        for name, (dtype, make) in contestants().items():
            times[name].append(time_to_accuracy(partial(make, lr=2e-3), dtype, seed))
    parts = [
        f"# Final losses and times of training, {datetime.date.today()}\n",
        f"`python bench/losses.py`, one thread, {len(SEEDS)} seeds: means, and medians of times.\n",
        f"{machine_text(machine())}; {adamax_ext.build_info()['isa_active']}.\n",
        f"Versions: {', '.join(' '.join(item) for item in versions().items())}.\n",
        report(losses, times),
    ]
    (options.out / default_name("losses")).with_suffix(".md").write_text("\n".join(parts))
    print(parts[-1])


if __name__ == "__main__":
    main()

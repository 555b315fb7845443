"""Trains a small transformer with weights in bfloat16, and no float32 copy of them.

Rounded to nearest, most steps are too small to change a weight; rounded at random, or with a
remainder of 16 bits, none is lost. State takes 8 bits an element and moment.

pip install ".[demo,torch]" && python examples/torch_bf16.py
"""

import argparse
import math
import sysconfig
from functools import partial
from pathlib import Path

import torch
from adamax_ext.torch import Adamax
from matplotlib.figure import Figure  # no pyplot: it would choose a display backend
from torch import nn

CONTEXT, WIDTH, HEADS, BLOCKS, BATCH = 64, 64, 4, 2, 16
PEAK, WARMUP = 5e-4, 20
# Sources of Python's standard library, which every machine has, are the text.
MODULES = ["argparse", "ast", "difflib", "doctest", "inspect", "optparse", "pydoc", "typing"]
# What is compared: type of the weights, and arguments of the optimizer.
RUNS = {
    "float32, state in 32 bits": (torch.float32, {}),
    "bfloat16, nearest": (torch.bfloat16, {}),
    "bfloat16, stochastic, state in 8 bits": (
        torch.bfloat16,
        {"weight_rounding": "stochastic", "state_bits": 8},
    ),
    "bfloat16, remainder, state in 8 bits": (
        torch.bfloat16,
        {"weight_rounding": "remainder", "state_bits": 8},
    ),
}


def load_text():
    """Return the text as numbers (n,), to learn from and held out, and how many there are."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / f"{name}.py").read_text("ascii", "ignore") for name in MODULES)
    letters = sorted(set(text))
    numbers = torch.tensor([letters.index(letter) for letter in text])
    return *numbers.split([len(text) * 9 // 10, len(text) - len(text) * 9 // 10]), len(letters)


def batch_of(text, generator):
    """Return inputs and the letters that follow them, (BATCH, CONTEXT) each."""
    begins = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    windows = text[begins + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, letters):
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, x):
        x = self.letters(x) + self.places.weight
        return self.head(self.norm(self.blocks(x)))


def loss_of(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):  # nothing new where weights are bfloat16
        letters = model(batch[0])
    return nn.functional.cross_entropy(letters.float().flatten(0, 1), batch[1].flatten())


def rate_at(step, steps):
    """Return the share of the peak: it warms up, and decays as a cosine."""
    return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def train(make_optimizer, dtype, steps, seed=0):
    """Return the losses of a training, held-out loss, and bytes a weight that are kept."""
    learned, held_out, letters = load_text()
    torch.manual_seed(seed)
    model = Transformer(letters).to(dtype)
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        loss = loss_of(model, batch_of(learned, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    generator.manual_seed(0)  # all are tested on the same
    with torch.no_grad():
        tests = [loss_of(model, batch_of(held_out, generator)).item() for _ in range(40)]
    kept = list(model.parameters())
    kept += [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    weights = sum(p.numel() for p in model.parameters())
    return losses, sum(tests) / len(tests), sum(x.nbytes for x in kept) / weights


def draw(results, path):
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (name, (losses, held_out, kept)) in enumerate(results.items()):
        smooth = torch.tensor(losses).unfold(0, 20, 5).mean(-1)
        style = {"color": f"C{i}", "linestyle": ("-", "-", "--", ":")[i]}
        style |= {"linewidth": 5, "alpha": 0.4} if i == 0 else {"linewidth": 2}
        curves.plot(torch.arange(len(smooth)) * 5 + 10, smooth, label=name, **style)
        bars.barh(i, kept, 0.6, color=f"C{i}")
        bars.text(kept, i, f" {kept:.1f} bytes, loss {held_out:.3f}", va="center")
    curves.set(title="Training loss, mean of 20 steps", xlabel="step", ylabel="cross-entropy")
    bars.set(title="Bytes a weight, state included", ylim=(len(results) - 0.4, -0.6))
    bars.set_xlim(0, 24)
    bars.set_yticks([])
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)
    figure.suptitle("A transformer that learns Python, with weights in bfloat16")
    figure.savefig(path, format="png", dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default="torch_bf16.png", help="the picture")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # more would mostly wait for each other
    results = {}
    for name, (dtype, options) in RUNS.items():
        results[name] = train(partial(Adamax, lr=PEAK, **options), dtype, args.steps)
        _, held_out, kept = results[name]
        print(f"{name:38}  held-out loss {held_out:.4f}, {kept:5.2f} bytes a weight", flush=True)
    draw(results, args.output)
    print(f"picture {args.output}")
    exact, nearest, *others = (held_out for _, held_out, _ in results.values())
    return 0 if nearest - exact > 5 * max(abs(other - exact) for other in others) else 1


if __name__ == "__main__":
    raise SystemExit(main())

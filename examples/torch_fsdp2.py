"""Trains a small transformer on digits, sharded over processes: on GPUs if each can have one.

pip install ".[demo]" torch
torchrun --nproc-per-node 2 examples/torch_fsdp2.py --stop-after 6
torchrun --nproc-per-node 1 examples/torch_fsdp2.py --resume
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adamax_ext.torch import AdamaxW
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

TEST, EPOCHS, BATCH = 450, 12, 64  # images, and those of a step in all processes together
PEAK, WEIGHT_DECAY, CLIP = 0.02, 0.01, 1.0


class Transformer(nn.Module):
    """Reads an image as 8 words, its rows."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Linear(8, 64), nn.Parameter(torch.zeros(8, 64))
        kind = {"dim_feedforward": 128, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, **kind) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        words = self.embedding(images.view(-1, 8, 8)) + self.position
        for layer in self.layers:
            words = layer(words)
        return self.head(words.mean(dim=1))


class Run:
    """A training, of which each process has a part of every parameter and of its state."""

    def __init__(self, device):
        self.rank, self.ranks, self.epoch = dist.get_rank(), dist.get_world_size(), 0
        x, y = load_digits(return_X_y=True)
        parts = train_test_split(x / 16, y, test_size=TEST, stratify=y, random_state=0)
        train_x, test_x, train_y, test_y = (torch.tensor(part, device=device) for part in parts)
        self.train_set, self.test_set = (train_x.float(), train_y), (test_x.float(), test_y)
        torch.manual_seed(0)  # the same weights in all processes, before they are shared out
        self.model = Transformer().to(device)
        for module in (*self.model.layers, self.model):
            fully_shard(module)
        self.optimizer = AdamaxW(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * (len(train_x) // BATCH)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK, steps)

    def train_epoch(self):
        self.epoch += 1
        (x, y), model = self.train_set, self.model.train()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.epoch))
        torch.manual_seed(self.epoch * self.ranks + self.rank)  # dropout differs, not the order
        for batch in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            own = batch[self.rank :: self.ranks]
            loss = nn.functional.cross_entropy(model(x[own]), y[own], reduction="sum")
            (loss * (self.ranks / BATCH)).backward()  # FSDP takes the mean over processes
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    @torch.no_grad()
    def report(self):
        x, y = (part[self.rank :: self.ranks] for part in self.test_set)
        correct = (self.model.eval()(x).argmax(dim=1) == y).sum()
        dist.all_reduce(correct)
        if self.rank == 0:
            print(f"epoch {self.epoch}, {self.ranks} processes: accuracy {correct / TEST:.2%}")
        return self.epoch

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        rest = {"schedule": self.schedule.state_dict(), "epoch": self.epoch}
        return {"model": model, "optimizer": optimizer, **rest}

    def resume(self, checkpoint):
        """Go on from a checkpoint, whatever the number of processes that saved it."""
        state = self.state_dict()
        dcp.load(state, checkpoint_id=checkpoint)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts)
        self.schedule.load_state_dict(state["schedule"])
        self.epoch = state["epoch"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=Path, default="torch_fsdp2_checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--stop-after", type=int, default=EPOCHS, metavar="EPOCH")
    args = parser.parse_args()
    has_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    run = Run(device)
    if args.resume:
        run.resume(max(args.checkpoints.glob("epoch_*/.metadata")).parent)  # the last whole one
    while run.report() < args.stop_after:
        run.train_epoch()
    dcp.save(run.state_dict(), checkpoint_id=args.checkpoints / f"epoch_{run.epoch:03}")
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads need the interpreter once more: torch 2.13 aborts without it


if __name__ == "__main__":
    main()

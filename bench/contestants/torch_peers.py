"""Optimizers on torch tensors: torch's own, and DeepSpeed's."""

import math
from typing import Any, ClassVar

import numpy as np

from contestants.base import BETAS, CLIP, EMA, EPSILON, LOSS_SCALE, WEIGHT_DECAY, Contestant, Work


def tensor(array: Any, device: str) -> Any:
    """Return a torch tensor; on the CPU it shares the memory of `array`."""
    import torch

    if array.dtype.name == "bfloat16":  # which torch does not know from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def wait(device: str) -> None:
    """Wait for what is queued on the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def backward(leaves: list[Any]) -> None:
    """Give tensors new gradients, as training does."""
    import torch

    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward([(leaf * leaf).sum() for leaf in leaves])


class Torch(Contestant):
    """A torch optimizer; the full step as torch's users write it, with foreach functions."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    decays_itself = False  # Adamax' own decay is the other kind: it is added to the gradients

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import torch

        self.torch, self.device, self.full, self.rate = torch, device, work.full, rate
        self.params = [torch.nn.Parameter(tensor(p, device)) for p in params]
        size = math.ceil(len(params) / work.groups)
        begins = range(0, len(params), size)
        self.groups = [{"params": self.params[begin : begin + size]} for begin in begins]
        self.decay = WEIGHT_DECAY if work.full else 0.0
        self.averages = [p.detach().clone() for p in self.params] if work.full else []
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Any:
        raise NotImplementedError

    def adamax(self, foreach: bool) -> Any:
        return self.torch.optim.Adamax(self.groups, self.rate, BETAS, EPSILON, foreach=foreach)

    def load(self, grads: list[Any]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            if p.grad is None:
                p.grad = tensor(g, self.device)
            else:
                p.grad.copy_(tensor(g, self.device))

    def backward(self) -> None:
        backward(self.params)

    def step(self) -> None:
        if not self.full:
            self.optimizer.step()
            return
        torch = self.torch
        with torch.no_grad():
            torch._foreach_mul_([p.grad for p in self.params], 1 / LOSS_SCALE)
            torch.nn.utils.clip_grad_norm_(self.params, CLIP, foreach=True)
            if not self.decays_itself:
                torch._foreach_mul_(self.params, 1 - self.rate * WEIGHT_DECAY)
            self.optimizer.step()
            torch._foreach_lerp_(self.averages, self.params, 1 - EMA)

    def finish(self) -> None:
        wait(self.device)

    def weights(self) -> list[Any]:
        return [p.detach().cpu().numpy() for p in self.params]


class TorchLoop(Torch):
    def make_optimizer(self) -> Any:
        return self.adamax(foreach=False)


class TorchForeach(Torch):
    def make_optimizer(self) -> Any:
        return self.adamax(foreach=True)


class TorchCompiled(Torch):
    """The whole step under torch.compile, in the fastest of the ways that torch offers."""

    def make_optimizer(self) -> Any:
        torch = self.torch
        # Else every work counts as one more variant of the same step, and after eight of them torch
        # would go on without compiling.
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        rate = torch.tensor(self.rate, device=self.device)  # a number would be compiled in
        optimizer = torch.optim.Adamax(
            self.params, rate, BETAS, EPSILON, foreach=True, capturable=True
        )
        self.step = torch.compile(super().step)  # type: ignore[method-assign]
        return optimizer


class TorchAdamW(Torch):
    """Another algorithm with the same traffic: what torch's own fused kernel reaches."""

    rule = "AdamW"
    decays_itself = True

    def make_optimizer(self) -> Any:
        return self.torch.optim.AdamW(
            self.groups, self.rate, BETAS, EPSILON, self.decay, fused=True
        )


class Bitsandbytes8(Torch):
    """State in 8 bits: codes of a map, with a scale for each 256 elements."""

    rule = "Adam"
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes", "torch")

    def make_optimizer(self) -> Any:
        from bitsandbytes.optim import Adam8bit

        return Adam8bit(self.params, self.rate, BETAS, EPSILON)

    def state_bytes(self, work: Work) -> int:
        return 1


class Torchao8(Torch):
    """The same codes, under torch.compile; bfloat16 weights are rounded at random."""

    rule = "Adam"
    packages: ClassVar[tuple[str, ...]] = ("torchao", "torch")

    def make_optimizer(self) -> Any:
        from torchao.optim import Adam8bit

        is_small = self.params[0].dtype == self.torch.bfloat16
        return Adam8bit(self.params, self.rate, BETAS, EPSILON, bf16_stochastic_round=is_small)

    def state_bytes(self, work: Work) -> int:
        return 1


class DeepSpeed(Torch):
    """DeepSpeed's Adam for offloading; it compiles itself at its first use, in some minutes."""

    rule = "AdamW"
    environment: ClassVar[dict[str, str]] = {"DS_ACCELERATOR": "cpu"}
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("deepspeed", "torch")
    decays_itself = True

    def make_optimizer(self) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(
            self.params, self.rate, betas=BETAS, eps=EPSILON, weight_decay=self.decay
        )

    def state_bytes(self, work: Work) -> int:
        return 4

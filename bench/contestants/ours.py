"""adamax_ext on several kinds of memory, and the bound of its traffic."""

import ctypes
from functools import partial
from typing import Any, ClassVar

import numpy as np

from contestants.base import (
    BETA_1,
    BETA_2,
    EPSILON,
    FULL_OPTIONS,
    RATE,
    Contestant,
    Turns,
    Work,
)
from contestants.torch_peers import backward, tensor


class BoundStream(ctypes.Structure):
    """`bound_stream` of bench/cpp/bound.hpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes_per_element", ctypes.c_int32),
        ("written", ctypes.c_int32),
    )


class AdamaxExt(Contestant):
    """`adamax_ext.Adamax` on NumPy arrays."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "numpy")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import adamax_ext

        self.work, self.params = work, params
        self.optimizer = adamax_ext.Adamax(
            rate, BETA_1, BETA_2, EPSILON, **(FULL_OPTIONS if work.full else {})
        )
        self.optimizer.build(params)

    def load(self, grads: list[Any]) -> None:
        self.grads = grads

    def step(self) -> None:
        self.optimizer.apply(self.grads)

    def weights(self) -> list[Any]:
        return self.params

    def state_bytes(self, work: Work) -> int:
        return 4

    def turns(self, bound_library: str | None, threads: int) -> Turns:
        """The step, and the bound of its traffic in each of its variants.

        On the memory of the step if that is one array, so that physical pages are the same; many
        arrays are compared with one flat buffer.
        """
        if bound_library is None:
            return {"step": self.step}
        library = ctypes.CDLL(bound_library)
        library.bound_pass.argtypes = [
            ctypes.POINTER(BoundStream),
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int,
        ]
        if len(self.params) == 1:
            kinds = self.optimizer.state["variable_0"]
            states = [kinds[kind] for kind in ("momentum", "norm", "average") if kind in kinds]
            arrays = [self.params[0], self.grads[0], *states]
        else:
            itemsizes = [self.params[0].itemsize, self.grads[0].itemsize, 4, 4]
            arrays = [np.ones(self.work.elements * size, np.uint8) for size in itemsizes]
        self.bound_arrays = arrays  # alive as long as the turns
        elements = self.work.elements

        def streams(*indices: int) -> Any:
            return (BoundStream * len(indices))(
                *(
                    BoundStream(arrays[i].ctypes.data, arrays[i].nbytes // elements, i != 1)
                    for i in indices
                )
            )

        passes = [streams(*range(len(arrays)))]
        if self.work.full:
            passes.insert(0, streams(1))  # the norm

        def bound(variant: int, count: int) -> None:
            for each in passes:
                if not library.bound_pass(each, len(each), elements, count, variant):
                    raise ValueError(f"the bound is not built for the streams of {self.work.name}")

        turns: Turns = {"step": self.step}
        # As many threads as the step uses, which wakes one for each MiB that it reads.
        count = min(threads, max(1, 16 * elements // 2**20))
        for variant in range(library.bound_variants()):
            turns[f"bound {variant}"] = partial(bound, variant, count)
        return turns


class AdamaxExtFlat(AdamaxExt):
    """The same elements in one array: what many arrays cost more than that."""

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        flat = np.concatenate([p.ravel() for p in params])
        super().__init__(
            Work(work.name, (flat.shape,), work.dtype, work.full), device, [flat], rate
        )

    def load(self, grads: list[Any]) -> None:
        super().load([np.concatenate([g.ravel() for g in grads])])


class AdamaxExtTorch(AdamaxExt):
    """`adamax_ext.Adamax` on torch tensors, on the device."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "torch")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import torch

        self.device, self.torch = device, torch
        tensors = [tensor(p, device).requires_grad_(work.after_backward) for p in params]
        super().__init__(work, device, tensors, rate)

    def load(self, grads: list[Any]) -> None:
        super().load([tensor(g, self.device) for g in grads])

    def backward(self) -> None:
        backward(self.params)

    def step(self) -> None:
        if self.work.after_backward:  # torch's optimizers collect them, too
            self.grads = [p.grad for p in self.params]
        super().step()

    def finish(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def weights(self) -> list[Any]:
        return [p.detach().cpu().numpy() for p in self.params]

    def turns(self, bound_library: str | None, threads: int) -> Turns:
        if self.device == "cpu":
            return {"step": self.step}
        self.copy = DeviceCopy(self.work, self.device, [], RATE)
        return {"step": self.step, "bound 0": self.copy.step}


class DeviceCopy(Contestant):
    """The bound on a GPU: a copy on the device with the traffic of a step."""

    rule = "copy"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import torch

        self.torch = torch
        half = work.elements * work.bytes_per_element(state=4) // 2
        self.source = torch.ones(half, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def load(self, grads: list[Any]) -> None:
        pass

    def step(self) -> None:
        self.target.copy_(self.source)

    def finish(self) -> None:
        self.torch.cuda.synchronize()

    def state_bytes(self, work: Work) -> int:
        return 4

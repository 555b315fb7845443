"""adamax_ext on several kinds of memory, and the bound of its traffic."""

import ctypes
from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar

import numpy as np

from contestants.base import (
    BETAS,
    CLIP,
    EPSILON,
    FULL_OPTIONS,
    ITEMSIZES,
    LOSS_SCALE,
    RATE,
    WEIGHT_DECAY,
    Contestant,
    Turns,
    Work,
)
from contestants.jax_peers import Keras, KerasJax, KerasTorch, Optax
from contestants.torch_peers import Torch, backward, tensor, wait

IN_8_BITS = {"state_bits": 8, "weight_rounding": "stochastic"}
STATE_BYTES = {**dict.fromkeys(ITEMSIZES, 4), "float64": 8}


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
    options: ClassVar[dict[str, Any]] = {}  # beside those of the work

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import adamax_ext

        self.work, self.params = work, params
        self.optimizer = adamax_ext.Adamax(
            rate, *BETAS, EPSILON, **(FULL_OPTIONS if work.full else {}), **self.options
        )
        self.optimizer.build(params)

    def load(self, grads: list[Any]) -> None:
        self.grads = grads

    def step(self) -> None:
        self.optimizer.apply(self.grads)

    def weights(self) -> list[Any]:
        return self.params

    def state_bytes(self, work: Work) -> int:
        return self.options.get("state_bits", 8 * STATE_BYTES[work.dtype]) // 8

    def turns(self, bound: str | None, threads: int) -> Turns:
        """The step, and the bound of its traffic in each of its variants.

        On the memory of the step if that is one array, so that physical pages are the same; many
        arrays are compared with one flat buffer.
        """
        if bound is None:
            return {"step": self.step}
        library = ctypes.CDLL(bound)
        library.bound_pass.argtypes = [
            *(ctypes.POINTER(BoundStream), ctypes.c_int, ctypes.c_int64),
            *(ctypes.c_int, ctypes.c_int),
        ]
        elements = self.work.elements
        # As many threads as the step uses, which wakes one for each MiB that it reads.
        count = min(threads, max(1, 16 * elements // 2**20))
        if len(self.params) == 1:
            kinds = self.optimizer.state["variable_0"]
            states = [kinds[kind] for kind in ("momentum", "norm", "average") if kind in kinds]
            own = [self.params[0], self.grads[0], *states]
            # NumPy's large arrays begin 16 bytes past a cache line, which costs a bound, too.
            memory = {"bound": own, "aligned bound": [aligned(array.nbytes) for array in own]}
        else:
            itemsizes = [self.params[0].itemsize, self.grads[0].itemsize, 4, 4]
            memory = {"bound": [aligned(elements * size) for size in itemsizes]}
        self.memory = memory  # alive as long as the turns

        def do_bound(passes: list[Any], variant: int) -> None:
            for each in passes:
                if not library.bound_pass(each, len(each), elements, count, variant):
                    raise ValueError(f"the bound is not built for the streams of {self.work.name}")

        turns: Turns = {"step": self.step}
        for name, arrays in memory.items():
            streams = [
                BoundStream(array.ctypes.data, array.nbytes // elements, i != 1)
                for i, array in enumerate(arrays)
            ]
            passes = [(BoundStream * len(streams))(*streams)]
            if self.work.full:
                passes.insert(0, (BoundStream * 1)(streams[1]))  # the norm
            for variant in range(library.bound_variants()):
                turns[f"{name} {variant}"] = partial(do_bound, passes, variant)
        return turns


def aligned(size: int) -> np.ndarray[Any, Any]:
    """Return so many bytes from the begin of a cache line on."""
    memory = np.ones(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size]


class AdamaxExtFlat(AdamaxExt):
    """The same elements in one array: what many arrays cost more than that."""

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        flat = np.concatenate([p.ravel() for p in params])
        super().__init__(
            Work(work.name, (flat.shape,), work.dtype, work.full), device, [flat], rate
        )

    def load(self, grads: list[Any]) -> None:
        super().load([np.concatenate([g.ravel() for g in grads])])


class AdamaxExt16(AdamaxExt):
    """State in 16 bits, whose first moments are rounded at random."""

    options: ClassVar[dict[str, Any]] = {"state_bits": 16}
    tolerance = 2e-2


class AdamaxExt8(AdamaxExt):
    """State in 8 bits; bfloat16 weights are rounded at random."""

    options: ClassVar[dict[str, Any]] = IN_8_BITS


class AdamaxExtTorch(AdamaxExt):
    """`adamax_ext.Adamax` on torch tensors, on the device."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "torch")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        self.device = device
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
        wait(self.device)

    def weights(self) -> list[Any]:
        return [p.detach().cpu().numpy() for p in self.params]

    def turns(self, bound: str | None, threads: int) -> Turns:
        import adamax_ext

        turns: Turns = {"step": self.step}
        if self.work.norm:
            turns = {"step": partial(adamax_ext.global_norm, self.grads)}
        elif self.work.groups > 1:
            turns = {"step": Groups(self.params, self.optimizer.state.values(), self.grads).step}
        return turns if bound is None else {**turns, **device_bounds(self.work, self.device)}


class AdamaxExtClass(Torch):
    """`adamax_ext.torch.Adamax` where torch's users write `torch.optim.Adamax`."""

    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "torch")
    decays_itself = True
    options: ClassVar[dict[str, Any]] = {}

    def make_optimizer(self) -> Any:
        from adamax_ext.torch import Adamax

        return Adamax(
            *(self.groups, self.rate, BETAS, EPSILON, self.decay),
            decoupled_weight_decay=True,
            **self.options,
        )

    def state_bytes(self, work: Work) -> int:
        return self.options.get("state_bits", 8 * STATE_BYTES[work.dtype]) // 8


class AdamaxExtClass8(AdamaxExtClass):
    """The same with state in 8 bits; bfloat16 weights are rounded at random."""

    options: ClassVar[dict[str, Any]] = IN_8_BITS


class AdamaxExtJax(Optax):
    """`adamax_ext.jax.adamax` where `optax.adamax` stands, with its fused step."""

    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "optax", "jax", "jaxlib")

    def make_optimizer(self) -> Any:
        from adamax_ext.jax import adamax

        return adamax(self.rate, *BETAS, EPSILON, WEIGHT_DECAY if self.full else 0.0)

    def apply(self, optimizer: Any, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        scale = 1.0
        if self.full:
            norm = self.optax.global_norm(grads)
            # Of max(norm / LOSS_SCALE / CLIP, 1) * LOSS_SCALE: unscales and clips.
            scale = self.jax.numpy.maximum(norm / CLIP, LOSS_SCALE)
        done: tuple[Any, Any] = optimizer.apply(params, grads, state, scale)
        return done

    def state_bytes(self, work: Work) -> int:
        return STATE_BYTES[work.dtype]


class OurKeras(Keras):
    """`adamax_ext.keras.Adamax` where Keras' users write `keras.optimizers.Adamax`."""

    def optimizer_class(self) -> Any:
        from adamax_ext.keras import Adamax

        return Adamax

    def state_bytes(self, work: Work) -> int:
        return STATE_BYTES[work.dtype]


class AdamaxExtKerasTorch(OurKeras, KerasTorch):
    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "keras", "torch")


class AdamaxExtKerasJax(OurKeras, KerasJax):
    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "keras", "jax", "jaxlib")


def device_bounds(work: Work, device: str) -> Turns:
    """What moves the bytes of a step on a GPU: a copy; for a norm, which writes none, or a read."""
    import torch

    traffic = work.elements * work.bytes_per_element(STATE_BYTES[work.dtype])
    memory = torch.empty(traffic, dtype=torch.uint8, device=device).random_()
    source, target = memory.chunk(2)
    turns: Turns = {"bound: device copy": partial(target.copy_, source)}
    if work.norm:
        turns["bound: device read"] = memory.view(torch.float32).sum
    return turns


class Groups:
    """A step on variables that are a group each: a word of the core, not of our optimizer yet."""

    def __init__(self, params: list[Any], states: Collection[dict[str, Any]], grads: list[Any]):
        from adamax_ext import _core

        self.groups, self.call = tuple(_core.Group() for _ in params), _core.Call()
        for group in self.groups:
            group.learning_rate, group.epsilon = RATE, EPSILON
            group.beta_1, group.beta_2 = BETAS
        momentum, norm = ([state[kind] for state in states] for kind in ("momentum", "norm"))
        self.plan = _core.Plan(
            tuple(params),
            [f"{i}" for i in range(len(params))],
            range(len(params)),
            momentum=momentum,
            norm=norm,
            averages=None,
            accumulators=None,
        )
        self.grads = tuple(grads)

    def step(self) -> None:
        for group in self.groups:
            group.step += 1
        self.plan.step(self.grads, None, self.groups, self.call)

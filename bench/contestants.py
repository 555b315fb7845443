"""How each library does a training step: a class a contestant, and the process that runs it.

`python bench/contestants.py NAME DEVICE THREADS` is such a process: it reads commands as JSON lines
and answers each with one. bench/peers.py starts one for each contestant, because Keras wants its
backend before the import, OpenMP runtimes disturb each other, and peak memory is per process.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

RATE, BETA_1, BETA_2, EPSILON = 0.01, 0.9, 0.999, 1e-7
WEIGHT_DECAY, CLIP, EMA = 0.01, 1.0, 0.99
# Unscaling doubles the gradients and clipping, which always applies, sets their norm to 1: a
# library that does both in place finds the same gradients at every step, as in training.
LOSS_SCALE = 0.5
ADAM_RATE = 0.002  # for training: Adam wants smaller steps
PAUSE = 0.01  # seconds before a turn: threads of the process before have stopped spinning
LEAST_TIMED = 0.02  # seconds of timed work in a turn

Turns = dict[str, Callable[[], object]]  # what can be timed, by name


@dataclass(frozen=True)
class Work:
    """What is to be done in a step: arrays of these shapes; plain, or full (see peers.py)."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"
    full: bool = False

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def bytes_per_element(self, state: int) -> int:
        """Traffic of a step in one pass, and of one more over the gradients for their norm."""
        weight = 2 if self.dtype == "bfloat16" else 4
        return 3 * weight + 4 * state + (weight + 2 * state if self.full else 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Work":
        return cls(**{**fields, "shapes": tuple(tuple(shape) for shape in fields["shapes"])})


class Contestant:
    """A library with arrays of a work: `load` gradients, then `step` as often as wanted."""

    rule: ClassVar[str] = "Adamax"
    environment: ClassVar[dict[str, str]] = {}  # what must be set before the process starts
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions matter

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        """Take over `params`, arrays in host memory, and allocate the state."""
        raise NotImplementedError

    def load(self, grads: list[Any]) -> None:
        """Put gradients, arrays in host memory, where the library wants them."""
        raise NotImplementedError

    def step(self) -> None:
        """Do a step, or enqueue it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait for the steps to end."""

    def weights(self) -> list[Any]:
        """Return the weights in host memory."""
        raise NotImplementedError

    def turns(self, bound_library: str | None, threads: int) -> Turns:
        """What can be timed on these arrays."""
        return {"step": self.step}

    def state_bytes(self, work: Work) -> int:
        """Bytes an element of the first moment; most keep it in the dtype of the weights."""
        return 2 if work.dtype == "bfloat16" else 4


class NumPy(Contestant):
    """The formula, a line an expression; NumPy runs it on one thread."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("numpy",)

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        if work.dtype != "float32":
            raise NotImplementedError(f"the formula is written for float32; received {work.dtype}")
        self.params, self.full, self.rate, self.t = params, work.full, rate, 0
        self.m, self.u = ([np.zeros_like(p) for p in params] for _ in range(2))
        self.averages = [p.copy() for p in params] if work.full else []

    def load(self, grads: list[Any]) -> None:
        self.grads = grads

    def step(self) -> None:
        f32 = np.float32
        self.t += 1
        grads = self.grads
        if self.full:
            grads = [g * f32(1 / LOSS_SCALE) for g in grads]
            norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads))
            grads = [g * f32(min(CLIP / norm, 1.0)) for g in grads]
            for w in self.params:
                w -= w * f32(self.rate * WEIGHT_DECAY)
        rate = f32(self.rate / (1 - BETA_1**self.t))
        for w, g, m, u in zip(self.params, grads, self.m, self.u, strict=True):
            m += (g - m) * f32(1 - BETA_1)
            np.maximum(u * f32(BETA_2), np.abs(g), out=u)
            w -= rate * m / (u + f32(EPSILON))
        for w, average in zip(self.params, self.averages, strict=self.full):
            average += (w - average) * f32(1 - EMA)

    def weights(self) -> list[Any]:
        return self.params


# ---- adamax_ext and the bound --------------------------------------------------------------------


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
        full: dict[str, Any] = {
            "weight_decay": WEIGHT_DECAY,
            "global_clipnorm": CLIP,
            "loss_scale_factor": LOSS_SCALE,
            "use_ema": True,
            "ema_momentum": EMA,
        }
        self.optimizer = adamax_ext.Adamax(
            rate, BETA_1, BETA_2, EPSILON, **(full if work.full else {})
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

    def turns(self, bound_library: str | None, threads: int) -> Turns:
        return {"step": self.step}


class AdamaxExtTorch(AdamaxExt):
    """`adamax_ext.Adamax` on torch tensors, on the device."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ("adamax_ext", "torch")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import torch

        self.device, self.torch = device, torch
        super().__init__(work, device, [tensor(p, device) for p in params], rate)

    def load(self, grads: list[Any]) -> None:
        super().load([tensor(g, self.device) for g in grads])

    def finish(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def weights(self) -> list[Any]:
        return [p.cpu().numpy() for p in self.params]

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


# ---- torch ---------------------------------------------------------------------------------------


def tensor(array: Any, device: str) -> Any:
    """Return a torch tensor; on the CPU it shares the memory of `array`."""
    import torch

    if array.dtype.name == "bfloat16":  # which torch does not know from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


class Torch(Contestant):
    """A torch optimizer; the full step as torch's users write it, with foreach functions."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    decays_itself = False  # Adamax' own decay is the other kind: it is added to the gradients

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import torch

        self.torch, self.device, self.full, self.rate = torch, device, work.full, rate
        self.params = [torch.nn.Parameter(tensor(p, device)) for p in params]
        self.averages = [p.detach().clone() for p in self.params] if work.full else []
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Any:
        raise NotImplementedError

    def adamax(self, foreach: bool) -> Any:
        betas = (BETA_1, BETA_2)
        return self.torch.optim.Adamax(self.params, self.rate, betas, EPSILON, foreach=foreach)

    def load(self, grads: list[Any]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            if p.grad is None:
                p.grad = tensor(g, self.device)
            else:
                p.grad.copy_(tensor(g, self.device))

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
        if self.device == "cuda":
            self.torch.cuda.synchronize()

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
            self.params, rate, (BETA_1, BETA_2), EPSILON, foreach=True, capturable=True
        )
        self.step = torch.compile(super().step)  # type: ignore[method-assign]
        return optimizer


class TorchAdamW(Torch):
    """Another algorithm with the same traffic: what torch's own fused kernel reaches."""

    rule = "AdamW"
    decays_itself = True

    def make_optimizer(self) -> Any:
        decay = WEIGHT_DECAY if self.full else 0.0
        return self.torch.optim.AdamW(
            self.params, self.rate, (BETA_1, BETA_2), EPSILON, decay, fused=True
        )


class DeepSpeed(Torch):
    """DeepSpeed's Adam for offloading; it compiles itself at its first use, in some minutes."""

    rule = "AdamW"
    environment: ClassVar[dict[str, str]] = {"DS_ACCELERATOR": "cpu"}
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("deepspeed", "torch")
    decays_itself = True

    def make_optimizer(self) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        decay = WEIGHT_DECAY if self.full else 0.0
        return DeepSpeedCPUAdam(
            self.params, self.rate, betas=(BETA_1, BETA_2), eps=EPSILON, weight_decay=decay
        )

    def state_bytes(self, work: Work) -> int:
        return 4


# ---- JAX and Keras -------------------------------------------------------------------------------


class Optax(Contestant):
    """`optax.adamax` (`adamaxw` for the full step), all of a step in one jit, state donated."""

    packages: ClassVar[tuple[str, ...]] = ("optax", "jax", "jaxlib")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import jax
        import optax

        self.jax = jax
        betas = {"b1": BETA_1, "b2": BETA_2, "eps": EPSILON}
        optimizer = optax.adamax(rate, **betas)
        if work.full:
            optimizer = optax.chain(
                optax.scale(1 / LOSS_SCALE),
                optax.clip_by_global_norm(CLIP),
                optax.adamaxw(rate, **betas, weight_decay=WEIGHT_DECAY),
            )

        def step(params: Any, state: Any, averages: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if work.full:
                averages = optax.incremental_update(params, averages, 1 - EMA)
            return params, state, averages

        self.compiled = jax.jit(step, donate_argnums=(0, 1, 2))
        self.params = [jax.numpy.array(p) for p in params]
        self.averages = [jax.numpy.array(p) for p in params] if work.full else []
        self.state = optimizer.init(self.params)

    def load(self, grads: list[Any]) -> None:
        self.grads = [self.jax.numpy.array(g) for g in grads]

    def step(self) -> None:
        self.params, self.state, self.averages = self.compiled(
            self.params, self.state, self.averages, self.grads
        )

    def finish(self) -> None:
        self.jax.block_until_ready(self.params)

    def weights(self) -> list[Any]:
        # Copies: a buffer that somebody looks at cannot be donated.
        return [np.array(p) for p in self.params]


class Keras(Contestant):
    """`keras.optimizers.Adamax` with its own arguments for the full step."""

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import keras

        full: dict[str, Any] = {
            "weight_decay": WEIGHT_DECAY,
            "global_clipnorm": CLIP,
            "loss_scale_factor": LOSS_SCALE,
            "use_ema": True,
            "ema_momentum": EMA,
        }
        self.keras, self.dtype, self.device = keras, work.dtype, device
        self.variables = [keras.Variable(p, dtype=work.dtype) for p in params]
        self.optimizer = keras.optimizers.Adamax(
            rate, BETA_1, BETA_2, EPSILON, **(full if work.full else {})
        )
        self.optimizer.build(self.variables)

    def load(self, grads: list[Any]) -> None:
        convert = self.keras.ops.convert_to_tensor
        self.grads = [convert(g, dtype=self.dtype) for g in grads]

    def weights(self) -> list[Any]:
        return [self.keras.ops.convert_to_numpy(v) for v in self.variables]


class KerasTorch(Keras):
    environment: ClassVar[dict[str, str]] = {"KERAS_BACKEND": "torch"}
    packages: ClassVar[tuple[str, ...]] = ("keras", "torch")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        super().__init__(work, device, params, rate)
        if self.variables[0].value.device.type != device:  # Keras takes what there is
            raise RuntimeError(f"Keras' torch backend found no {device} device")

    def step(self) -> None:
        self.optimizer.apply(self.grads)

    def finish(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


class KerasJax(Keras):
    """What Keras' own training loop does with JAX: a jit of `stateless_apply`, state donated."""

    environment: ClassVar[dict[str, str]] = {"KERAS_BACKEND": "jax"}
    packages: ClassVar[tuple[str, ...]] = ("keras", "jax", "jaxlib")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        super().__init__(work, device, params, rate)
        import jax

        self.jax = jax
        self.compiled = jax.jit(self.optimizer.stateless_apply, donate_argnums=(0, 2))
        self.state = [v.value for v in self.optimizer.variables]
        self.values = [v.value for v in self.variables]

    def step(self) -> None:
        self.values, self.state = self.compiled(self.state, self.grads, self.values)

    def finish(self) -> None:
        self.jax.block_until_ready(self.values)

    def weights(self) -> list[Any]:
        return [np.array(value) for value in self.values]


class KerasTensorflow(Keras):
    """What Keras' own training loop does with TensorFlow: a tf.function, compiled by XLA."""

    environment: ClassVar[dict[str, str]] = {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    packages: ClassVar[tuple[str, ...]] = ("keras", "tensorflow")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import tensorflow as tf

        if device == "cuda" and not tf.config.list_physical_devices("GPU"):
            raise RuntimeError("TensorFlow found no GPU")
        super().__init__(work, device, params, rate)
        self.compiled = tf.function(self.optimizer.apply, jit_compile=True, reduce_retracing=True)

    def step(self) -> None:
        self.compiled(self.grads)

    def finish(self) -> None:
        if self.device == "cuda":  # on a CPU the call itself waits
            self.keras.ops.convert_to_numpy(self.variables[-1].value[..., :1])


CONTESTANTS: dict[str, type[Contestant]] = {
    "adamax_ext": AdamaxExt,
    "adamax_ext, torch tensors": AdamaxExtTorch,
    "adamax_ext, one flat array": AdamaxExtFlat,
    "device copy": DeviceCopy,
    "torch Adamax, for-loop": TorchLoop,
    "torch Adamax, foreach": TorchForeach,
    "torch Adamax, compiled": TorchCompiled,
    "torch AdamW, fused": TorchAdamW,
    "DeepSpeed CPU Adam": DeepSpeed,
    "optax adamax, jit": Optax,
    "Keras Adamax, JAX": KerasJax,
    "Keras Adamax, torch": KerasTorch,
    "Keras Adamax, TensorFlow": KerasTensorflow,
    "NumPy": NumPy,
}


# ---- The process ---------------------------------------------------------------------------------


def arrays_like(work: Work, seed: int) -> list[Any]:
    """Return arrays of the work's shapes; magnitudes of 0.1 and more keep epsilon small beside."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(np.float32)
    if work.dtype == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    block = rng.standard_normal(min(work.elements, 2**20), np.float32)
    block = (block + np.copysign(np.float32(0.1), block)).astype(dtype)
    return [np.resize(block, shape) for shape in work.shapes]


def memory_of_process(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Worker:
    """The commands that bench/peers.py sends, a method each; arguments and results are JSON."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.kind, self.device, self.threads = CONTESTANTS[name], device, threads
        self.contestant: Contestant | None = None

    def start(self) -> dict[str, Any]:
        """Set thread counts, and do a step so that everything is imported and built."""
        if "torch" in self.kind.packages:
            import torch

            torch.set_num_threads(self.threads)
        if "tensorflow" in self.kind.packages:
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(self.threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        if "adamax_ext" in self.kind.packages:
            import adamax_ext

            adamax_ext.set_num_threads(self.threads)
        work = Work("start", ((64,),))
        contestant = self.kind(work, self.device, arrays_like(work, 0), RATE)
        contestant.load(arrays_like(work, 1))
        contestant.step()
        contestant.finish()
        return {}

    def check(self, full: bool) -> dict[str, Any]:
        """Return the weights after three steps with different gradients."""
        work = Work("check", ((1000,), (7, 11), (1, 3)), full=full)
        contestant = self.kind(work, self.device, arrays_like(work, 0), RATE)
        for seed in (1, 2, 3):
            contestant.load(arrays_like(work, seed))
            contestant.step()
        contestant.finish()
        return {"weights": np.concatenate([w.ravel() for w in contestant.weights()]).tolist()}

    def setup(self, work: dict[str, Any], bound_library: str | None) -> dict[str, Any]:
        """Allocate for a work."""
        self.work = Work.from_json(work)
        self.resident_before = memory_of_process("VmRSS")
        contestant = self.kind(self.work, self.device, arrays_like(self.work, 0), RATE)
        contestant.load(arrays_like(self.work, 1))
        before_bound = memory_of_process("VmRSS")
        self.turns = contestant.turns(bound_library, self.threads)
        # Buffers of the bound alone are not the contestant's.
        self.resident_before += memory_of_process("VmRSS") - before_bound
        self.contestant, self.steps = contestant, dict[str, int]()
        state = contestant.state_bytes(self.work)
        return {
            "turns": list(self.turns),
            "state_bytes": state,
            "bytes_per_element": self.work.bytes_per_element(state),
        }

    def turn(self, name: str) -> dict[str, Any]:
        """Do one step untimed, then as many timed as fill `LEAST_TIMED`; the first call counts."""
        assert self.contestant is not None
        if name not in self.steps:
            self.timed(name, 1)  # may compile
            seconds = self.timed(name, 1)
            if seconds < LEAST_TIMED:
                seconds = min(seconds, self.timed(name, 1))
            self.steps[name] = math.ceil(LEAST_TIMED / seconds)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew, without compilers
        time.sleep(PAUSE)
        self.timed(name, 1)
        return {"seconds": self.timed(name, self.steps[name])}

    def timed(self, name: str, steps: int) -> float:
        assert self.contestant is not None
        work, finish = self.turns[name], self.contestant.finish
        start = time.perf_counter()
        for _ in range(steps):
            work()
        finish()
        return (time.perf_counter() - start) / steps

    def teardown(self) -> dict[str, Any]:
        """Free everything; return the peak of memory since `setup`, without what was there before.

        That is host memory: on a GPU, where the arrays are elsewhere, torch alone could tell.
        """
        peak = memory_of_process("VmHWM") - self.resident_before
        self.contestant, self.turns = None, {}
        gc.collect()
        return {"peak_bytes": peak if self.device == "cpu" else None}

    def zero_gradients(self, elements: int, steps: int) -> dict[str, Any]:
        """Return the seconds of steps whose gradients are zero, after a first that was not."""
        work = Work("zero gradients", ((elements,),))
        contestant = self.kind(work, self.device, arrays_like(work, 0), RATE)
        contestant.load([np.full(elements, 1e-3, np.float32)])
        contestant.step()
        contestant.load([np.zeros(elements, np.float32)])
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            contestant.step()
            contestant.finish()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def train(self) -> dict[str, Any]:
        """Train the network of `adamax_ext demo` until its accuracy on the test set is reached.

        Plain steps at a constant rate, raw weights, images without noise: less than the
        demonstration has, but what every contestant can do. Batches and first weights are equal.
        """
        from adamax_ext import demo

        rng = np.random.default_rng(0)
        digits, weights = demo.load_data(), demo.initial_weights(rng)
        x, y = digits["training set"]
        work = Work("training", tuple(w.shape for w in weights.values()))
        rate = RATE if self.kind.rule == "Adamax" else ADAM_RATE
        contestant = self.kind(work, self.device, [w.copy() for w in weights.values()], rate)
        contestant.load([np.zeros_like(w) for w in weights.values()])
        step_seconds: list[float] = []
        reached, epoch, start = 0.0, 0, time.perf_counter()
        while reached < demo.TARGET_ACCURACY and epoch < demo.EPOCHS:
            epoch += 1
            for batch in np.array_split(rng.permutation(len(x)), math.ceil(len(x) / 32)):
                weights = dict(zip(weights, contestant.weights(), strict=True))
                _, grads = demo.loss_and_gradients(weights, x[batch], y[batch])
                contestant.load(grads)
                step_start = time.perf_counter()
                contestant.step()
                contestant.finish()
                step_seconds.append(time.perf_counter() - step_start)
            weights = dict(zip(weights, contestant.weights(), strict=True))
            reached = demo.accuracy(weights, *digits["test set"])
        return {
            "epochs": epoch,
            "steps": len(step_seconds),
            "accuracy": reached,
            "target": demo.TARGET_ACCURACY,
            "total_seconds": time.perf_counter() - start,
            "step_seconds": {
                "median": statistics.median(step_seconds),
                "sum": sum(step_seconds),  # with a compiler, if there is one
            },
        }


def main(arguments: Sequence[str]) -> int:
    name, device, threads = arguments
    # Libraries print what they like: answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(name, device, int(threads))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text[:300]}"}
        with contextlib.suppress(BrokenPipeError):  # bench/peers.py was interrupted
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

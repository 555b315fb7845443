"""Torch's Adamax with state in fewer bits and rounded weights, as the NumPy program does it."""

import numpy as np

from support import reference_lowmem
from support.torch_runs import torch

# Nothing here is a default, a power of two, or equal to another value.
SETTINGS = {"lr": 0.0371, "betas": (0.83, 0.957), "eps": 3.1e-5, "weight_decay": 0.013}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Parameter, bits of its state, rounding: all that can be asked for.
STORAGES = [
    (dtype, bits, rounding)
    for dtype in (F32, BF16, F16)
    for bits in (32, 16, 8)
    for rounding in ("nearest", "stochastic", "remainder")
    if rounding == "nearest" or dtype != F16
]


def in_memory(tensor):
    """The elements as they lie in memory, as NumPy has them; 16 bits of a float as integers."""
    tensor = tensor.detach()
    flat = tensor.as_strided((tensor.numel(),), (1,)).clone()
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype == BF16 else flat.numpy()


def widened(tensor):
    return in_memory(tensor.detach().float())


class Variable:
    """One parameter: `number` of all, and where its elements begin if it is a part of one."""

    def __init__(self, param, number, bits, rounding, seed, first_element=0):
        self.dtype, self.where = param.dtype, (number, first_element, param.numel())
        self.seed, self.steps = seed, 0
        storage = "bfloat16" if param.dtype == BF16 else "float32"
        self.weight = reference_lowmem.LowWeight(widened(param), storage, rounding)
        # With epsilon inside the first moment is relative to the norm alone.
        self.state = reference_lowmem.LowState(param.numel(), bits, epsilon=0)

    def step(self, grad, *, lr, betas, eps, weight_decay, decoupled=False, maximize=False):
        self.steps += 1
        drawn = [
            reference_lowmem.random_bits(stream, self.seed, self.steps, *self.where)
            for stream in (reference_lowmem.WEIGHT, reference_lowmem.MOMENTUM)
        ]
        w = self.weight.read()
        options = {"learning_rate": lr, "beta_1": betas[0], "epsilon": eps, "step": self.steps}
        options |= {"weight_decay": weight_decay, "decay": "decoupled" if decoupled else "l2"}
        h = widened(grad)
        with np.errstate(all="ignore"):
            self.state.step(
                w, -h if maximize else h, drawn[1], betas[1], epsilon_mode="inside", **options
            )
        if self.dtype == F16:
            w = w.astype(np.float16).astype(np.float32)
        self.weight.write(w, drawn[0])

    def expected(self):
        """What torch keeps: the parameter and its state, by name."""
        size, state = self.where[2], self.state
        arrays = {"exp_avg": state.momentum, "exp_inf": state.norm}
        arrays = {name: array.ravel()[:size] for name, array in arrays.items()}
        if state.bits != 32:
            is_untouched = size == 0  # there is nothing to do
            arrays["exp_inf_scale"] = np.atleast_1d(np.float32(1) if is_untouched else state.scale)
        if self.weight.storage == "bfloat16":
            arrays["param"] = self.weight.half
            if self.weight.rounding == "remainder":
                arrays["remainder"] = self.weight.low
        else:
            arrays["param"] = self.weight.value.astype(str(self.dtype).removeprefix("torch."))
        return arrays | {"step": np.atleast_1d(np.float32(self.steps))}


def require_same(param, state, expected, label):
    """Require the bits of the program, and nothing else in the state."""
    tensors = {"param": param, **state}
    assert set(tensors) == set(expected), label
    for name, array in expected.items():
        actual = in_memory(tensors[name])
        assert actual.dtype == array.dtype, f"{name} {label}"
        assert actual.tobytes() == array.tobytes(), f"{name} {label}"


def bytes_of(state):
    return sum(tensor.numel() * tensor.itemsize for tensor in state.values())

"""DTensors: the part of a variable that this process has, placed as its parameter is."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamax_ext.low_state import BLOCK
from adamax_ext.torch.tensors import Variable


def is_distributed(tensor: Any) -> bool:
    """Whether this is a DTensor, of which each process has a part."""
    return hasattr(tensor, "placements")


class Parts(NamedTuple):
    """How a parameter is cut: as if each part were as large as the largest, in whole blocks."""

    number: int  # of the part of this process
    blocks: int  # of a part
    mesh: Any
    placements: tuple[
        Any, ...
    ]  # of a tensor with an axis for each of the mesh that cuts, and one more
    axes: int  # those of the mesh that cut

    @property
    def first_element(self) -> int:
        """Where the random numbers of this part begin: no two parts draw the same."""
        return self.number * self.blocks * BLOCK

    def new_scales(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return zeros for the scales of all parts: a row for each, as long as the longest."""
        from torch.distributed.tensor import DTensor

        row = torch.zeros([1] * self.axes + [self.blocks], dtype=dtype, device=device)
        return DTensor.from_local(row, self.mesh, self.placements, run_check=False)


def parts_of(param: Any) -> Parts:
    """Return how a DTensor is cut."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, shape = param.device_mesh, list(param.shape)
    coordinate = mesh.get_coordinate()
    number, axes = 0, 0
    placements: list[Any] = []
    for axis, placement in enumerate(param.placements):
        if not hasattr(placement, "dim"):  # of a shard
            placements.append(Replicate())
            continue
        count = mesh.size(axis)
        number = number * count + coordinate[axis]
        shape[placement.dim] = -(-shape[placement.dim] // count)
        placements.append(Shard(axes))
        axes += 1
    return Parts(number, -(-math.prod(shape) // BLOCK), mesh, tuple(placements), axes)


def placed(variable: Variable, i: int) -> Variable:
    """Return DTensors of which this process has the same parts as of the parameter, itself one.

    `i` is the position among all variables of the step. Raises RuntimeError for what torch's own
    step does not take either, and for what cannot be moved: state in 8 bits, whose blocks are those
    of a part, and a remainder, as collectives know no int16.
    """
    param, grad, exp_avg, exp_inf = variable[:4]
    fixed = {"remainder": param.placements}
    if variable.is_in_blocks:
        fixed |= {"exp_avg": param.placements, "exp_inf_scale": parts_of(param).placements}
    for key, placements in fixed.items():
        if getattr(variable, key) is not None:
            _require_placed(getattr(variable, key), param.device_mesh, placements, f"{key}[{i}]")
    with torch.no_grad():
        return variable._replace(
            grad=_placed_as(param, grad, f"grads[{i}]"),
            exp_avg=_placed_as(param, exp_avg, f"exp_avg[{i}]"),
            exp_inf=_placed_as(param, exp_inf, f"exp_inf[{i}]"),
        )


def local(variable: Variable) -> Variable:
    """Return the parts of DTensors that this process has; of other tensors, all."""
    parts = Variable(*(ready(getattr(tensor, "_local_tensor", tensor)) for tensor in variable))
    if parts.is_in_blocks:
        scales = parts.exp_inf_scale.flatten()[: -(-parts.param.numel() // BLOCK)]
        return parts._replace(exp_inf_scale=scales)
    if parts.exp_inf_scale is not None and parts.param.numel() == 0:
        # The scale takes the decay here too, as it is saved by any rank: of an element of no one.
        unseen: dict[str, Any] = {
            key: torch.zeros(1, dtype=tensor.dtype, device=tensor.device)
            for key, tensor in parts._asdict().items()
            if isinstance(tensor, Tensor) and key not in ("step", "exp_inf_scale")
        }
        return parts._replace(**unseen)
    return parts


def _require_placed(tensor: Any, mesh: Any, placements: Any, label: str) -> None:
    own = (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else "no DTensor"
    if own != (mesh, placements):
        raise RuntimeError(
            f"{label} must be a DTensor placed as where it was made, and is not moved: expected "
            f"{(mesh, placements)}; received {own}"
        )


def _placed_as(param: Any, tensor: Any, label: str) -> Any:
    if not is_distributed(tensor):
        raise RuntimeError(
            f"got mixed torch.Tensor and DTensor: {label} of shape {tuple(tensor.shape)} is no "
            f"DTensor, but its parameter of shape {tuple(param.shape)} is one"
        )
    if tensor.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"{label} and its parameter are on different meshes: got {tensor.device_mesh} and "
            f"{param.device_mesh}"
        )
    if tensor.placements == param.placements:
        return tensor
    return tensor.redistribute(placements=param.placements)


def ready(tensor: Any) -> Any:
    """Return what a collective gave, which may still be under way."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor

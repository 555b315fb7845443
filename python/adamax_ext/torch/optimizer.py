"""`Adamax` and `AdamaxW` for torch: arguments, state and files in its words."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

from adamax_ext.torch import storage
from adamax_ext.torch.state import loaded_state, new_count
from adamax_ext.torch.stepping import UNSCALED, LossScale, Stepping


class Adamax(torch.optim.Optimizer):
    """``torch.optim.Adamax`` with a fused step: the same arguments, state and mathematics.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict
        Parameters, named parameters, or parameter groups.
    lr : float or Tensor of one element
        Learning rate, >= 0.
    betas : pair of float in [0, 1)
        Decay of the first moment and of the infinity norm.
    eps : float >= 0
        Added to the size of the gradient before the infinity norm takes the maximum.
    weight_decay : float >= 0
        ``weight_decay * parameter`` is added to the gradient; or decoupled, see below.
    foreach : bool, optional
        Accepted as torch does, without effect: all groups go into one native call.
    maximize : bool
        Ascend.
    differentiable : bool
        Must be False.
    capturable : bool
        Keep the step counts on the GPU, so that a step can be captured into a CUDA graph.
    decoupled_weight_decay : bool
        Shrink the parameters by ``lr * weight_decay`` instead of adding to the gradient.
    state_bits : {32, 16, 8}
        Bits of an element of each moment, of parameters that are computed in float32. With 8, the
        state of parameters with fewer than 4096 elements stays in 32 bits, the first of the betas
        must be below the second, and `eps` at least 2**-86.
    weight_rounding : {"nearest", "stochastic", "remainder"}
        What becomes of the bits that bfloat16 parameters have no room for: lost; rounded away from
        zero with the probability that they are; or kept in 16 bits of the state.
    seed : int
        Of the random numbers for both, from 0 to ``2**64 - 1``: the same seed, the same bits.

    Raises
    ------
    ValueError, TypeError
        As ``torch.optim.Adamax``, with its words. A setting out of range; a parameter for which
        `state_bits` or `weight_rounding` is not: float64 and complex ones have full state, and
        float16 is rounded to nearest.
    RuntimeError
        ``differentiable=True``.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. State is kept in
    the dtype of the parameter, but in float32 for float16 and bfloat16, and has the keys ``step``,
    ``exp_avg`` and ``exp_inf``. A step is done for all parameters or, if an exception says why,
    for none.

    `state_bits`, `weight_rounding` and `seed` can be those of a parameter group, which has their
    keys unless all three are as by default. Once it has state, the seed can be changed, and
    "nearest" and "stochastic" be exchanged; the rest is fixed. State in fewer bits has
    ``exp_inf_scale`` too, and rounding with a remainder ``remainder``. Random numbers follow from
    the seed, the number of the step (float32, which stops at 2**24: from there on each step draws
    the same), the position of the parameter among all of the optimizer, and that of an element in
    it: training that is resumed with the same parameters in the same order has the same bits.

    In 8 bits, 256 elements that lie one after the other in memory share a scale. A parameter that
    changes its memory order later is stepped in that of its state.

    Each rank keeps state for its part of a DTensor. In 8 bits the parts have blocks of their own,
    so that it can be loaded only for the same placement on as many ranks, and is refused otherwise;
    in 16 bits it can be loaded on any. ``torch.distributed.checkpoint`` saves and loads all of it;
    torch's collectives know no int16, and so refuse to gather a remainder on one rank. Of the first
    FSDP, ``FullyShardedDataParallel``, state in fewer bits and remainders are saved by each rank,
    as ``state_dict()``: its ``optim_state_dict`` refuses them.
    """

    _stepping: Stepping | None = None  # made by the first step, and not copied or pickled

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        state_bits: int = 32,
        weight_rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        _require(lr >= 0.0, "learning rate", lr)
        _require(eps >= 0.0, "epsilon value", eps)
        for i in range(2):
            _require(0.0 <= betas[i] < 1.0, f"beta parameter at index {i}", betas[i])
        _require(weight_decay >= 0.0, "weight_decay value", weight_decay)
        if differentiable:
            raise RuntimeError(
                f"{type(self).__name__} does not support differentiable=True: autograd cannot see "
                "into its step; use torch.optim.Adamax for that"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_bits": state_bits,
            "weight_rounding": weight_rounding,
            "seed": seed,
        }
        storage.complete(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            storage.complete(group)
            storage.require_valid(group, len(self.param_groups) - 1, self.state)
        except BaseException:
            del self.param_groups[-1]
            raise

    # ---- Steps -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of all parameters that have a gradient; or none, if an exception is raised.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients anew, and returns the loss.

        Returns
        -------
        object
            What the closure returned, or None.

        Raises
        ------
        RuntimeError
            A gradient is sparse; memory that cannot be written; another step of this optimizer is
            running; a GPU that cannot be used, or whose stream is being captured without
            `capturable`.
        ValueError, TypeError
            A setting out of range, or state that does not fit to its parameter.
        AssertionError
            `capturable` with parameters on the host, in torch's words.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # Dynamo cannot look into a native call. It may see step() itself, which has to stay a plain
    # method: schedulers put another one in its place on the instance.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        if self._stepping is None:
            self._stepping = Stepping(type(self).__name__)
        scale = UNSCALED
        given = vars(self)  # GradScaler sets attributes for the time of one step
        if ("grad_scale" in given or "found_inf" in given) and self._step_supports_amp_scaling:
            scale = LossScale(given.get("grad_scale"), given.get("found_inf"))
        self._stepping.step(self.param_groups, self.state, scale)

    # ---- torch's GradScaler ----------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to the step to unscale, and to skip infinite gradients.

        Only where a step has to do without the host: for all others GradScaler asks the GPU itself,
        and libraries that clip gradients rely on it.
        """
        return all(group["capturable"] for group in self.param_groups)

    # ---- Saving ----------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        new_arguments = {  # which checkpoints of torch's class, or of old versions of it, lack
            "foreach": None,
            "maximize": False,
            "differentiable": False,
            "capturable": False,
            "decoupled_weight_decay": self.defaults["decoupled_weight_decay"],
        }
        for group in self.param_groups:
            for name, value in new_arguments.items():
                group.setdefault(name, value)
            for param in group["params"]:
                known = self.state.get(param)
                if known and not torch.is_tensor(known["step"]):  # of an old version of torch
                    known["step"] = new_count(param, group["capturable"], float(known["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of ``torch.optim.Adamax`` returned.

        Parameters
        ----------
        state_dict : dict
            As for every optimizer of torch. Moments get the dtype that this class keeps them in;
            what is in fewer bits is taken bit for bit. A file without `weight_rounding` and `seed`
            leaves those of here.

        Raises
        ------
        ValueError
            Other parameter groups than this optimizer has, or state in other bits: make the
            optimizer with the `state_bits` of the file. Nothing has changed then.

        Notes
        -----
        Files of ``torch.distributed.checkpoint`` from torch's class lack `decoupled_weight_decay`;
        read them with ``DefaultLoadPlanner(allow_partial_load=True)``, which keeps that of here.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        # The base class would round the moments to the dtype of the parameter: it does not see
        # them. Last before what it does, and first after.
        def take(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            given, moments = self._without_moments(given)
            loaded.update(moments)
            return given

        def put(_: Any) -> None:
            for param, moments in loaded.items():
                self.state[param].update(moments)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _without_moments(
        self, given: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
        """Return what was saved without its moments, and those, as they are kept here."""
        groups, states, moments = [], dict(given["state"]), {}
        for i, (own, saved) in enumerate(
            zip(self.param_groups, given["param_groups"], strict=False)
        ):
            options = {name: own[name] for name in storage.DEFAULTS if name in own}
            bits, own_bits = (group.get("state_bits", 32) for group in (saved, own))
            if bits != own_bits:
                raise ValueError(
                    f"state_dict has state_bits={bits} in param_groups[{i}], and this optimizer "
                    f"{own_bits}; expected the same, as state in other bits is not converted"
                )
            groups.append({**options, **saved})
            storage.require_valid({**groups[-1], "params": own["params"]}, i, {})
            has_remainder = saved.get("weight_rounding") == "remainder"
            for param, name in zip(own["params"], saved["params"], strict=False):
                state = given["state"].get(name)
                if not state:
                    continue
                moments[param] = loaded_state(state, param, groups[-1], name, has_remainder)
                states[name] = {key: state[key] for key in state if key not in moments[param]}
        groups += given["param_groups"][len(groups) :]
        return {**given, "state": states, "param_groups": groups}, moments


class AdamaxW(Adamax):
    """`Adamax` with decoupled weight decay by default; all else is the same."""

    __init__ = partialmethod(Adamax.__init__, decoupled_weight_decay=True)


def _require(valid: Any, what: str, received: Any) -> None:
    if not valid:
        raise ValueError(f"Invalid {what}: {received}")

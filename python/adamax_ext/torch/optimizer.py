"""`Adamax` and `AdamaxW` for torch: arguments, state and files in its words."""

from collections.abc import Callable
from functools import partialmethod
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adamax_ext.torch.state import as_moment, new_count
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

    Raises
    ------
    ValueError, TypeError
        As ``torch.optim.Adamax``, with its words.
    RuntimeError
        ``differentiable=True``.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. State is kept in
    the dtype of the parameter, but in float32 for float16 and bfloat16, and has the keys ``step``,
    ``exp_avg`` and ``exp_inf``. A step is done for all parameters or, if an exception says why,
    for none.
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
        }
        super().__init__(params, defaults)

    # ---- Steps -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of all parameters that have a gradient.

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

        Nothing has changed then.
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
            As for every optimizer of torch. Moments get the dtype that this class keeps them in.

        Raises
        ------
        ValueError
            Other parameter groups than this optimizer has. Nothing has changed then.

        Notes
        -----
        Files of ``torch.distributed.checkpoint`` from torch's class lack `decoupled_weight_decay`;
        read them with ``DefaultLoadPlanner(allow_partial_load=True)``, which keeps that of here.
        """
        loaded: dict[str, Any] = {}
        # Last before, and first after, what the base class does, which rounds the moments to the
        # dtype of the parameter.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given)),
            self.register_load_state_dict_post_hook(
                lambda _: self._take_moments(loaded), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _take_moments(self, loaded: dict[str, Any]) -> None:
        ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, param in zip(ids, params, strict=True):
            given = loaded["state"].get(name, {})
            for key in ("exp_avg", "exp_inf"):
                if torch.is_tensor(given.get(key)):
                    self.state[param][key] = as_moment(given[key], param)


class AdamaxW(Adamax):
    """`Adamax` with decoupled weight decay by default; all else is the same."""

    __init__ = partialmethod(Adamax.__init__, decoupled_weight_decay=True)


def _require(valid: Any, what: str, received: Any) -> None:
    if not valid:
        raise ValueError(f"Invalid {what}: {received}")

"""`Adamax` and `AdamaxW` for torch: settings and state in its words, one native call a step."""

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from adamax_ext import _core
from adamax_ext.torch.tensors import (
    Gathered,
    Variable,
    is_distributed,
    local,
    placed,
    share_memory,
    state_dtype,
)

_CAPTURABLE_DEVICES = ["cuda"]
_STATE_KEYS = ("exp_avg", "exp_inf", "step")  # in the order of Variable


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
        Added to the gradient times the parameter; or decoupled, see below.
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
        The loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        groups = self.param_groups
        arrays, sizes, others = _core.collect(
            [group["params"] for group in groups],
            self.state,
            keys=_STATE_KEYS,
            plain_types=(Parameter, Tensor),
        )
        ends = list(accumulate(sizes))
        new_states: dict[Tensor, dict[str, Tensor]] = {}
        wrappers: list[Tensor] = []  # of local parts that are written
        for i in others:
            param, grad, *state = arrays[5 * i : 5 * i + 5]
            if state[0] is None:
                if param not in new_states:
                    capturable = groups[bisect_right(ends, i)]["capturable"]
                    new_states[param] = _new_state(param, capturable)
                state = [new_states[param][key] for key in _STATE_KEYS]
            variable = Variable(param, grad, *state)
            if is_distributed(param):
                wrappers.append(param)
                variable = placed(variable, i)
                if param in self.state:  # moments that were loaded for another placement stay here
                    self.state[param].update(zip(_STATE_KEYS, variable[2:], strict=True))
                variable = local(variable)
            arrays[5 * i : 5 * i + 5] = variable
        for group, size, end in zip(groups, sizes, ends, strict=True):
            if group["capturable"]:
                _require_capturable(arrays[5 * (end - size) : 5 * end : 5])
        native = self.__dict__.get("_native")
        if native is None:
            native = self._native = _Native()
        settings = native.groups_of(groups)
        self.state.update(new_states)
        try:
            self._step_arrays(arrays, sizes, *settings)
        except BaseException:
            for param, made in new_states.items():
                if made["step"] == 0:  # an interrupt can come when the step is done
                    del self.state[param]
            raise
        if wrappers:
            torch.autograd.graph.increment_version(wrappers)

    def _step_arrays(
        self,
        arrays: list[Tensor],
        sizes: list[int],
        groups: list[_core.Group],
        learning_rates: tuple[Tensor | None, ...],
    ) -> None:
        """Do one step on the tensors of each Variable, one after the other in `arrays`."""
        step = partial(
            self._native.stepper.step,
            arrays,
            sizes=sizes,
            groups=groups,
            learning_rates=learning_rates,
            loss_scales=self._loss_scales(arrays),
        )
        odd = step(is_strict=False)
        if not odd:
            return
        with torch.no_grad():
            gathered = {
                begin: Gathered(Variable(*arrays[begin : begin + 5]), type(self).__name__)
                for begin in (5 * i for i in odd)
            }
            if share_memory(arrays, odd):
                self._step_in_turn(arrays, sizes, groups, learning_rates)
                return
            for begin, one in gathered.items():
                arrays[begin : begin + 5] = one.variable
            step(is_strict=True)
            for one in gathered.values():
                one.scatter()

    def _step_in_turn(
        self,
        arrays: list[Tensor],
        sizes: list[int],
        groups: list[_core.Group],
        learning_rates: tuple[Tensor | None, ...],
    ) -> None:
        """Step one variable after the other: each is gathered when those before are scattered."""
        done: list[tuple[Tensor, Tensor]] = []  # what is written, and a copy from before
        variables = (arrays[begin : begin + 5] for begin in range(0, len(arrays), 5))
        try:
            for i, size in enumerate(sizes):
                for variable in islice(variables, size):
                    param, _, *state = variable
                    done += [(tensor, tensor.clone()) for tensor in (param, *state)]
                    one_group = slice(i, i + 1)
                    self._step_arrays(variable, [1], groups[one_group], learning_rates[one_group])
        except BaseException:
            for tensor, copy in reversed(done):
                tensor.copy_(copy)
            raise

    # ---- torch's GradScaler ----------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to the step to unscale, and to skip infinite gradients.

        Only where a step has to do without the host: for all others GradScaler asks the GPU itself,
        and libraries that clip gradients rely on it.
        """
        return all(group["capturable"] for group in self.param_groups)

    def _loss_scales(self, arrays: list[Tensor]) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """Return what GradScaler gave for this step, on each device."""
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if scale is None and found_inf is None:
            return ()
        devices = dict.fromkeys(param.device for param in arrays[::5])
        return tuple((_on(device, scale), _on(device, found_inf)) for device in devices)

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
                    known["step"] = _count(param, group["capturable"], float(known["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of ``torch.optim.Adamax`` returned.

        Parameters
        ----------
        state_dict : dict
            As for every optimizer of torch. Moments get the dtype that this class keeps them in.
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
                if key in given:
                    self.state[param][key] = _as_moment(given[key], param)


class AdamaxW(Adamax):
    """`Adamax` with decoupled weight decay; all else is the same."""

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
        decoupled_weight_decay: bool = True,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class _Native:
    """What is kept from step to step only to make them cheaper."""

    def __init__(self) -> None:
        self.stepper = _core.Stepper()
        self._settings: list[tuple[Any, ...]] = []
        self._groups: list[_core.Group] = []  # of these settings

    def groups_of(
        self, param_groups: list[dict[str, Any]]
    ) -> tuple[list[_core.Group], tuple[Tensor | None, ...]]:
        """Return native groups with the settings of torch's; and rates that a GPU is to read."""
        count = len(param_groups)
        if len(self._groups) != count:
            self._settings, self._groups = [()] * count, [_core.Group() for _ in range(count)]
        rates: list[Tensor | None] = []
        for i, group in enumerate(param_groups):
            lr = group["lr"]
            if group["capturable"] and isinstance(lr, Tensor) and lr.is_cuda:
                rates += [None] * (i - len(rates)) + [lr]
                lr = 0.0
            beta_1, beta_2 = group["betas"]
            # Numbers, as the value of a tensor can change in place.
            settings = (
                float(lr.detach() if isinstance(lr, Tensor) else lr),
                float(beta_1),
                float(beta_2),
                float(group["eps"]),
                float(group["weight_decay"]),
                group["maximize"],
                group["decoupled_weight_decay"],
            )
            if settings != self._settings[i]:
                self._settings[i] = settings
                self._groups[i] = _native_group(*settings)
        return self._groups, tuple(rates)


def _native_group(
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    decoupled: bool,
) -> _core.Group:
    group = _core.Group()
    group.learning_rate = lr
    group.beta_1, group.beta_2 = beta_1, beta_2
    group.epsilon, group.epsilon_mode = eps, "inside"
    group.weight_decay, group.decay = weight_decay, "decoupled" if decoupled else "l2"
    group.maximize = bool(maximize)
    return group


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return None if number is None else number.to(device)


def _require(valid: Any, what: str, received: Any) -> None:
    if not valid:
        raise ValueError(f"Invalid {what}: {received}")


def _new_state(param: Tensor, capturable: bool) -> dict[str, Tensor]:
    def zeros() -> Tensor:
        return torch.zeros_like(
            param, dtype=state_dtype(param), memory_format=torch.preserve_format
        )

    return {"step": _count(param, capturable), "exp_avg": zeros(), "exp_inf": zeros()}


def _count(param: Tensor, capturable: bool, value: float = 0.0) -> Tensor:
    """Return a number of completed steps as torch keeps it."""
    is_double = torch.get_default_dtype() == torch.float64
    return torch.tensor(
        value,
        dtype=torch.float64 if is_double else torch.float32,
        device=param.device if capturable else None,
    )


def _as_moment(value: Tensor, param: Tensor) -> Tensor:
    """Return a moment that was loaded, in the dtype, place and memory order of one of `param`."""
    dtype = state_dtype(param)
    if value.shape != param.shape or is_distributed(param):
        return value.to(param.device, dtype)
    moment = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    same = (value.dtype, value.device, value.stride()) == (dtype, moment.device, moment.stride())
    return value if same else moment.copy_(value)


def _require_capturable(params: list[Tensor]) -> None:
    if any(param.device.type not in _CAPTURABLE_DEVICES for param in params):
        raise AssertionError(
            "If capturable=True, params and state_steps must be on supported devices: "
            f"{_CAPTURABLE_DEVICES}."
        )

"""A step of all parameter groups: collects their tensors and settings for one native call."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from adamax_ext import _core
from adamax_ext.torch import storage
from adamax_ext.torch.parts import is_distributed, local, parts_of, placed, ready
from adamax_ext.torch.state import new_state
from adamax_ext.torch.tensors import (
    KEYS,
    OPTIONAL_KEYS,
    WIDTH,
    Gathered,
    Variable,
    scatter,
    share_memory,
)

_CAPTURABLE_DEVICES = ["cuda"]


class LossScale(NamedTuple):
    """What torch's GradScaler gives for one step, in the memory of a GPU."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def for_devices_of(self, params: Iterator[Tensor]) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return it for each device on which a parameter lies, if there is one."""
        if self.grad_scale is None and self.found_inf is None:
            return []
        devices = dict.fromkeys(param.device for param in params)
        return [(_on(device, self.grad_scale), _on(device, self.found_inf)) for device in devices]


UNSCALED = LossScale(None, None)


class Settings(NamedTuple):
    """Those of some groups, as the native step takes them."""

    groups: list[_core.StepGroup]
    learning_rates: list[Tensor | None]  # that a GPU is to read; empty if there are none
    loss_scale: LossScale

    def of(self, i: int) -> "Settings":
        """Return those of one group."""
        one = slice(i, i + 1)
        return self._replace(groups=self.groups[one], learning_rates=self.learning_rates[one])


class Stepping:
    """Does steps; from one to the next it keeps only what makes them cheaper."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the optimizer, for messages
        self._stepper = _core.Stepper()
        self._undone_calls = 0  # of the stepper, when what they did was undone
        self._settings: list[tuple[Any, ...]] = []
        self._groups: list[_core.StepGroup] = []  # of these settings

    def step(
        self,
        param_groups: list[dict[str, Any]],
        states: dict[Tensor, dict[str, Tensor]],
        loss_scale: LossScale,
    ) -> None:
        """Do one step, or raise an exception that says why nothing was done."""
        groups = tuple(param_groups)  # which nobody changes while tensors are asked what they are
        arrays, sizes, to_inspect, with_options = _core.collect(
            groups,
            states,
            keys=KEYS,
            optional_keys=OPTIONAL_KEYS,
            options=tuple(storage.DEFAULTS),
            plain_types=(Parameter, Tensor),
        )
        settings = self._settings_of(groups, with_options, states, loss_scale)
        ends = list(accumulate(sizes))
        new_states: dict[Tensor, dict[str, Tensor]] = {}
        wrappers: list[Tensor] = []  # of local parts that are written
        for i in to_inspect:
            variable = Variable.at(arrays, i)
            param = variable.param
            if variable.exp_avg is None:
                if param not in new_states:
                    new_states[param] = new_state(param, groups[bisect_right(ends, i)])
                variable = variable._replace(**new_states[param])
            if is_distributed(param):
                wrappers.append(param)
                variable = placed(variable, i)
                if variable.number is not None:
                    variable = variable._replace(first_element=parts_of(param).first_element)
                if param in states:  # moments that were loaded for another placement stay here
                    states[param].update(variable.state)
                variable = local(variable)
            variable.put(arrays, i)
        if any(map(itemgetter("capturable"), groups)):
            for group, size, end in zip(groups, sizes, ends, strict=True):
                if group["capturable"]:
                    _require_capturable(arrays[WIDTH * (end - size) : WIDTH * end : WIDTH])
        states.update(new_states)
        before = self._stepper.calls
        try:
            self._step_arrays(arrays, sizes, settings)
        except BaseException:
            if self._stepper.calls in (before, self._undone_calls):
                for param in new_states:
                    del states[param]
            raise
        if wrappers:
            torch.autograd.graph.increment_version(wrappers)

    def _step_arrays(self, arrays: list[Any], sizes: list[int], settings: Settings) -> None:
        """Do one step on variables whose entries lie one after the other in `arrays`."""
        unfit = self._call(arrays, sizes, settings, is_strict=False)
        if unfit:
            with torch.no_grad():
                self._step_gathered(arrays, sizes, settings, unfit)

    def _step_gathered(
        self, arrays: list[Any], sizes: list[int], settings: Settings, unfit: list[int]
    ) -> None:
        """Do one step where the native one does not take some variables as they are."""
        writes_gradients = settings.loss_scale.grad_scale is not None
        gathered: dict[int, Gathered] = {}
        taken = list(arrays)
        for is_strict in (False, True):  # what overlaps is found when all is dense
            for i in unfit:
                variable = Variable.at(arrays, i)
                variable = variable._replace(grad=ready(variable.grad))  # that a collective gives
                variable.put(arrays, i)
                gathered[i] = Gathered(variable, self.name, writes_gradients)
                gathered[i].variable.put(taken, i)
            if share_memory(arrays, gathered):
                self._step_in_turn(arrays, sizes, settings)
                return
            before = self._stepper.calls
            try:
                unfit = self._call(taken, sizes, settings, is_strict)
            finally:
                if self._stepper.calls > before:  # also if an interrupt comes behind it
                    try:
                        scatter(gathered.values())
                    except BaseException:  # an interrupt: once more, which does no harm
                        scatter(gathered.values())
                        raise
            if not unfit:
                return

    def _step_in_turn(self, arrays: list[Any], sizes: list[int], settings: Settings) -> None:
        """Step one variable after the other: each is gathered when those before are scattered."""
        done: list[tuple[Tensor, Tensor]] = []  # what is written, and a copy from before
        variables = iter(range(len(arrays) // WIDTH))
        try:
            for group, size in enumerate(sizes):
                for i in islice(variables, size):
                    done += [(tensor, tensor.clone()) for tensor in Variable.at(arrays, i).written]
                    entries = arrays[WIDTH * i : WIDTH * (i + 1)]
                    self._step_arrays(entries, [1], settings.of(group))
        except BaseException:
            for tensor, copy in reversed(done):
                tensor.copy_(copy)
            self._undone_calls = self._stepper.calls
            raise

    def _call(
        self, arrays: list[Any], sizes: list[int], settings: Settings, is_strict: bool
    ) -> list[int]:
        return self._stepper.step(
            tuple(arrays),  # a list could lose entries while tensors are asked for their memory
            sizes=sizes,
            groups=settings.groups,
            learning_rates=settings.learning_rates,
            loss_scales=settings.loss_scale.for_devices_of(islice(arrays, 0, None, WIDTH)),
            is_strict=is_strict,
        )

    def _settings_of(
        self,
        groups: tuple[dict[str, Any], ...],
        with_options: list[int],
        states: dict[Tensor, dict[str, Tensor]],
        loss_scale: LossScale,
    ) -> Settings:
        count = len(groups)
        if len(self._groups) != count:
            self._settings = [()] * count
            self._groups = [_core.StepGroup() for _ in range(count)]
        rates: list[Tensor | None] = [None] * count
        has_rates = False
        options: list[Any] = [None] * count
        for i in with_options:
            options[i] = storage.options(groups[i])
        for i, group in enumerate(groups):
            lr = group["lr"]
            if group["capturable"] and isinstance(lr, Tensor) and lr.is_cuda:
                is_known = lr.dtype in (torch.float32, torch.float64)
                rates[i] = lr if is_known else lr.double()
                has_rates = True
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
                options[i],
            )
            if settings != self._settings[i]:
                if settings[-1:] != self._settings[i][-1:]:
                    storage.require_valid(group, i, states)
                self._groups[i] = _native_group(*settings)
                self._settings[i] = settings
        return Settings(self._groups, rates if has_rates else [], loss_scale)


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return None if number is None else number.to(device)


def _native_group(
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    decoupled: bool,
    options: tuple[int, str, int] | None,
) -> _core.StepGroup:
    group = _core.StepGroup()
    group.learning_rate = lr
    group.beta_1, group.beta_2 = beta_1, beta_2
    group.epsilon, group.epsilon_mode = eps, "inside"
    group.weight_decay, group.decay = weight_decay, "decoupled" if decoupled else "l2"
    group.maximize = bool(maximize)
    if options is not None:
        _, group.weight_rounding, group.seed = options
    return group


def _require_capturable(params: list[Tensor]) -> None:
    if any(param.device.type not in _CAPTURABLE_DEVICES for param in params):
        raise AssertionError(
            "If capturable=True, params and state_steps must be on supported devices: "
            f"{_CAPTURABLE_DEVICES}."
        )

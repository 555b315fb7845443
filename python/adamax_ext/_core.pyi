"""Types of the native core, checked against the compiled module by mypy.stubtest."""

from collections.abc import Sequence
from typing import Any

__version__: str
storages: tuple[tuple[str, str, str], ...]  # dtypes of parameter, gradient, state
xla_step: Any  # capsules with handlers of XLA's foreign function interface
xla_refuse: Any

class IeeeMode:
    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

class Group:
    """Settings that variables share; attributes, with the defaults of the C++ struct."""

    learning_rate: float
    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float
    decay: str  # "decoupled" or "l2"
    epsilon_mode: str  # "outside" or "inside"
    clipvalue: float | None
    ema_momentum: float
    step: int
    maximize: bool
    seed: int
    def __init__(self) -> None: ...

class StepGroup(Group):
    """A group of a Stepper."""

    weight_rounding: str  # "nearest", "stochastic" or "remainder"

class Call:
    """What one call does with all variables."""

    grad_scale: float
    clipnorm: float | None  # setting one of the two norms replaces the other
    global_clipnorm: float | None
    micro_batches: int
    accumulate_only: bool
    overwrite: bool
    require_finite: bool
    def __init__(self) -> None: ...

class Plan:
    """The variables of one optimizer, checked once."""

    calls: int  # completed calls of step()
    accumulated: list[bool]  # whether each accumulator holds gradients of the present window
    def __init__(
        self,
        params: tuple[Any, ...],
        names: Sequence[str],
        groups: Sequence[int],
        *,
        momentum: Sequence[Any],
        norm: Sequence[Any],
        averages: Sequence[Any] | None,
        accumulators: Sequence[Any] | None,
        norm_scales: Sequence[Any] | None = ...,  # of state in fewer bits, else None
        remainders: Sequence[Any] | None = ...,  # of bfloat16 with "remainder", else None
        weight_rounding: str = ...,
    ) -> None: ...
    def step(
        self,
        grads: tuple[Any, ...],
        variables: tuple[Any, ...] | None,
        groups: Sequence[Group],
        call: Call,
    ) -> bool: ...
    def finalize(self, variables: tuple[Any, ...] | None) -> None: ...

class Stepper:
    """Steps on variables whose state somebody else keeps, with a step count each."""

    @property
    def calls(self) -> int: ...  # of step(), that were done
    def __init__(self) -> None: ...
    def step(
        self,
        # For each variable: see the roles of csrc/bindings/step_variable.hpp.
        arrays: tuple[Any, ...],
        *,
        sizes: Sequence[int],  # variables of each group
        groups: Sequence[StepGroup],
        learning_rates: Sequence[Any],  # in device memory, or None; empty, or for each group
        loss_scales: Sequence[tuple[Any, Any]],  # grad_scale and found_inf of each device
        is_strict: bool,
    ) -> list[int]: ...  # the variables that no kernel takes as they are; then nothing is done

def collect(
    groups: tuple[dict[str, Any], ...],
    states: dict[Any, Any],
    *,
    keys: tuple[str, ...],
    optional_keys: tuple[str, ...],
    options: tuple[str, ...],
    plain_types: tuple[type, ...],
    # Arrays and sizes for step(), variables to inspect, groups with options.
) -> tuple[list[Any], list[int], list[int], list[int]]: ...
def update(
    param: Any,
    grad: Any,
    m: Any,
    u: Any,
    *,
    average: Any,
    norm_scale: Any,
    remainder: Any,
    group: Group,
    grad_scale: float,
    weight_rounding: str,
    variable: int,
    first_element: int,
) -> None: ...
def decode_state(
    momentum: Any, norm: Any, norm_scale: Any, epsilon: float, to_momentum: Any, to_norm: Any
) -> None: ...
def encode_state(
    from_momentum: Any, from_norm: Any, epsilon: float, momentum: Any, norm: Any, norm_scale: Any
) -> None: ...
def join_weights(weights: Any, remainders: Any, joined: Any) -> None: ...
def split_weights(joined: Any, weights: Any, remainders: Any) -> None: ...
def global_norm(buffers: tuple[Any, ...]) -> float: ...
def describe(
    buffer: Any, role: str, index: int
) -> tuple[tuple[int, ...], tuple[int, ...], str, str, int, int, int]: ...
def copy(to: Any, from_: Any) -> None: ...
def build_info() -> dict[str, Any]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def _override_cpu_limit(cpus: int) -> None: ...
def _cgroup_cpu_limit(membership: str, mount: str) -> int: ...
def _bias_correction(beta: float, step: int) -> float: ...

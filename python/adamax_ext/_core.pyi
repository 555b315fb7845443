"""Types of the native core, checked against the compiled module by mypy.stubtest."""

from collections.abc import Iterable, Sequence
from typing import Any

__version__: str

class IeeeMode:
    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

class Plan:
    def __init__(
        self,
        params: Sequence[Any],
        names: Sequence[str],
        momentum: Sequence[Any],
        norm: Sequence[Any],
        averages: Sequence[Any] | None,
        accumulators: Sequence[Any] | None,
        decays: Sequence[bool],
    ) -> None: ...
    def step(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any] | None,
        step: int,
        loss_scale: float,
        accumulate_only: bool,
        overwrite: bool,
        require_finite: bool,
        learning_rate: float,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        weight_decay: float | None,
        clipnorm: float | None,
        clipvalue: float | None,
        global_clipnorm: float | None,
        ema_momentum: float,
        gradient_accumulation_steps: int | None,
    ) -> bool: ...
    calls: int
    def overwrite(self, variables: Sequence[Any] | None) -> None: ...

def update(
    param: Any,
    grad: Any,
    m: Any,
    u: Any,
    step: int,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    l2_decay: bool,
    epsilon_inside: bool,
    grad_scale: float,
    clipvalue: float | None,
    average: Any,
    ema_momentum: float,
) -> None: ...
def global_norm(buffers: Iterable[Any]) -> float: ...
def describe(
    buffer: Any, role: str, index: int
) -> tuple[tuple[int, ...], tuple[int, ...], str, int, int, int]: ...
def copy(to: Any, from_: Any) -> None: ...
def build_info() -> dict[str, Any]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def _override_cpu_limit(cpus: int) -> None: ...
def _cgroup_cpu_limit(membership: str, mount: str) -> int: ...

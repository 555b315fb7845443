"""Which variables are excluded from weight decay."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from adamax_ext import _core, _settings


class Exclusion:
    """Buffers and regular expressions for names; by default nothing is excluded."""

    def __init__(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        self._buffers = _settings.sequence("var_list", [] if var_list is None else var_list)
        self._patterns = _settings.sequence(
            "var_names", [] if var_names is None else var_names, "strings"
        )
        for pattern in self._patterns:
            try:
                re.search(pattern, "")
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"var_names must be regular expressions; received {pattern!r}: {error}"
                ) from error

    def groups(self, variables: Sequence[Any], names: Sequence[str]) -> list[int]:
        """Return 0 for each variable that has weight decay and 1 for one that has not."""
        memory = [_memory(variable, "variables", i) for i, variable in enumerate(variables)]
        excluded = {_memory(buffer, "var_list", i): i for i, buffer in enumerate(self._buffers)}
        for place in excluded.keys() - set(memory):
            raise ValueError(
                f"var_list[{excluded[place]}] of exclude_from_weight_decay() must be one of the "
                "variables; received other memory"
            )
        return [
            int(place in excluded or any(re.search(pattern, name) for pattern in self._patterns))
            for place, name in zip(memory, names, strict=True)
        ]


def _memory(buffer: Any, role: str, index: int) -> tuple[int, int]:
    """Return address and bytes, which two objects for the same memory share."""
    address, size = _core.describe(buffer, role, index)[4:6]
    return (address, size) if size else (0, 0)  # nothing of it could decay

"""Checkpoint files: safetensors with a JSON header, replaced atomically, read all or nothing."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from adamax_ext import _settings, arrays, low_state

FORMAT_VERSION = 2
_HEADER = "adamax_ext"
_COMMON = {"format_version", "calls", "learning_rate", "state"}
_KEYS = {
    # Exclusions were no state, but settings of a run; they are not looked at.
    1: _COMMON | {"excluded_from_weight_decay"},
    2: _COMMON | {"gradient_accumulation_steps", "accumulated"},
}
# Where they are not the defaults, in version 3: the settings that arrays and bits follow from, and
# the memory order of variables whose state is in blocks and not in C order.
LOW_MEMORY = {"state_bits", "weight_rounding", "seed", "memory_order"}
_KEYS[3] = _KEYS[2] | LOW_MEMORY
# What syncing a folder gives where there is no such thing; PostgreSQL ignores the same.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
_NO_FOLDER_SYNC |= {errno.EACCES, errno.EISDIR}  # on opening it

_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
}

PathLike: TypeAlias = str | os.PathLike[str]
State: TypeAlias = dict[str, dict[str, np.ndarray[Any, Any]]]


def write(path: PathLike, state_dict: dict[str, Any]) -> None:
    """Write `state_dict` to `path`, so that at every moment the old or the new file is there.

    The arrays of ``state_dict["state"]`` become tensors named ``<variable>/<kind>``; everything
    else goes into the header.
    """
    tensors = {
        f"{name}/{kind}": array
        for name, kinds in state_dict["state"].items()
        for kind, array in kinds.items()
    }
    header = {key: value for key, value in state_dict.items() if key != "state"}
    replaced = _regular_file(path)
    # A symbolic link stays one, also where it cannot be read: that is an error, not no link.
    target = Path(os.path.realpath(path, strict=replaced is not None))
    data = safetensors.numpy.save(tensors, metadata={_HEADER: json.dumps(header)})
    temporary = target.with_name(f".adamax_ext-{secrets.token_hex(8)}.tmp")
    mode = 0o666 if replaced is None else stat.S_IMODE(replaced.st_mode)
    try:
        binary = getattr(os, "O_BINARY", 0)  # Windows would write two bytes for each newline
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, mode)
        with open(descriptor, "wb") as file:
            if replaced is not None:
                _keep_owner_and_mode(descriptor, replaced)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _regular_file(path: PathLike) -> os.stat_result | None:
    """Return what is at `path`, None if nothing is; OSError if it is no regular file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return status


def _keep_owner_and_mode(descriptor: int, replaced: os.stat_result) -> None:
    """Give the new file those of the one that it replaces, as far as this process may."""
    if hasattr(os, "fchown"):
        for owner, group in ((replaced.st_uid, -1), (-1, replaced.st_gid)):
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, owner, group)
        with contextlib.suppress(PermissionError):  # last: a new owner clears bits
            os.fchmod(descriptor, stat.S_IMODE(replaced.st_mode))


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power failure, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def read(path: PathLike) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        The file is torn, or is no checkpoint of this package.
    """
    _regular_file(path)  # opening a FIFO would wait for ever
    # Not mapped into memory: another program that truncates the file would end this process.
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        # The header is whole; what it says of the file is not among the tensors.
        entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = entries.get("__metadata__") or {}
        if _HEADER not in metadata:
            raise ValueError(f"{path} is no checkpoint of adamax_ext: it has no '{_HEADER}' header")
        header = json.loads(metadata[_HEADER])
    except (SafetensorError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is torn, or no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is no JSON object: {header!r}")
    state: State = {}
    for key, tensor in tensors:
        name, _, kind = key.rpartition("/")
        state.setdefault(name, {})[kind] = _array(key, **tensor)
    return {**header, "state": state}


def _array(key: str, dtype: str, shape: list[int], data: bytearray) -> arrays.HostArray:
    try:
        return np.ndarray(shape, np.dtype(_DTYPES[dtype]), data)
    except (KeyError, TypeError) as error:  # TypeError: nobody registered bfloat16 with NumPy
        raise ValueError(f"{key} must be of float32 or float64; received {dtype}") from error


def require_format(state_dict: dict[str, Any]) -> None:
    """Raise ValueError unless `state_dict` has a known version and exactly the keys of that."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict; received {type(state_dict).__name__}")
    version = state_dict.get("format_version")
    if type(version) is not int or version not in _KEYS:
        raise ValueError(f"format_version must be 1, 2 or 3; received {version!r}")
    if set(state_dict) != _KEYS[version]:
        raise ValueError(
            f"state_dict must have the keys {sorted(_KEYS[version])}; "
            f"received {sorted(map(str, state_dict))}"
        )


def format_entries(
    state_bits: int, weight_rounding: str, seed: int, memory_order: dict[str, list[int]]
) -> dict[str, Any]:
    """Return the version, and the entries of `LOW_MEMORY` where they are not the defaults."""
    options = {"state_bits": state_bits, "weight_rounding": weight_rounding, "seed": seed}
    if options == low_state.DEFAULTS:
        return {"format_version": FORMAT_VERSION}
    return {"format_version": 3, **options, "memory_order": memory_order}


def absent_kinds(
    state_dict: dict[str, Any], state_bits: int, weight_rounding: str
) -> frozenset[str]:
    """Return the kinds of arrays that are zeros where an optimizer with these settings loads.

    ValueError if its state is in another number of bits, or would lose remainders.
    """
    saved = state_dict.get("state_bits", 32)
    if saved != state_bits:
        raise ValueError(
            f"state_bits of the state_dict is {saved!r}, of the optimizer {state_bits}; expected "
            f"the same: adamax_ext.convert_state(state_dict, state_bits={state_bits}) returns it so"
        )
    rounding = rounding_of(state_dict)
    if rounding == "remainder" != weight_rounding:
        raise ValueError(
            "weight_rounding of the state_dict is 'remainder', of the optimizer "
            f"{weight_rounding!r}, which would lose what weights do not hold; expected the same"
        )
    return frozenset({"remainder"} if rounding != "remainder" else ())


def rounding_of(state_dict: dict[str, Any]) -> str:
    """Return the weight_rounding of a `state_dict`; ValueError if it is none."""
    rounding: str = _settings.one_of(
        "weight_rounding of the state_dict",
        state_dict.get("weight_rounding", "nearest"),
        low_state.ROUNDINGS,
    )
    return rounding


def memory_orders(
    state_dict: dict[str, Any], expected: dict[str, tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Return the memory order of each variable when the state was saved; ValueError if it is none.

    Only where state is in blocks it matters.
    """
    saved = state_dict.get("memory_order", {})
    if not isinstance(saved, dict) or not saved.keys() <= expected.keys():
        raise ValueError(f"memory_order must be a dict for built variables; received {saved!r}")
    for name, axes in saved.items():
        is_list = isinstance(axes, list) and all(type(axis) is int for axis in axes)
        if not is_list or sorted(axes) != sorted(expected[name]):
            raise ValueError(
                f"memory_order of '{name}' must be a list of its axes {sorted(expected[name])}; "
                f"received {axes!r}"
            )
    return [tuple(saved.get(name, sorted(axes))) for name, axes in expected.items()]


def pending_names(
    state_dict: dict[str, Any], calls: int, steps: int | None, names: Iterable[str]
) -> list[str] | None:
    """Return which of `names` have accumulated gradients; None for version 1, which cannot tell.

    ValueError if another number of `steps` was accumulated, or for anything but such a list.
    """
    if state_dict["format_version"] == 1:
        return None
    saved, pending = state_dict["gradient_accumulation_steps"], state_dict["accumulated"]
    if saved != steps:
        raise ValueError(
            f"gradient_accumulation_steps of the state_dict is {saved!r}, of the optimizer "
            f"{steps!r}; expected the same"
        )
    possible = frozenset(names if steps is not None and calls % steps else ())
    is_list = isinstance(pending, list) and all(isinstance(name, str) for name in pending)
    if not (is_list and possible.issuperset(pending)):
        raise ValueError(
            "accumulated must be a list of variables, and empty where no window of calls has "
            f"begun; received {pending!r}"
        )
    return pending  # type: ignore[no-any-return]


def host_state(state: Any) -> State:
    """Return `state` with arrays of NumPy; ValueError unless it is made of dicts of arrays."""
    if not isinstance(state, dict) or not all(isinstance(x, dict) for x in state.values()):
        raise ValueError(f"state must be a dict of dicts of arrays; received {state!r}")
    return {
        name: {kind: arrays.as_host(array, f"{kind} of '{name}'") for kind, array in kinds.items()}
        for name, kinds in state.items()
    }


def fitting(state: Any, expected: State, absent: frozenset[str]) -> State:
    """Return `state` with arrays of NumPy; ValueError unless all is like that of `expected`.

    Arrays of `absent` kinds are zeros.
    """
    state = host_state(state)
    if set(state) != set(expected):
        missing, unknown = sorted(set(expected) - set(state)), list(set(state) - set(expected))
        raise ValueError(
            f"state must have the built variables; missing {missing}, unknown {unknown}"
        )
    result: State = {}
    for name, kinds in expected.items():
        if set(state[name]) != set(kinds) - absent:
            raise ValueError(
                f"state of '{name}' must have {sorted(set(kinds) - absent)}; "
                f"received {sorted(map(str, state[name]))}"
            )
        result[name] = {}
        for kind, array in kinds.items():
            wanted = arrays.shape_and_dtype(array)
            received = np.zeros(*wanted) if kind in absent else state[name][kind]
            if (received.shape, received.dtype) != wanted:
                raise ValueError(
                    f"{kind} of '{name}' must have shape {wanted[0]} and dtype {wanted[1]}; "
                    f"received shape {received.shape} and dtype {received.dtype}"
                )
            result[name][kind] = received
    return result


def converted(weights: Iterable[Any], expected: list[Any]) -> list[arrays.HostArray]:
    """Return `weights` as NumPy's, with the dtypes of `expected`; ValueError unless all fit."""
    received = list(weights)
    if len(received) != len(expected):
        raise ValueError(f"weights must have {len(expected)} arrays; received {len(received)}")
    return [
        as_numbers(f"weights[{i}]", weight, *arrays.shape_and_dtype(array))
        for i, (weight, array) in enumerate(zip(received, expected, strict=True))
    ]


def as_numbers(label: str, value: Any, shape: tuple[int, ...], dtype: Any) -> arrays.HostArray:
    """Return `value` as an array of that dtype; ValueError unless it can be one, of that shape."""
    array = arrays.as_host(value, label)
    try:
        if array.shape != shape:
            raise TypeError("another shape")
        with np.errstate(over="raise"):
            return array.astype(dtype, casting="same_kind", copy=False)
    except (TypeError, FloatingPointError) as error:
        raise ValueError(
            f"{label} must have shape {shape} and a dtype like {dtype}; "
            f"received shape {array.shape} and dtype {array.dtype} ({error})"
        ) from error

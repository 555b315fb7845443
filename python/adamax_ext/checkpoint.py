"""Checkpoint files: safetensors with a JSON header, replaced atomically, read all or nothing."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from adamax_ext import arrays

FORMAT_VERSION = 1
_HEADER = "adamax_ext"

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
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    data = safetensors.numpy.save(tensors, metadata={_HEADER: json.dumps(header)})
    temporary = target.with_name(f".adamax_ext-{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself survives a power failure
    finally:
        os.close(folder)


def read(path: PathLike) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        The file is torn, or is no checkpoint of this package.
    """
    state: State = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if _HEADER not in metadata:
                raise ValueError(
                    f"{path} is no checkpoint of adamax_ext: it has no '{_HEADER}' header"
                )
            header = json.loads(metadata[_HEADER])
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                name, _, kind = key.rpartition("/")
                state.setdefault(name, {})[kind] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is torn, or no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is no JSON object: {header!r}")
    return {**header, "state": state}


def require_format(state_dict: dict[str, Any], keys: set[str]) -> None:
    """Raise ValueError unless `state_dict` has this format version and exactly these keys."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict; received {type(state_dict).__name__}")
    version = state_dict.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}; received {version!r}")
    if set(state_dict) != keys:
        raise ValueError(
            f"state_dict must have the keys {sorted(keys)}; received {sorted(map(str, state_dict))}"
        )


def require_like(state: Any, expected: State) -> None:
    """Raise ValueError unless `state` has the names, kinds, shapes and dtypes of `expected`."""
    if not isinstance(state, dict) or not all(isinstance(x, dict) for x in state.values()):
        raise ValueError(f"state must be a dict of dicts of arrays; received {state!r}")
    if set(state) != set(expected):
        missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        raise ValueError(
            f"state must have the built variables; missing {missing}, unknown {unknown}"
        )
    for name, kinds in expected.items():
        if set(state[name]) != set(kinds):
            raise ValueError(
                f"state of '{name}' must have {sorted(kinds)}; received {sorted(state[name])}"
            )
        for kind, array in kinds.items():
            received, wanted = state[name][kind], arrays.shape_and_dtype(array)
            shape, dtype = np.shape(received), getattr(received, "dtype", None)
            if (shape, dtype) != wanted:
                raise ValueError(
                    f"{kind} of '{name}' must have shape {wanted[0]} and dtype {wanted[1]}; "
                    f"received shape {shape} and dtype {dtype}"
                )


def converted(weights: list[np.ndarray[Any, Any]], expected: list[Any]) -> list[Any]:
    """Return `weights` with the dtypes of `expected`; ValueError unless all fit there."""
    if len(weights) != len(expected):
        raise ValueError(f"weights must have {len(expected)} arrays; received {len(weights)}")
    result = []
    for i, (weight, array) in enumerate(zip(weights, expected, strict=True)):
        shape, dtype = arrays.shape_and_dtype(array)
        try:
            if weight.shape != shape:
                raise TypeError("another shape")
            with np.errstate(over="raise"):
                result.append(weight.astype(dtype, casting="same_kind"))
        except (TypeError, FloatingPointError) as error:
            raise ValueError(
                f"weights[{i}] must have shape {shape} and a dtype like {dtype}; "
                f"received shape {weight.shape} and dtype {weight.dtype} ({error})"
            ) from error
    return result

"""The native step as a target of XLA's foreign function interface, registered when first used."""

import importlib
from importlib import metadata
from typing import Any

import jax
from jax.extend import backend

from adamax_ext import _core

NAME = "adamax_ext_step"
_registered: set[str] = set()  # the platforms


def register() -> None:
    """Let the backends that run in this process call the native step.

    Raises
    ------
    RuntimeError
        The jaxlib that is installed does not take it.
    """
    # JAX's backends have started by now: one that rejects a handler raises here, and works on. A
    # handler that is registered earlier keeps it from starting.
    running = backend.backends()
    handlers = {
        "cpu": lambda: _core.xla_step,
        "cuda": _cuda_handler,
        "rocm": lambda: _core.xla_refuse,
    }
    for platform in (handlers.keys() & running.keys()) - _registered:
        name = platform if platform == "cpu" else platform.upper()
        try:
            jax.ffi.register_ffi_target(NAME, handlers[platform](), name)
        except Exception as error:
            raise RuntimeError(
                f"jaxlib {metadata.version('jaxlib')} does not take the native step of adamax_ext, "
                "which knows jaxlib 0.6 to 0.10: install one of these, or a newer adamax_ext"
            ) from error
        _registered.add(platform)


def _cuda_handler() -> Any:
    try:
        return importlib.import_module("adamax_ext._cuda").xla_step
    except ModuleNotFoundError:  # a build without CUDA kernels
        return _core.xla_refuse

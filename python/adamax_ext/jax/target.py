"""The native step as a target of XLA's foreign function interface, registered when first used."""

import functools
import importlib
from importlib import metadata
from typing import Any

import jax
from jax.extend import backend

from adamax_ext import _core

NAME = "adamax_ext_step"


@functools.cache
def register() -> None:
    """Let the backends that run in this process call the native step.

    Raises
    ------
    RuntimeError
        The jaxlib that is installed does not take it.
    """
    # Those that run have started: one that does not take a handler says so here, and works on. What
    # is registered earlier keeps it from starting.
    running = backend.backends()
    if "cpu" in running:
        register_handler("cpu", _core.xla_step)
    if "cuda" in running:
        register_handler("cuda", _cuda_handler())
    if "rocm" in running:
        register_handler("rocm", _core.xla_refuse)


def register_handler(platform: str, handler: Any) -> None:
    try:
        jax.ffi.register_ffi_target(
            NAME, handler, platform if platform == "cpu" else platform.upper()
        )
    except Exception as error:
        raise RuntimeError(
            f"jaxlib {metadata.version('jaxlib')} does not take the native step of adamax_ext, "
            "which knows jaxlib 0.6 to 0.10: install one of these, or a newer adamax_ext"
        ) from error


def _cuda_handler() -> Any:
    try:
        return importlib.import_module("adamax_ext._cuda").xla_step
    except ModuleNotFoundError:  # a build without CUDA kernels
        return _core.xla_refuse

"""Other libraries, if they are there."""

import importlib.util
import os

import pytest


def load_torch():
    return pytest.importorskip("torch", reason="needs torch, which cannot be imported")


def load_jax():
    return pytest.importorskip("jax", reason="needs jax, which cannot be imported")


def load_optax():
    load_jax()
    return pytest.importorskip("optax", reason="needs optax, which cannot be imported")


def load_keras():
    """Return the module keras, or skip the test with the reason why there is none."""
    if "KERAS_BACKEND" not in os.environ:
        has_torch = importlib.util.find_spec("torch") is not None
        os.environ["KERAS_BACKEND"] = "torch" if has_torch else "numpy"
    return pytest.importorskip("keras", reason="parity needs keras, which cannot be imported")

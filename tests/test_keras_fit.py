"""Two epochs of `fit` with our Adamax for Keras and with Keras' own, on every backend of ours."""

import functools
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from support.frameworks import load_keras
from support.keras_fits import BACKENDS, run, settings_on

keras = load_keras()


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Return the fits of a backend, done when first asked for."""

    @functools.cache
    def of(backend):
        pytest.importorskip(backend, reason=f"needs Keras on {backend}")
        return run(backend, tmp_path_factory.mktemp("fits") / "results.npz")

    return of


ALL = [(backend, i) for backend in BACKENDS for i in range(len(settings_on(backend)))]


@pytest.mark.parametrize(
    ("backend", "i"), ALL, ids=[f"{backend}-{settings_on(backend)[i]}" for backend, i in ALL]
)
def test_training_equals_keras(backend, i, fits):
    setting, results = fits(backend)[i]
    assert len(results) >= 7 + 2 * 5
    for name, (ours, theirs) in results.items():
        assert ours.dtype == theirs.dtype, name
        assert np.isfinite(ours).all(), name
        # Of gradients in 16 bits the last one can differ.
        is_16_bits = name[0] != "w" and "mixed" in setting.get("policy", "")
        tolerance = 1e-3 if is_16_bits else 1e-5
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_is_compared_and_changes_something(backend, fits):
    results = fits(backend)
    assert len(results) >= 13
    arguments = set(inspect.signature(keras.optimizers.Adamax).parameters) - {"name", "kwargs"}
    assert arguments <= {key for setting, _ in results for key in setting}
    trained = [b"".join(ours.tobytes() for ours, _ in fit.values()) for _, fit in results]
    # On torch one loss scale is a power of two, and dynamic ones always are.
    assert len(set(trained)) == len(results) - (2 if backend == "torch" else 1)


CONSTRUCT = """
from adamax_ext.keras import Adamax
try:
    Adamax()
except NotImplementedError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["numpy", "tensorflow"])
def test_other_backends_are_refused(backend):
    if backend != "numpy":
        pytest.importorskip(backend, reason=f"needs Keras on {backend}")
    said = subprocess.run(
        [sys.executable, "-c", CONSTRUCT],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert f"received the backend '{backend}'" in said.stdout, said.stderr
    assert "keras.optimizers.Adamax" in said.stdout

"""Two epochs of `fit` with our Adamax for Keras and with Keras' own, on every backend of ours."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from support.frameworks import load_keras
from support.keras_fits import BACKENDS, SETTINGS, run

keras = load_keras()


@pytest.fixture(scope="module", params=BACKENDS)
def fits(request, tmp_path_factory):
    pytest.importorskip(request.param, reason=f"needs Keras on {request.param}")
    return run(request.param, tmp_path_factory.mktemp("fits") / "results.npz")


@pytest.mark.parametrize("i", range(len(SETTINGS)), ids=lambda i: str(SETTINGS[i]))
def test_training_equals_keras(i, fits):
    assert len(fits[i]) >= 6 + 2 * 4
    for name, (ours, theirs) in fits[i].items():
        assert ours.dtype == theirs.dtype, name
        assert np.isfinite(ours).all(), name
        # Of gradients in 16 bits the last one can differ.
        is_16_bits = name[0] != "w" and "mixed" in SETTINGS[i].get("policy", "")
        tolerance = 1e-3 if is_16_bits else 1e-5
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), name


def test_every_argument_is_compared_and_changes_something(fits):
    arguments = set(inspect.signature(keras.optimizers.Adamax).parameters) - {"name", "kwargs"}
    assert arguments <= {key for setting in SETTINGS for key in setting}
    trained = [b"".join(ours.tobytes() for ours, _ in fit.values()) for fit in fits]
    assert len(set(trained)) == len(SETTINGS) - 2  # loss scales that are powers of two


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

"""The example for Keras learns to read digits, resumes with the same bits, and draws it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.frameworks import load_keras
from support.keras_fits import BACKENDS

load_keras()
for name in ("h5py", "sklearn", "matplotlib"):
    pytest.importorskip(name, reason=f"the example needs {name}: adamax_ext[demo,keras]")

EXAMPLE = Path(__file__).parent.parent / "examples" / "keras_digits.py"


@pytest.mark.parametrize("backend", BACKENDS)
def test_learns_as_with_keras_resumes_and_draws_it(backend, tmp_path):
    import matplotlib.image

    pytest.importorskip(backend, reason=f"needs Keras on {backend}")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--epochs", "8", "--output", "picture.png"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"^(\S+) +held-out accuracy ([\d.]+)%, weights (\w+), resumed in the middle (\w+)$",
        done.stdout,
        re.MULTILINE,
    )
    assert [name for name, *_ in found] == ["adamax_ext.keras", "keras.optimizers"]
    (_, ours, digest, resumed), (_, theirs, other, _) = found
    assert float(ours) > 95
    assert abs(float(ours) - float(theirs)) < 2
    assert digest == resumed
    assert digest != other  # so the digest tells runs apart
    height, width, _ = matplotlib.image.imread(tmp_path / "picture.png", format="png").shape
    assert width >= 1000
    assert height >= 400
    assert (tmp_path / "picture.png").stat().st_size > 20_000  # an empty canvas compresses to less

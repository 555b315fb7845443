"""The sharded example: trained by two processes, resumed by one, to its accuracy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the example needs torch, which cannot be imported")
pytest.importorskip("sklearn", reason="the example needs scikit-learn: adamax_ext[demo]")

EXAMPLE = Path(__file__).parents[1] / "examples" / "torch_fsdp2.py"
HANG_SECONDS = 600  # only to end what would wait for ever


def train(processes, directory, *arguments):
    """Return the epochs that are printed, and the accuracies."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the network of this machine
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(EXAMPLE), "--checkpoints", str(directory)]
    run = subprocess.run(
        [*command, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"^epoch (\d+), (\d+) processes: accuracy ([\d.]+)%$", run.stdout, re.M)
    assert all(int(line[1]) == processes for line in lines)
    return [int(line[0]) for line in lines], [float(line[2]) for line in lines]


def test_trained_by_two_processes_and_resumed_by_one(tmp_path):
    epochs, before = train(2, tmp_path, "--stop-after", "6")
    assert epochs == list(range(7))
    assert before[0] < 30
    epochs, after = train(1, tmp_path, "--resume")
    assert epochs == list(range(6, 13))
    assert after[0] == pytest.approx(before[-1], abs=0.5)  # two images, which may be on the brink
    assert after[-1] > 95

"""This end of a contestant's process; the other one is worker.py."""

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS

HERE = Path(__file__).parent
ANSWER_TIMEOUT = 90.0  # seconds; a peer that compiles longer is named with that
START_TIMEOUT = 300.0  # DeepSpeed builds itself in about two minutes


class Failure(Exception):
    """A contestant that is missing, or failed in a work: its message, and its process if it ran."""

    def __init__(self, reason: str, process: "Process | None" = None) -> None:
        super().__init__(reason)
        self.process = process


class Process:
    """A contestant's process."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.name, self.threads = name, threads
        count = str(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            # NumPy's BLAS serves the training alone; its threads spin for 20 ms after a product, on
            # the cores of the next optimizer step.
            "OPENBLAS_NUM_THREADS": "1",
            "ADAMAX_EXT_NUM_THREADS": count,
            "JAX_PLATFORMS": device,
            # JAX takes most of a GPU at its start, and others run beside it.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # Compilers and builders of this environment, as of an activated one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **CONTESTANTS[name].environment,
        }
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        cores = sorted(os.sched_getaffinity(0))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), name, device, count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        if threads < len(cores):  # the way to limit XLA's threads
            os.sched_setaffinity(self.process.pid, cores[:threads])
        self.gpu: dict[str, Any] | None = self.ask("start", timeout=START_TIMEOUT)["gpu"]

    def ask(self, do: str, timeout: float = ANSWER_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer; raise Failure if there is none."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        if self.process.poll() is not None:
            raise Failure(f"has ended before: {self.last_error()}", self)
        stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], timeout)[0]:
            self.end()
            raise Failure(f"no answer to {do} in {timeout:.0f} s", self)
        line = stdout.readline()
        if not line:
            raise Failure(f"exit status {self.process.wait()}: {self.last_error()}", self)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"], self)
        return answer

    def last_error(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1] if lines else "no message"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

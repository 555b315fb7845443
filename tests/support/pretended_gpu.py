"""bench/peers.py where the CPU pretends to be a GPU: all but the events and the sleep is real.

Run as ``python pretended_gpu.py FAULTS ARGUMENTS...`` with the arguments of bench/peers.py. FAULTS
is JSON: a fault by "contestant / work", where the work "check" is that of results.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import peers
from contestants import CONTESTANTS
from process import Failure
from worker import Worker

FAULTS = json.loads(sys.argv[1])
ERRORS = {
    "raise": {"error": "RuntimeError: out of memory"},
    "not implemented": {"error": "NotImplementedError: not written"},
}
L2_BYTES = 2**21  # the memory of a plain step on 2^17 elements


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def query(self):
        return False  # still asleep

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


CUDA = SimpleNamespace(
    Event=Event,
    _sleep=lambda cycles: None,
    empty_cache=lambda: None,
    get_device_properties=lambda device: SimpleNamespace(
        name="pretended", total_memory=2**34, L2_cache_size=L2_BYTES
    ),
)


class PretendedProcess:
    """Answers as a `Process` does, from this one."""

    def __init__(self, name, device, threads):
        assert device == "cuda"
        self.name, self.threads, self.process, self.has_ended = name, threads, self, False
        self.worker = Worker(name, "cpu", threads)
        if "torch" in CONTESTANTS[name].packages:
            self.worker.cuda = CUDA
        self.gpu = self.ask("start")["gpu"]

    def poll(self):
        return 1 if self.has_ended else None

    def end(self):
        self.has_ended = True

    def ask(self, do, **arguments):
        assert not self.has_ended
        fault = FAULTS.get(f"{self.name} / {arguments.get('work', {}).get('name', do)}")
        if fault in ("SIGKILL", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, fault))
        answer = json.loads(json.dumps(self.worker.answer(do, **arguments)))
        if fault == "differ":
            answer["weights"][0] += 1
        answer = ERRORS.get(fault, answer)
        if "error" in answer:
            raise Failure(answer["error"], self)
        return answer


if __name__ == "__main__":
    sys.exit(peers.main(sys.argv[2:], PretendedProcess))

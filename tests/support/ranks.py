"""Processes that train together: the ranks of a process group on the CPU, and what they return."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

HANG_SECONDS = 300  # only to end what would wait for ever
GRACE_SECONDS = 2  # for the other ranks, once one has failed


class Ranks:
    """Starts processes at the first call; they stay for the next ones, until one fails."""

    def __init__(self, count):
        self.count = count
        self._processes, self._connections = [], []

    def __call__(self, function, *args):
        """Call a function of a module on all ranks; return what each of them returns.

        If one raises, ends or hangs, all are killed, and an AssertionError has what each said.
        """
        __tracebackhide__ = True  # pytest: what the ranks say is enough
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, args)))
        answers = self._answers()
        errors = [
            f"rank {rank}: {text}" for rank, (is_good, text) in answers.items() if not is_good
        ]
        if len(answers) < self.count:
            silent = sorted(set(range(self.count)) - set(answers))
            errors.append(f"ranks {silent} had not answered when they were killed")
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return [pickle.loads(answers[rank][1]) for rank in range(self.count)]

    def _start(self):
        self._directory = tempfile.mkdtemp()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.count, self._directory), daemon=True
            )
            process.start()
            theirs.close()  # or its end would not be seen
            self._processes.append(process)
            self._connections.append(ours)

    def _answers(self):
        """Return what each rank answers; without some that are silent after another has failed."""
        answers, waiting = {}, dict(zip(self._connections, range(self.count), strict=True))
        end = time.monotonic() + HANG_SECONDS
        while waiting:
            ready = multiprocessing.connection.wait(waiting, max(0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(GRACE_SECONDS)
                    answers[rank] = False, f"ended with {self._processes[rank].exitcode}"
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        return answers

    def close(self):
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            process.close()
            connection.close()
        if self._processes:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._processes, self._connections = [], []


def _serve(connection, rank, count, directory):
    """Answer calls until the other end is closed."""
    import torch

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the network of this machine
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=Path(directory, "store").as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=HANG_SECONDS),
    )
    with contextlib.suppress(EOFError):
        while True:
            function, args = pickle.loads(connection.recv_bytes())
            try:
                answer = True, pickle.dumps(function(*args))
            except BaseException:
                answer = False, traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))

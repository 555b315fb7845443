"""Saved files: an interrupted save leaves the old or the new one, and only whole ones are read."""

import ctypes
import errno
import itertools
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from adamax_ext import checkpoint
from data.saving_cases import (
    DATA,
    FULL,
    NEW,
    OLD,
    is_new,
    names,
    refused,
    snapshot,
    train,
    trained,
)
from safetensors.numpy import save_file


def child(code):
    """Return a command that runs `code`, for which this file is imported, in a new process."""
    return [sys.executable, "-c", f"import os, test_saving_faults as t; {code}"]


# ---- Each call of the package fails --------------------------------------------------------------

CALLS = ("open", "fsync", "close", "replace")


def interposed(path, fail_at=None, failure=None, after=False):
    """Save over OLD, failing at one call; return the names of the calls and what was raised."""
    names_of_calls = []

    def interpose(function, name):
        def call(*arguments, **keywords):
            names_of_calls.append(name)
            fails = len(names_of_calls) - 1 == fail_at
            if fails and not after and name != "close":  # what is not closed would leak
                raise failure
            result = function(*arguments, **keywords)
            if fails:
                raise failure
            return result

        return call

    checkpoint.write(path, OLD)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, interpose(getattr(os, name), name))
        raised = None
        try:
            checkpoint.write(path, NEW)
        except BaseException as error:
            raised = error
    return names_of_calls, raised


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=repr)
def test_a_failing_call_leaves_one_whole_file_and_no_other(failure, after, tmp_path):
    path = tmp_path / "file"
    calls, _ = interposed(path)
    assert {"open", "fsync", "replace", "close"} == set(calls)
    replaced = calls.index("replace")
    for i, name in enumerate(calls):
        assert interposed(path, i, failure, after)[1] is failure, name
        assert is_new(path) == (i > replaced or (i == replaced and after)), (i, name)
        assert names(tmp_path) == ["file"], (i, name)


def test_the_data_is_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recorded_replace(source, target):
        assert checkpoint.read(source)["calls"] == 2  # nothing is written after the fsync
        events.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    checkpoint.write(path, NEW)
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert events == [("fsync", file), ("replace", file), ("fsync", folder)]


# ---- Each system call fails, or is the last ------------------------------------------------------

TRACED = "open|creat|p?write|ftruncate|fallocate|sendfile|copy_file|f?ch(mod|own)|f.*sync|close"
TRACED += "|link|rename"


def serve():
    """For each path on stdin, save NEW there in a fork, which waits for a tracer and a line."""
    for line in iter(sys.stdin.readline, ""):
        process = os.fork()
        if process == 0:
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER_ANY
            print(os.getpid(), flush=True)
            sys.stdin.readline()
            try:
                checkpoint.write(line.strip(), NEW)
                print("saved", flush=True)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(0)
        os.waitpid(process, 0)
        print("end", flush=True)


class Server:
    def __init__(self, folder):
        self.path, self.log = folder / "folder" / "file", folder / "log"
        self.path.parent.mkdir()
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "cwd": DATA.parent,
        }
        self.process = subprocess.Popen(child("t.serve()"), **pipes)

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def save(self, *options):
        """Save NEW over OLD under strace; return the outcome ("" if killed) and the calls."""
        checkpoint.write(self.path, OLD)
        command = ["strace", "-y", "-s1", "-e", f"trace=/^({TRACED})", *options, "-o", self.log]
        command += ["-p", self.ask(self.path)]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = strace.stderr.readline()
        outcome = self.ask("go")
        if outcome != "end":
            assert self.process.stdout.readline() == "end\n"
        strace.communicate()
        if "attached" not in said:
            pytest.skip(f"strace cannot trace here: {said}")
        return "" if outcome == "end" else outcome, self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (sys.platform == "linux" and shutil.which("strace")):
        pytest.skip("strace is not installed")
    server = Server(tmp_path_factory.mktemp("strace"))
    yield server
    server.process.communicate()
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def calls(server):
    """(name, how many of that name came before or are it, line) of calls about our files."""
    outcome, log = server.save()
    assert (outcome, is_new(server.path)) == ("saved", True)
    found, counts = [], {}
    for line in log:
        name = re.match(r"\w*", line)[0]
        counts[name] = counts.get(name, 0) + 1
        if str(server.path.parent) in line:
            found.append((name, counts[name], line))
    return found


def renamed_at(server, calls):
    """Return the index of the call that gives the file its name, the only one that names it."""
    (i,) = [i for i, (_, _, line) in enumerate(calls) if f'"{server.path}"' in line]
    assert calls[i][0].startswith("rename")
    return i


def test_system_calls_come_in_a_safe_order(server, calls):
    renamed = renamed_at(server, calls)
    data = [i for i, call in enumerate(calls) if re.search("write|truncate", call[0])]
    file_synced, folder_synced = [i for i, call in enumerate(calls) if call[0].endswith("sync")]
    assert max(data) < file_synced < renamed < folder_synced
    of_folder = [f"<{server.path.parent}>" in calls[i][2] for i in (file_synced, folder_synced)]
    assert of_folder == [False, True]


@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOSPC", "signal=KILL"])
def test_a_fault_at_any_system_call_leaves_one_whole_file(fault, server, calls):
    renamed = renamed_at(server, calls)
    for i, (name, count, line) in enumerate(calls):
        outcome, log = server.save("-e", f"inject={name}:{fault}:when={count}")
        if fault == "signal=KILL":
            assert (outcome, log[-1]) == ("", "+++ killed by SIGKILL +++"), line
        else:
            assert sum("(INJECTED)" in x for x in log) == 1, line
            assert (outcome == "saved") <= (name == "close"), f"not noticed: {line}"
            assert names(server.path.parent) == ["file"], line
        assert is_new(server.path) == (outcome == "saved" or i > renamed), f"{outcome!r}: {line}"
        for leftover in set(names(server.path.parent)) - {"file"}:
            os.unlink(server.path.with_name(leftover))


# ---- kill -9 at any moment -----------------------------------------------------------------------


def hammer(path, rounds):
    """Kill `rounds` forks that save OLD and NEW in turn; print how many left a temporary file."""
    delay, leftovers = random.Random(0), 0
    checkpoint.write(path, OLD)
    for _ in range(rounds):
        process = os.fork()
        if process == 0:
            for state in itertools.cycle((NEW, OLD)):
                checkpoint.write(path, state)
        time.sleep(delay.uniform(0, 0.04))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        is_new(path)
        for name in set(os.listdir()) - {path}:
            leftovers += 1
            os.unlink(name)
    print(leftovers)


def test_kill_at_any_moment_leaves_one_whole_file(tmp_path):
    command = child(f"os.chdir({str(tmp_path)!r}); t.hammer('file', 60)")
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=DATA.parent)
    assert int(result.stdout) >= 1  # so kills did hit saves


# ---- Files that are no checkpoint ----------------------------------------------------------------

TORN = "is torn, or no safetensors file"


def test_a_torn_file_is_refused(tmp_path):
    weights, optimizer = trained(FULL)
    optimizer.save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    for torn in (*(data[:n] for n in range(len(data))), data + b"\0", data[1:]):
        (tmp_path / "torn").write_bytes(torn)
        refused(optimizer, weights, ValueError, TORN, optimizer.load, tmp_path / "torn")


def test_a_flipped_bit_in_the_header_is_refused_unless_it_is_in_a_number(tmp_path):
    """What is a digit of calls or of the rate may be another one; anything else is noticed."""
    weights, optimizer = trained(FULL)
    optimizer.save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    numbers = re.search(rb"calls\W+(\d+)\W+learning_rate\W+([\d.]+)", data)
    digits = [*range(*numbers.span(1)), *range(*numbers.span(2))]
    for i, bit in itertools.product(sorted({*range(end)} - {*digits}), (0, 5, 7)):
        (tmp_path / "flipped").write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
        refused(optimizer, weights, ValueError, None, optimizer.load, tmp_path / "flipped")


FOREIGN = [  # bytes, or metadata of a file of tensors
    (b"", TORN),
    (b"no tensors " * 9, TORN),
    (np.ones(9).dumps(), TORN),
    (None, "is no checkpoint of adamax_ext: it has no 'adamax_ext' header"),
    ({"format": "pt"}, "is no checkpoint of adamax_ext: it has no 'adamax_ext' header"),
    ({"adamax_ext": "{"}, None),
    ({"adamax_ext": "[1]"}, r"no JSON object: \[1\]"),
    ({"adamax_ext": "{}"}, "format_version must be 1, 2 or 3; received None"),
]


@pytest.mark.parametrize(("content", "match"), FOREIGN)
def test_a_file_of_another_program_is_refused(content, match, tmp_path):
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({"w/norm": np.ones(1)}, path, content)
    weights, optimizer = trained(FULL)
    refused(optimizer, weights, ValueError, match, optimizer.load, path)


# ---- Where the file goes -------------------------------------------------------------------------

PLACES = {
    "str": lambda folder: str(folder / "file"),
    "pathlib": lambda folder: folder / "file",
    "relative": lambda folder: "file",
    "non-ASCII": lambda folder: folder / "größe 重み.\N{SNOWMAN}",
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_save_writes_or_replaces_one_file(place, exists, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = PLACES[place](tmp_path)
    weights, optimizer = trained(FULL)
    if exists:
        Path(path).write_text("something else, and longer than the file" * 100)
    optimizer.save(path)
    before = snapshot(optimizer)
    train(FULL, weights, optimizer, range(3))
    optimizer.load(path)
    assert snapshot(optimizer) == before
    assert names(tmp_path) == [Path(path).name]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("link", ["../there/file", "absolute"])
def test_save_follows_a_symbolic_link_and_keeps_it(link, exists, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    target = there / "file" if link == "absolute" else Path(link)
    (here / "link").symlink_to(target)
    if exists:
        checkpoint.write(there / "file", OLD)
    checkpoint.write(here / "link", NEW)
    assert (here / "link").readlink() == target
    assert is_new(there / "file")
    assert names(here) == ["link"]
    assert names(there) == ["file"]
    assert not (there / "file").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027, 0o002], ids=oct)
def test_permissions_follow_the_umask(umask, tmp_path):
    previous = os.umask(umask)
    try:
        checkpoint.write(tmp_path / "file", NEW)
    finally:
        os.umask(previous)
    assert oct(stat.S_IMODE((tmp_path / "file").stat().st_mode)) == oct(0o666 & ~umask)


@pytest.mark.parametrize("path", ["missing/file", "folder", "file/file"])
def test_a_place_that_cannot_be_written_is_an_os_error(path, tmp_path):
    (tmp_path / "folder").mkdir()
    checkpoint.write(tmp_path / "file", OLD)
    with pytest.raises(OSError):
        checkpoint.write(tmp_path / path, NEW)
    assert sorted(names(tmp_path)) == ["file", "folder"]
    assert not is_new(tmp_path / "file")
    assert names(tmp_path / "folder") == []

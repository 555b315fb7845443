"""Saved files: an interrupted save leaves the old or the new one, and only whole ones are read."""

import errno
import itertools
import os
import random
import re
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

"""Each system call of a save or load fails, or is the last: nothing that was saved is lost."""

import ctypes
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from adamax_ext import checkpoint
from data.saving_cases import DATA, FULL, NEW, OLD, is_new, names, snapshot, train, trained

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="calls are those of Linux")

ERRORS = ("EIO", "ENOSPC", "EINTR", "EACCES")
FAULTS = [*(f"error={name}" for name in ERRORS), "signal=KILL"]


def child(code):
    """Return a command that runs `code`, for which this file is imported, in a new process."""
    return [sys.executable, "-c", f"import test_saving_system_calls as t; {code}"]


# ---- Under strace --------------------------------------------------------------------------------


def save(path):
    checkpoint.write(path, NEW)


def load(path):
    """Load it into an optimizer that is further on; if that fails, it is as it was."""
    weights, optimizer = trained(FULL)
    saved = snapshot(optimizer)
    train(FULL, weights, optimizer, range(3))
    before = snapshot(optimizer)
    try:
        optimizer.load(path)
    except BaseException:
        assert snapshot(optimizer) == before
        raise
    assert snapshot(optimizer) == saved


def serve():
    """For each call and path on stdin, do it in a fork, which waits for a tracer and a signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for line in iter(sys.stdin.readline, ""):
        process = os.fork()
        if process == 0:
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER_ANY
            print(os.getpid(), flush=True)
            signal.sigwait({signal.SIGUSR1})  # no call that is counted
            name, path = line.strip().split(" ", 1)
            try:
                {"save": save, "load": load}[name](path)
                print("done", flush=True)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(0)
        os.waitpid(process, 0)
        print("end", flush=True)


class Server:
    def __init__(self, folder):
        self.path, self.log = folder / "folder" / "file", folder / "log"
        self.path.parent.mkdir()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(child("t.serve()"), cwd=DATA.parent, **pipes)

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def run(self, call, path, *options):
        """Do `call` under strace; return the outcome ("" if killed) and the lines about files."""
        pid = self.ask(f"{call} {path}")
        command = ["strace", "-y", "-s1", "-e", "trace=%file,%desc", *options, "-o", self.log]
        strace = subprocess.Popen([*command, "-p", pid], stderr=subprocess.PIPE, text=True)
        said = strace.stderr.readline()
        os.kill(int(pid), signal.SIGUSR1)
        outcome = self.process.stdout.readline().strip()
        if outcome != "end":
            assert self.process.stdout.readline() == "end\n"
        strace.communicate()
        if "attached" not in said:
            pytest.skip(f"strace cannot trace here: {said}")
        return "" if outcome == "end" else outcome, self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    server = Server(tmp_path_factory.mktemp("strace"))
    yield server
    server.process.communicate()
    assert server.process.returncode == 0


def prepare(server, case):
    """Empty the folder and make what `case` finds there; return the path that it uses."""
    for path in server.path.parent.iterdir():
        path.unlink()
    if case == "load":
        trained(FULL)[1].save(server.path)
    elif case != "save a new file":
        checkpoint.write(server.path, OLD)
    if case != "save behind a link":
        return server.path
    link = server.path.with_name("link")
    link.symlink_to("file")
    return link


def run(server, case, *options):
    return server.run(case.split()[0], prepare(server, case), *options)


@functools.cache
def calls_of(server, case):
    """(name, how many of that name came before or are it, line) of calls about our files."""
    outcome, log = run(server, case)
    assert outcome == "done"
    found, counts = [], {}
    for line in log:
        name = re.match(r"\w*", line)[0]
        counts[name] = counts.get(name, 0) + 1
        if str(server.path.parent) in line:
            found.append((name, counts[name], line))
    return found


def renamed_at(server, calls):
    """Return the index of the call that gives the file its name."""
    (i,) = [i for i, (name, _, _) in enumerate(calls) if name.startswith("rename")]
    assert f'"{server.path}"' in calls[i][2]
    return i


SAVES = ["save over a file", "save a new file", "save behind a link"]


@pytest.mark.parametrize("case", SAVES)
def test_system_calls_come_in_a_safe_order(case, server):
    """So that a power cut, which loses what was not synced, leaves the old or the new file."""
    calls = calls_of(server, case)
    renamed = renamed_at(server, calls)
    data = [i for i, call in enumerate(calls) if re.search("write|truncate|ch(mod|own)", call[0])]
    file_synced, folder_synced = [i for i, call in enumerate(calls) if call[0].endswith("sync")]
    assert max(data) < file_synced < renamed < folder_synced
    of_folder = [f"<{server.path.parent}>" in calls[i][2] for i in (file_synced, folder_synced)]
    assert of_folder == [False, True]


def test_a_file_is_not_mapped_into_memory(server):
    """Another program may truncate it: what is mapped is gone then, and reading it is a crash."""
    used = [name for name, _, _ in calls_of(server, "load")]
    assert "read" in used
    assert not any("map" in name for name in used)


def may_be_ignored(fault, name, line, case, again):
    """Whether a call that failed so changes nothing of what was saved or loaded."""
    if fault == "error=EINTR" and again:
        return True
    if fault == "error=EACCES" and (name in ("fchown", "fchmod") or "O_DIRECTORY" in line):
        return True
    # What Python asks for when it makes a file of a descriptor, and links where nothing is.
    asks = name in ("close", "ioctl", "lseek", "fstat") or re.match(r"newfstatat\(\d", line)
    return bool(asks) or (case == "save a new file" and "NOFOLLOW" in line)


@pytest.mark.parametrize("case", [*SAVES, "load"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_system_call_loses_nothing(fault, case, server, record_property):
    calls = calls_of(server, case)
    renamed = len(calls) if case == "load" else renamed_at(server, calls)
    folder = server.path.parent
    for i, (name, count, line) in enumerate(calls):
        outcome, log = run(server, case, "-e", f"inject={name}:{fault}:when={count}")
        if fault == "signal=KILL":
            assert (outcome, log[-1]) == ("", "+++ killed by SIGKILL +++"), line
        else:
            (failed,) = [x for x in log if "(INJECTED)" in x]
            assert str(folder) in failed, f"{failed} instead of {line}"
            assert set(names(folder)) <= {"file", "link"}, line
            again = sum(x.startswith(f"{name}(") and str(folder) in x for x in log)
            again = again > sum(x[0] == name for x in calls)
            is_of_folder = f"<{folder}>" in line or f'"{folder}"' in line
            ignored = may_be_ignored(fault, name, line, case, again)
            ignored |= fault == "error=EACCES" and is_of_folder and i > renamed
            if outcome == "done":
                assert ignored, f"not noticed: {line}"
            else:
                assert re.match(r"(OS|Permission|Interrupted)Error: \[Errno", outcome), line
        if case == "load":
            assert names(folder) == ["file"]
            load(server.path)
            continue
        if case == "save behind a link":
            assert server.path.with_name("link").is_symlink(), line
        if case == "save a new file" and not (outcome == "done" or i > renamed):
            assert not server.path.exists(), line
        else:
            assert is_new(server.path) == (outcome == "done" or i > renamed), f"{outcome}: {line}"
    record_property("file faults", len(calls))


# ---- A disk that is full, or read-only -----------------------------------------------------------


def save_within(path, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    save_refused(path)


def save_refused(path):
    try:
        save(path)
    except OSError:
        return
    raise AssertionError("was saved")


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_of_which_only_a_part_can_be_written(exists, tmp_path, record_property):
    """The system writes as much as it may, and tells that: what a full disk does."""
    path, whole = tmp_path / "folder" / "file", tmp_path / "whole"
    path.parent.mkdir()
    checkpoint.write(whole, NEW)
    if exists:
        checkpoint.write(path, OLD)
    sizes = [0, 1, 4096, whole.stat().st_size // 2, whole.stat().st_size - 1]
    for size in sizes:
        command = child(f"t.save_within({str(path)!r}, {size})")
        subprocess.run(command, check=True, cwd=DATA.parent)
        assert names(path.parent) == ["file"] * exists
        assert not exists or not is_new(path)
    record_property("file faults", len(sizes))


DISK = """
mount -t tmpfs -o size=600k none "$0" || exit 77
"$1" -c "import test_saving_system_calls as t; t.on_full_disk('$0/file')" || exit 1
mount -o remount,ro "$0" || exit 77
"$1" -c "import test_saving_system_calls as t; t.on_read_only_disk('$0/file')"
"""


def on_full_disk(path):
    checkpoint.write(path, OLD)
    save_refused(path)
    assert os.listdir(os.path.dirname(path)) == ["file"]
    assert not is_new(path)


def on_read_only_disk(path):
    save_refused(path)
    assert not is_new(path)


def test_a_full_and_a_read_only_disk(tmp_path, record_property):
    command = ["unshare", "--mount", "sh", "-c", DISK, tmp_path, sys.executable]
    if not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("only root mounts a disk")
    result = subprocess.run(command, cwd=DATA.parent, stderr=subprocess.PIPE, text=True)
    if result.returncode == 77 or result.stderr.startswith("unshare"):
        pytest.skip(f"cannot mount here: {result.stderr}")
    assert result.returncode == 0, result.stderr
    record_property("file faults", 2)


# ---- Another process saves while this one loads --------------------------------------------------


def test_a_file_that_is_replaced_while_it_is_loaded_is_whole(tmp_path):
    path = tmp_path / "file"
    checkpoint.write(path, OLD)
    writer = subprocess.Popen(child(f"t.save_in_turn({str(path)!r})"), cwd=DATA.parent)
    try:
        seen = set()
        while seen != {False, True}:
            assert writer.poll() is None, "nobody replaces the file"
            seen.add(is_new(path))
        for _ in range(100):
            is_new(path)
    finally:
        writer.kill()
        writer.wait()


def save_in_turn(path):
    while True:
        for state in (NEW, OLD):
            checkpoint.write(path, state)

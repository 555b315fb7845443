"""Files that are none, what a replaced file keeps, folders without sync, tensors and headers."""

import errno
import json
import os
import re
import resource
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from adamax_ext import checkpoint
from data.saving_cases import DATA, FULL, NEW, OLD, is_new, names, refused, trained

# ---- What is no file, and what a file keeps ------------------------------------------------------


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


NO_FILES = {"device": device, "FIFO": os.mkfifo, "socket": bound_socket, "folder": os.mkdir}


@pytest.mark.parametrize("through", ["itself", "link", "link to a link"])
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_and_stays(make, through, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make("it")
    os.symlink("it", "link")
    os.symlink("link", "link to a link")
    path = tmp_path / through.replace("itself", "it")
    before = os.lstat("it").st_ino, os.stat("it").st_mode
    weights, optimizer = trained(FULL)
    with pytest.raises(OSError, match=re.escape(f"Not a regular file: '{path}'")):
        optimizer.save(path)
    refused(optimizer, weights, OSError, "Not a regular file", optimizer.load, path)
    assert (os.lstat("it").st_ino, os.stat("it").st_mode) == before
    assert sorted(names(tmp_path)) == ["it", "link", "link to a link"]


def test_the_null_device_is_refused(monkeypatch):
    for call in ("open", "replace"):  # root could
        monkeypatch.setattr(os, call, lambda *_, call=call: pytest.fail(f"os.{call} was called"))
    with pytest.raises(OSError, match="Not a regular file: '/dev/null'"):
        checkpoint.write("/dev/null", NEW)


@pytest.mark.parametrize("through", ["file", "link"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o444], ids=oct)
def test_a_replaced_file_keeps_its_mode_and_owner(mode, through, tmp_path):
    path = tmp_path / "file"
    checkpoint.write(path, OLD)
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 1234, 4321)
    (tmp_path / "link").symlink_to("file")
    before = path.stat()
    checkpoint.write(tmp_path / through, NEW)
    after = path.stat()
    assert is_new(path)
    assert oct(stat.S_IMODE(after.st_mode)) == oct(mode)
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_an_owner_that_cannot_be_kept_is_no_error(tmp_path, monkeypatch):
    path, kept = tmp_path / "file", []
    checkpoint.write(path, OLD)
    path.chmod(0o640)

    def chown(_, owner, group):
        kept.append((owner, group))
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "fchown", chown)
    checkpoint.write(path, NEW)
    assert kept == [(os.geteuid(), -1), (-1, path.stat().st_gid)]
    assert (is_new(path), oct(stat.S_IMODE(path.stat().st_mode))) == (True, oct(0o640))
    assert names(tmp_path) == ["file"]


# What a call of a folder gives (CIFS, sshfs, Windows), and whether that is an error.
OF_FOLDERS = [
    *(("fsync", getattr(errno, n), False) for n in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "EBADF")),
    *(("open", getattr(errno, name), False) for name in ("EACCES", "EISDIR")),
    *((call, getattr(errno, n), True) for call in ("open", "fsync") for n in ("EIO", "ENOSPC")),
]


@pytest.mark.parametrize(("call", "code", "is_error"), OF_FOLDERS)
def test_a_folder_that_cannot_be_synced(call, code, is_error, tmp_path, monkeypatch):
    path, original = tmp_path / "file", getattr(os, call)
    checkpoint.write(path, OLD)

    def failing(subject, *arguments):
        is_folder = os.path.isdir(subject) if call == "open" else stat.S_ISDIR(os.stat(subject)[0])
        if is_folder:
            raise OSError(code, os.strerror(code))
        return original(subject, *arguments)

    monkeypatch.setattr(os, call, failing)
    if is_error:
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            checkpoint.write(path, NEW)
    else:
        checkpoint.write(path, NEW)
    assert is_new(path)
    assert names(tmp_path) == ["file"]


# ---- Dtypes that NumPy does not know, headers that are none --------------------------------------


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def saved_with_dtype(path, dtype, itemsize):
    """Write a checkpoint of FULL in which the norm of "w" is of another dtype."""
    state_dict, header, data = trained(FULL)[1].state_dict(), {}, b""
    for name, kinds in state_dict.pop("state").items():
        for kind, array in kinds.items():
            changes = (name, kind) == ("w", "norm")
            part = bytes(array.size * itemsize) if changes else array.tobytes()
            header[f"{name}/{kind}"] = {
                "dtype": dtype if changes else f"F{8 * array.itemsize}",
                "shape": array.shape,
                "data_offsets": [len(data), len(data) + len(part)],
            }
            data += part
    raw_file(path, {"__metadata__": {"adamax_ext": json.dumps(state_dict)}, **header}, data)


def refuse_dtypes(folder):
    for dtype, size in [("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F16", 2), ("I32", 4)]:
        path = Path(folder) / dtype
        saved_with_dtype(path, dtype, size)
        weights, optimizer = trained(FULL)
        match = f"w/norm must be of float32 .*; received {dtype}|norm of 'w' must .* dtype float32"
        refused(optimizer, weights, ValueError, match, optimizer.load, path)


@pytest.mark.parametrize("process", ["this", "one without ml_dtypes"])
def test_a_tensor_of_another_dtype_is_refused_by_name(process, tmp_path):
    if process == "this":
        refuse_dtypes(tmp_path)
        return
    code = "import sys; sys.modules['ml_dtypes'] = None; import test_saving_files as t;"
    command = [sys.executable, "-c", f"{code} t.refuse_dtypes({str(tmp_path)!r})"]
    subprocess.run(command, check=True, cwd=DATA.parent)


DEEP = "[" * 100_000
MALFORMED = [
    {"__metadata__": [1]},
    {"__metadata__": {"adamax_ext": ["{}"]}},
    {"__metadata__": {"adamax_ext": DEEP}},
    {"__metadata__": {"adamax_ext": '{"a":' * 100_000}},
    {"__metadata__": {"adamax_ext": '{"calls": 1' + "0" * 9999 + "}"}},
    {"__metadata__": {"adamax_ext": "null"}},
    {"__metadata__": {"adamax_ext": "[[]]"}},
    {"adamax_ext": DEEP},
    DEEP.encode(),
    b'{"__metadata__": ' + DEEP.encode(),
    b"[]",
    b"\xff",
    b"",
]


@pytest.mark.parametrize("header", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_header_is_a_value_error(header, tmp_path):
    raw_file(tmp_path / "file", header)
    weights, optimizer = trained(FULL)
    refused(optimizer, weights, ValueError, None, optimizer.load, tmp_path / "file")


# ---- Hostile files -------------------------------------------------------------------------------


def tensor(shape, end, dtype="F32"):
    return {"w/norm": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


HOSTILE = [  # the length of the header, where it lies; the header
    (2**63, {}),
    (2**64 - 1, {}),
    (2**40, {}),
    (None, tensor([2**38], 2**40)),
    (None, tensor([2**62, 4], 0)),
    (None, tensor([2**32, 2**32], 0)),
    (None, tensor([2**38], 16)),
    (None, tensor([4], 2**64 - 1)),
    (None, tensor([0] * 10_000, 0)),
    (None, {f"{i}/norm": tensor([4], 16)["w/norm"] for i in range(1000)}),
    (None, {"__metadata__": {"adamax_ext": '{"calls": ' + "9" * 100_000 + "}"}}),
    (None, {"__metadata__": {"adamax_ext": "__import__('os').abort()"}}),
    (None, {"__metadata__": {"adamax_ext": "cos\nabort\n(tR."}}),  # a pickle
]


def load_hostile(folder):
    """Load each file, with little more memory than there is; nothing but that file is opened."""
    _, optimizer = trained(FULL)
    paths = [Path(folder) / str(i) for i in range(len(HOSTILE))]
    for path, (length, header) in zip(paths, HOSTILE, strict=True):
        raw_file(path, header, bytes(16))
        if length is not None:
            path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ValueError):
        optimizer.load(paths[0])  # what is imported at the first use is
    events, loading = [], False
    sys.addaudithook(lambda *event: events.append(event) if loading else None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
    for path in paths:
        events.clear()
        try:
            loading = True
            optimizer.load(path)
        except ValueError:
            loading = False
        assert not loading, path
        assert [name for name, _ in events] == ["open"], events
        assert events[0][1][0] == str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited")
def test_a_hostile_file_runs_nothing_and_takes_no_memory(tmp_path):
    code = f"import test_saving_files as t; t.load_hostile({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DATA.parent)

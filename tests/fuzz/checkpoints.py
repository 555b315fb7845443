"""Fuzzes checkpoint files: one loads and training goes on, or it is a ValueError and nothing more.

Files are right ones with changes: in the JSON of both headers, in any byte, in the length. What a
file makes the process do besides is seen by an audit hook, and what it makes it allocate by
libFuzzer's own limit for one allocation.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from adamax_ext import Adamax, LossScaleOptimizer, checkpoint
from harness import run
from support.bits import dtype_of
from support.training_machine import TrainingMachine

PATH = Path(tempfile.mkdtemp(dir="/dev/shm")) / "file"
CONFIGS = [
    {},
    {"use_ema": True, "gradient_accumulation_steps": 3},
    {"state_bits": 16, "weight_rounding": "remainder"},
    {"state_bits": 8, "weight_rounding": "stochastic", "seed": 9, "use_ema": True},
]
# "dtype" of a tensor, values of any entry, and JSON that no value writes.
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "I8", "U8", "I16", "U16", "I32", "x"]
VALUES = [None, True, False, -1, 0, 1, 2, 3, 5, 8, 16, 32, 2**31, 2**53, 2**53 - 1, 2**63, 2**64]
VALUES += [-0.0, 0.5, 2.5, 1e-46, 1e39, float("nan"), float("inf"), "", "x", "\ud800", "nearest"]
VALUES += ["remainder", "variable_0", "variable_1", "variable_0/norm", [], [0], [1, 0], [0, 1]]
VALUES += [["variable_0"], ["variable_1", "variable_1"], {}, {"variable_1": [0, 1]}, {"x": 1}]
RAW = ["9" * 5000, "[" * 30_000, '{"x":' * 30_000, "1e999", "-", '"\\ud800"', "nul", "\x00"]
FORBIDDEN = ("exec", "compile", "pickle.", "os.", "subprocess.", "ctypes.", "socket.", "shutil.")
_is_loading = False


def audit(event, arguments):
    if _is_loading and event.startswith(FORBIDDEN):
        raise AssertionError(f"a checkpoint made the process do this: {event} {arguments}")


def trained(i):
    """Return an optimizer after three calls, its weights, and gradients for more."""
    dtype = dtype_of("bfloat16" if i > 1 else "float32")
    # The last one has blocks of 8 bits, of an array whose axes lie the other way round in memory.
    shape = (64, 64) if CONFIGS[i].get("state_bits") == 8 else (2, 3)
    rng = np.random.default_rng(i)
    weights = {
        "variable_0": rng.standard_normal(5).astype(dtype),
        "variable_1": rng.standard_normal(shape).astype(dtype).T,
    }
    grads = [rng.standard_normal(w.shape).astype(np.float32) for w in weights.values()]
    grads[1] = np.asfortranarray(grads[1])
    optimizer = Adamax(**CONFIGS[i])
    optimizer = LossScaleOptimizer(optimizer, 8.0) if i == 1 else optimizer
    optimizer.build(weights)
    for _ in range(4):
        optimizer.apply(grads)
    return optimizer, weights, grads


def saved(optimizer):
    optimizer.save(PATH)
    content = PATH.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def change_json(b, value, names):
    """Change something at some depth of a JSON value, which is what can be changed in place."""
    while isinstance(value, dict) and value:
        key = b.pick(sorted(value))
        if isinstance(value[key], dict | list) and value[key] and not b.one_in(4):
            value = value[key]
            continue
        what = b.below(8)
        if what == 0:
            del value[key]
        elif what == 1:
            value[b.pick([*names, "", "x", "/", "variable_0/x"])] = value.pop(key)
        elif what == 2:
            value[b.pick(names)] = copy.deepcopy(value[key])
        elif key == "dtype" or what == 3:
            value[key] = b.pick(DTYPES)
        elif what == 4:
            value[key] = "RAW" + str(b.below(len(RAW)))
        elif isinstance(value[key], int | float) and what == 5:
            value[key] += b.pick([-1, 1, 2, 7, 256])
        else:
            value[key] = copy.deepcopy(b.pick(VALUES))
        return
    if isinstance(value, list):
        at = b.below(len(value))
        value[at : at + b.below(2)] = copy.deepcopy([b.pick(VALUES)] * b.below(3))


def text_of(value):
    text = json.dumps(value)
    for i, raw in enumerate(RAW):
        text = text.replace(f'"RAW{i}"', raw)
    return text


def content(b, header, data):
    """Return a file like the right one."""
    header, data = json.loads(json.dumps(header)), bytearray(data)
    own = json.loads(header["__metadata__"]["adamax_ext"])
    names = sorted({*header, *own})
    for _ in range(b.below(3)):
        change_json(b, own, names)
    header["__metadata__"]["adamax_ext"] = text_of(own)
    if b.one_in(4):
        change_json(b, header, names)
    for _ in range(b.pick([0, 0, 0, 1, 4])):
        data[b.below(len(data))] = b.below(256)
    text = text_of(header).encode()
    if len(text) % 8:
        text += b" " * (-len(text) % 8)
    result = bytearray(len(text).to_bytes(8, "little") + text + data)
    for _ in range(b.pick([0, 0, 0, 0, 0, 0, 1, 3])):
        result[b.below(min(len(result), 600))] = b.below(256)
    if b.one_in(16):
        del result[b.below(len(result)) :]
    if b.one_in(16):
        result += b.ConsumeBytes(20)
    if b.one_in(16):
        result[:8] = b.pick([0, 1, 2**20, 10**8, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(result) if not b.one_in(32) else b.ConsumeBytes(1000)


class Loader:
    """An optimizer that is as it was at the begin whenever a file is loaded into it."""

    def __init__(self, i):
        self.optimizer, self.weights, self.grads = trained(i)
        self.saved = saved(self.optimizer)
        self.state_dict = self.optimizer.state_dict()
        self.copies = {name: array.copy() for name, array in self.weights.items()}

    def snapshot(self):
        return TrainingMachine.snapshot(self.optimizer, self.weights)

    def restore(self):
        for name, array in self.weights.items():
            array[...] = self.copies[name]
        self.optimizer.load_state_dict(self.state_dict)


LOADERS = [Loader(i) for i in range(len(CONFIGS))]
BEFORE = [loader.snapshot() for loader in LOADERS]


def load(optimizer):
    """Return whether the file was loaded."""
    global _is_loading
    _is_loading = True
    try:
        optimizer.load(PATH)
        return True
    except ValueError as error:
        assert str(error), "an error without words"
        return False
    finally:
        _is_loading = False


def target(b):
    i = b.below(len(CONFIGS))
    PATH.write_bytes(content(b, *LOADERS[i].saved))
    into = b.below(len(CONFIGS)) if b.one_in(8) else i
    loader, before = LOADERS[into], BEFORE[into]
    if not load(loader.optimizer):
        assert loader.snapshot() == before, "a refused file changed the optimizer"
        return
    for key, array in safetensors.numpy.load(PATH.read_bytes()).items():
        name, _, kind = key.rpartition("/")
        kept = loader.optimizer.state[name][kind]
        assert (kept.dtype, kept.shape) == (array.dtype, array.shape), "another array was loaded"
    state, weights, *_ = loader.snapshot()
    assert weights == before[1], "loading wrote weights"
    loaded, rate = loader.optimizer.state_dict(), loader.optimizer.learning_rate
    checkpoint.write(PATH, loaded)
    loader.restore()
    loader.optimizer.load(PATH)
    assert loader.snapshot()[0] == state, "saved is not what was loaded"
    try:
        loader.optimizer.apply(loader.grads)
    except ValueError:
        assert rate > 1e30 or loaded["calls"] > 2**52, "a state was loaded that cannot step"
    loader.restore()
    assert loader.snapshot() == before


for loader in LOADERS:  # what is imported and compiled only once
    PATH.write_bytes(b"x")
    load(loader.optimizer)
sys.addaudithook(audit)
run(target)

"""Fuzzes the Python calls: any value in any place is refused with nothing changed, or taken.

Most arguments of a call are right and one is anything. After each refusal all is as it was; at
the end the optimizer still steps.
"""

import contextlib
import decimal
import fractions
import math

import adamax_ext
import numpy as np
from adamax_ext import Adamax, LossScaleOptimizer, schedules
from harness import run
from support.bits import dtype_of
from support.training_machine import TrainingMachine


class Own(Exception):
    """What the caller's own objects raise."""


class Hostile:
    """An object with every method that may be asked for; each gives what it was made with."""

    is_there = False  # in the present input

    def __init__(self, value):
        self.value, Hostile.is_there = value, True

    def _answer(self, *arguments, **named):
        if self.value is Own:
            raise Own
        return self.value

    __float__ = __index__ = __int__ = __len__ = __iter__ = __call__ = __getitem__ = _answer
    __array__ = __dlpack__ = __dlpack_device__ = __eq__ = __bool__ = __str__ = keys = _answer
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __abs__ = _answer
    __hash__ = object.__hash__
    shape = dtype = is_neg = requires_grad = layout = property(_answer)
    __cuda_array_interface__ = __array_interface__ = property(_answer)


class LyingList(list):
    def __len__(self):
        return 7


REFUSALS = (TypeError, ValueError, BufferError, NotImplementedError, Own)
# Of what a hostile object gave, which breaks in the hands of its user.
OF_HOSTILE = (AttributeError, LookupError, RecursionError, ArithmeticError, AssertionError)
NUMBERS = [0, 1, 2, 3, 5, -1, 16, 8, 32, 255, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400]
NUMBERS += [0.0, -0.0, 0.5, 0.9, 1.0, 1.5, 1e-46, 1e-308, 5e-324, 1e39, 1e308, math.nan, math.inf]
WORDS = ["", "x", "nearest", "stochastic", "remainder", "outside", "inside", "decoupled", "l2"]
WORDS += ["ExponentialDecay", "CosineDecay", "variable_0", "(", "\ud800", "\x00", "1", "float32"]
DTYPES = ["f4", "f8", "f2", "i1", "u1", "i2", "u2", "i8", "c8", "?", "O", "U3", ">f4", "M8[s]"]


def any_array(b):
    shape = [b.pick([3, 0, 1, 2]) for _ in range(b.below(3))]
    array = np.ones(shape, dtype_of("bfloat16") if b.one_in(8) else b.pick(DTYPES))
    if b.one_in(4):
        array = array.T[..., ::-1] if array.ndim else array
    array.flags.writeable = not b.one_in(6)
    return np.ma.masked_array(array) if b.one_in(20) else array


def anything(b, depth=0):
    kind = b.below(16)
    if depth > 3 or kind < 4:
        return b.pick(NUMBERS)
    if kind == 4:
        return b.pick([None, True, False, ..., NotImplemented, object(), int, Own, math, print])
    if kind == 5:
        return b.pick(WORDS) if b.one_in(2) else b.ConsumeUnicode(6)
    if kind == 6:
        return b.ConsumeInt(20) if b.one_in(2) else b.ConsumeFloat()
    if kind == 7:
        values = [anything(b, depth + 1) for _ in range(b.below(4))]
        return b.pick([list, tuple, LyingList, iter])(values)
    if kind == 8:
        return {b.pick(WORDS): anything(b, depth + 1) for _ in range(b.below(4))}
    if kind == 9:
        value = anything(b, depth + 1)
        return lambda *arguments: value
    if kind == 10:
        return Hostile(Own if b.one_in(2) else anything(b, depth + 1))
    if kind == 11:
        number = b.pick(NUMBERS)
        with contextlib.suppress(ValueError, OverflowError):
            return b.pick([fractions.Fraction, decimal.Decimal, complex, str, np.float64])(number)
    if kind == 12:
        return b.ConsumeBytes(5) if b.one_in(2) else bytearray(b.ConsumeBytes(12))
    if kind == 13:
        return memoryview(bytearray(24)).cast(b.pick("fdbBhH") if b.one_in(2) else "B")
    if kind == 14:
        return b.pick([np.float32(0.5), np.int64(3), np.bool_(True), np.float16(2), np.str_("x")])
    return any_array(b)


# ---- Right arguments, of which one or two become anything ----------------------------------------

SETTINGS = {
    "learning_rate": [0.05, 0.0],
    "beta_1": [0.83],
    "beta_2": [0.957],
    "epsilon": [3e-5],
    "weight_decay": [None, 0.2],
    "clipnorm": [None, 0.5],
    "clipvalue": [None],
    "global_clipnorm": [None],
    "use_ema": [False, True],
    "ema_momentum": [0.87],
    "ema_overwrite_frequency": [None, 2],
    "loss_scale_factor": [None, 3.7],
    "gradient_accumulation_steps": [None, 2],
    "name": ["adamax"],
    "state_bits": [32, 16, 8],
    "weight_rounding": ["nearest", "stochastic", "remainder"],
    "seed": [0, 7],
}
SCHEDULES = {
    "ExponentialDecay": {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.7},
    "PiecewiseConstantDecay": {"boundaries": [3, 6], "values": [0.1, 0.2, 0.3]},
    "PolynomialDecay": {"initial_learning_rate": 0.1, "decay_steps": 5, "power": 2.0},
    "InverseTimeDecay": {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.7},
    "CosineDecay": {"initial_learning_rate": 0.1, "decay_steps": 5, "warmup_steps": 2},
    "CosineDecayRestarts": {"initial_learning_rate": 0.1, "first_decay_steps": 5, "t_mul": 2.0},
}
UPDATE = {
    "step": 3, "learning_rate": 0.1, "beta_1": 0.83, "beta_2": 0.957, "epsilon": 3e-5,
    "weight_decay": 0.1, "decay": "l2", "epsilon_mode": "inside", "grad_scale": 0.5,
    "clipvalue": 0.6, "average": None, "ema_momentum": 0.87, "norm_scale": None, "remainder": None,
    "weight_rounding": "nearest", "seed": 3, "variable": 2, "first_element": 256,
}  # fmt: skip


def disturbed(b, arguments):
    """Change up to two arguments of a call."""
    arguments = dict(arguments)
    for _ in range(b.pick([0, 1, 1, 2])):
        arguments[b.pick(list(arguments))] = anything(b)
    return arguments


def refused(call, *unchanged):
    """Return whether a call was refused; `unchanged` are functions whose result must stay."""
    before = [look() for look in unchanged]
    try:
        call()
        return False
    except REFUSALS as error:
        assert type(error) is Own or str(error), "an error without words"
    except OF_HOSTILE:
        if not Hostile.is_there:
            raise
    assert [look() for look in unchanged] == before, "a refused call changed something"
    return True


def update(b):
    buffers = {role: np.full(3, 0.5, np.float32) for role in ("param", "grad", "m", "u")}
    arguments = disturbed(b, buffers | UPDATE)
    refused(
        lambda: adamax_ext.update(**arguments),
        lambda: [array.tobytes() for array in buffers.values()],
    )


def functions(b):
    value, of_scale = anything(b), LossScaleOptimizer(Adamax()).get_config()
    call = b.pick([
        lambda: adamax_ext.global_norm(value),
        lambda: adamax_ext.global_norm([np.ones(3, np.float32), value]),
        lambda: adamax_ext.set_num_threads(value),
        lambda: LossScaleOptimizer(value),
        lambda: LossScaleOptimizer(Adamax(), **disturbed(b, {"initial_scale": 4.0, "name": "x"})),
        lambda: schedules.deserialize(value),
        lambda: schedules.serialize(value),
        lambda: schedules.LearningRateSchedule.from_callable(value)(3),
        lambda: Adamax.from_config(disturbed(b, Adamax().get_config())),
        lambda: LossScaleOptimizer.from_config(disturbed(b, of_scale)),
        lambda: adamax_ext.convert_state(value, 16),
    ])  # fmt: skip
    refused(call, adamax_ext.get_num_threads)
    adamax_ext.set_num_threads(1)


def schedule(b):
    name = b.pick(list(SCHEDULES))
    arguments = disturbed(b, SCHEDULES[name])
    made = []
    if refused(lambda: made.append(getattr(schedules, name)(**arguments))):
        return
    step = b.pick([0, 1, 4, 5, 6, 100, 2**40, 2**53 - 1])
    weights = np.ones(3, np.float32)
    adamax = Adamax(made[0])
    adamax.iterations = step
    if not refused(lambda: adamax.apply([weights * 0], [weights]), weights.tobytes):
        assert not np.isnan(weights).any()
    assert schedules.deserialize(schedules.serialize(made[0])) == made[0]


def optimizer(b):
    settings = {name: b.pick(values) for name, values in SETTINGS.items()}
    made = []
    if refused(lambda: made.append(Adamax(**disturbed(b, settings)))):
        return
    adamax = made[0]
    if callable(adamax.progress.learning_rate):
        return  # what it gives is no state that could be compared; see schedule()
    outer = LossScaleOptimizer(adamax, 8.0) if b.one_in(4) else adamax
    dtype = dtype_of(b.pick(["float32", "bfloat16", "float64"]))
    weights = {name: np.full(n, 0.5, dtype) for name, n in (("variable_0", 3), ("variable_1", 1))}
    grads = [np.full(w.shape, 0.25, dtype) for w in weights.values()]

    def look():
        return TrainingMachine.snapshot(outer, weights)

    right = {"variables": list(weights.values()), "names": list(weights)}
    if refused(lambda: outer.build(**disturbed(b, right)), look) and refused(
        lambda: outer.build(weights), look
    ):
        return
    if list(adamax.state) != list(weights):
        return
    for _ in range(1 + b.below(4)):
        call(b, outer, adamax, weights, grads, look)
        if callable(adamax.progress.learning_rate):
            return
    refused(lambda: outer.apply(grads), look)  # as a rate of 1e39 is


def call(b, outer, adamax, weights, grads, look):
    value, arrays = anything(b), list(weights.values())
    name = b.pick(list(SETTINGS))
    own = b.pick(["iterations", "learning_rate", "dynamic_scale", "step_counter", "seed", name])

    def saved():
        state = outer.state_dict()
        place = b.pick([state, state["state"], *state["state"].values()])
        place[b.pick([*place, "x"])] = value
        return state

    def stored(items):
        return {str(i): item for i, item in enumerate(items)}

    def replaced(items):
        items = list(items)
        items[b.below(len(items))] = value
        return items

    refused(
        b.pick([
            lambda: outer.apply(grads),
            lambda: outer.apply(replaced(grads)),
            lambda: outer.apply(value),
            lambda: outer.apply(grads, replaced(arrays)),
            lambda: outer.apply(grads, value),
            lambda: outer.apply_gradients(zip(replaced(grads), arrays, strict=True)),
            lambda: outer.apply_gradients(value),
            lambda: setattr(adamax if own not in dir(outer) else outer, own, value),
            lambda: setattr(adamax, name, value),
            lambda: outer.load_state_dict(saved()),
            lambda: outer.load_state_dict(value),
            lambda: outer.set_weights(replaced(outer.variables)),
            lambda: outer.set_weights(value),
            lambda: outer.load_own_variables(stored(replaced(outer.variables))),
            lambda: adamax.finalize_variable_values(value),
            lambda: adamax.decoded_state(value),
            lambda: outer.exclude_from_weight_decay(value),
            lambda: adamax_ext.convert_state(saved(), b.pick([8, 16, 32])),
            lambda: outer.build(value),
        ]),
        look,
    )  # fmt: skip


def target(b):
    Hostile.is_there = False
    b.pick([update, functions, schedule, optimizer, optimizer, optimizer])(b)


run(target)

"""All that can be done with an `Adamax`, in any order, beside the NumPy program."""

import copy
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support import reference_lowmem as program
from support.bits import PAIRS, dtype_of, is_testable, memory_order, spread
from support.low_memory import ROUNDINGS, LowMemoryReference, assert_same_training
from support.memory import unaligned
from support.runs import CLIPPINGS, rates_of_both
from support.sequences import FLAVOURS, flavoured, rates, seeds
from support.wrong_calls import REFUSALS, WRONG_CALLS, Trained

SHAPES = [(5,), (), (0, 3), (1,), (3, 4), (7, 2, 3), (64, 65), (4099,)]  # two are for 8 bits
GROWTH = 3  # good steps after which the loss scale doubles
SCHEDULE, PROGRAM_SCHEDULE = rates_of_both("schedule")

# What can be assigned at any time; no value is a default or a power of two.
OPTIONS = {
    "beta_1": st.sampled_from([0.83, 0.0, 0.9]),
    "beta_2": st.sampled_from([0.957, 0.999]),
    "epsilon": st.sampled_from([3.1e-5, 1e-7]),
    "weight_decay": st.sampled_from([None, 0.213]),
    **{clip: st.sampled_from([None, value]) for one in CLIPPINGS for clip, value in one.items()},
    "ema_momentum": st.sampled_from([0.871, 0.0, 1.0]),
    "ema_overwrite_frequency": st.sampled_from([None, 2, 3, 1]),
    "loss_scale_factor": st.sampled_from([None, 3.7]),
}
# Only before there are arrays for them.
FIXED = {
    "use_ema": st.sampled_from([False, True, True]),
    "gradient_accumulation_steps": st.sampled_from([None, 2, 3]),
    "state_bits": st.sampled_from([32, 16, 8]),
    "weight_rounding": st.sampled_from(ROUNDINGS),
    "seed": st.sampled_from([0, 9, 2**64 - 1]),
}
variables = st.tuples(
    st.lists(
        st.tuples(
            st.sampled_from([pair for pair in PAIRS if is_testable(*pair)]),
            st.sampled_from(SHAPES),
            st.sampled_from("CF"),
            st.sampled_from([0, 1, 8, 13]),  # where it begins, in bytes after a multiple of 16
        ),
        min_size=1,
        max_size=4,
    ),
    seeds,
    st.sets(st.integers(0, 3)),  # without weight decay
    st.booleans(),  # whether the first step builds the optimizer
)
calls = st.lists(
    st.tuples(
        st.lists(st.sampled_from(FLAVOURS), min_size=4, max_size=4),  # by position
        seeds,
        st.sampled_from(["list", "list", "generator", "variables", "pairs"]),
    ),
    min_size=1,
    max_size=8,
)


def placed(values, order, offset):
    """Return a copy of an array in this order, at this offset in memory with guards, and that."""
    flat, memory = unaligned(values.ravel(), offset)
    return flat.reshape(values.shape, order=order), memory


def as_it_is(array):
    return array.dtype, array.shape, array.size and array.strides, array.tobytes()


class TrainingMachine(RuleBasedStateMachine):
    """Does everything twice, and compares every array and count after each rule."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.memories = []  # of the weights, with guards; of copies there are none
        self.saved = []
        self.originals = []  # that were copied, and what they were then

    def teardown(self):
        shutil.rmtree(self.folder)
        for original, before in self.originals:
            assert self.snapshot(*original) == before, "a copy trained its original"

    @initialize(
        rate=rates,
        has_schedule=st.sampled_from([False, False, True]),
        options=st.fixed_dictionaries(
            {name: values for name, values in (OPTIONS | FIXED).items() if "clip" not in name}
        ),
        clipping=st.sampled_from(CLIPPINGS),
        has_loss_scale=st.sampled_from([False, False, True]),
        variables=st.none() | variables | variables,
    )
    def make(self, rate, has_schedule, options, clipping, has_loss_scale, variables):
        options = options | clipping
        self.ours = Adamax(SCHEDULE if has_schedule else rate, **options)
        self.theirs = LowMemoryReference(
            learning_rate=PROGRAM_SCHEDULE if has_schedule else rate, **options
        )
        self.scale, self.good_steps = None, 0
        self.outer = self.ours
        if has_loss_scale:
            self.scale = 8.0
            self.outer = LossScaleOptimizer(self.ours, 8.0, dynamic_growth_steps=GROWTH)
            self.theirs.loss_scale_factor = None
        self.weights = None
        if variables:
            self.build(variables)

    @property
    def is_built(self):
        return self.weights is not None

    @property
    def steps(self):
        return self.theirs.gradient_accumulation_steps or 1

    # ---- Variables -------------------------------------------------------------------------------

    @precondition(lambda self: not self.is_built)
    @rule(variables=variables)
    def build(self, variables):
        rows, seed, excluded, by_apply = variables
        bits, rounding = self.theirs.state_bits, self.theirs.weight_rounding
        rng = np.random.default_rng(seed)
        self.rows = rows
        made = [
            placed(spread(rng, shape, dtype_of(pair[0])), order, offset)
            for pair, shape, order, offset in rows
        ]
        arrays = [array for array, _ in made]
        names = [f"variable_{i}" for i in range(len(rows))]
        excluded = [i for i in sorted(excluded) if i < len(rows)]
        self.outer.exclude_from_weight_decay(
            [arrays[i] for i in excluded[:1]], [f"^{names[i]}$" for i in excluded[1:]]
        )
        before = [array.tobytes() for array in arrays]
        has_double = any(pair[0] == "float64" for pair, *_ in rows)
        has_half = any(pair[0] == "float16" for pair, *_ in rows)
        if (bits < 32 and has_double) or (rounding != "nearest" and has_half):
            with pytest.raises(TypeError, match=r"variables\[\d\]"):
                self.outer.build(arrays)
            assert [array.tobytes() for array in arrays] == before
            assert not self.outer.built
            return
        if not by_apply:
            self.outer.build(arrays, names)
        self.memories = [memory for _, memory in made]
        self.weights = dict(zip(names, arrays, strict=True))
        self.theirs.excluded = excluded
        self.theirs.build(arrays)
        if self.theirs.calls:
            self.start_averages()
        if by_apply:
            grads = self.gradients(["usual"] * 4, seed)
            assert self.outer.apply(grads, arrays) == self.theirs.calls + 1
            self.apply_theirs(grads)

    def start_averages(self):
        for average, w in zip(self.theirs.average, self.theirs.variables, strict=True):
            average[...] = w

    @precondition(lambda self: self.is_built)
    @rule(seed=seeds, flavour=st.sampled_from(["usual", "zeros"]), where=st.integers(0, 3))
    def write_weights(self, seed, flavour, where):
        """As a user who writes into an array."""
        i = where % len(self.weights)
        array = list(self.weights.values())[i]
        with np.errstate(over="ignore"):
            array[...] = self.numbers(
                np.random.default_rng(seed), array.shape, array.dtype, flavour
            )
        self.read_weights(i, array)

    def read_weights(self, i, array):
        w, weight = self.theirs.variables[i], self.theirs.weights[i]
        if array.dtype.name == "bfloat16":
            weight.half = memory_order(array).view(np.uint16).copy()
            w[...] = weight.read()
        else:
            w[...] = memory_order(array)

    # ---- Steps -----------------------------------------------------------------------------------

    @staticmethod
    def numbers(rng, shape, dtype, flavour):
        values = flavoured(rng, spread(rng, shape, np.float64), flavour)
        with np.errstate(all="ignore"):
            return values.astype(dtype)

    def gradients(self, kinds, seed):
        rng = np.random.default_rng(seed)
        return [
            None
            if kind == "none"
            else placed(self.numbers(rng, shape, dtype_of(pair[1]), kind), order, offset)[0]
            for kind, (pair, shape, order, offset) in zip(kinds, self.rows, strict=False)
        ]

    @precondition(lambda self: self.is_built)
    @rule(calls=calls)
    def train(self, calls):
        for kinds, seed, how in calls:
            self.apply(kinds, seed, how)
            self.same_bits()

    def apply(self, kinds, seed, how):
        grads = self.gradients(kinds, seed)
        given = {i: g for i, g in enumerate(grads) if g is not None}
        arrays = list(self.weights.values())
        if not given:
            self.require_refused(lambda: self.outer.apply(grads))
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no gradient for")
            if how == "pairs":
                count = self.outer.apply_gradients([(g, arrays[i]) for i, g in given.items()][::-1])
            elif how == "variables":
                count = self.outer.apply(grads[::-1], [w[...] for w in arrays][::-1])
            else:
                count = self.outer.apply(grads if how == "list" else iter(grads))
        self.apply_theirs(grads)
        assert count == self.theirs.calls

    def apply_theirs(self, grads):
        if self.scale is None:
            self.theirs.apply(grads)
            return
        is_good = all(np.isfinite(g.astype(np.float64)).all() for g in grads if g is not None)
        if is_good:
            factor, self.theirs.loss_scale_factor = self.theirs.loss_scale_factor, self.scale
            self.theirs.apply(grads)
            self.theirs.loss_scale_factor = factor
            self.good_steps += 1
        if not is_good or self.good_steps == GROWTH:
            self.scale *= 2.0 if is_good else 0.5
            self.good_steps = 0

    @rule()
    def apply_nothing(self):
        """No gradients are no call, also before there are variables."""
        assert self.outer.apply(iter([])) == self.theirs.calls

    @rule(only=st.sets(st.integers(0, 3)))
    def finalize(self, only):
        has_averages = self.theirs.use_ema
        if has_averages and not self.is_built:
            self.require_refused(self.outer.finalize_variable_values)
            return
        arrays = list((self.weights or {}).values())
        chosen = [i for i in sorted(only) if i < len(arrays)] or list(range(len(arrays)))
        self.outer.finalize_variable_values([arrays[i] for i in chosen] if only else None)
        if has_averages and self.theirs.calls >= self.steps:
            for i in chosen:
                w = self.theirs.variables[i]
                w[...] = self.theirs.average[i]
                self.theirs._store(w)

    # ---- Settings --------------------------------------------------------------------------------

    @rule(
        option=st.sampled_from(sorted(OPTIONS)).flatmap(lambda k: st.tuples(st.just(k), OPTIONS[k]))
    )
    def assign(self, option):
        name, value = option
        if name == "epsilon" and self.theirs.state_bits == 8 and self.is_built:
            self.require_refused(lambda: setattr(self.ours, name, value))
            return
        clips = [clip for one in CLIPPINGS for clip in one]
        others = [clip for clip in clips if name in clips and value and clip != name]
        for setting in (*others, name):
            setattr(self.ours, setting, value if setting == name else None)
            setattr(self.theirs, setting, value if setting == name else None)

    @rule(option=st.sampled_from(sorted(FIXED)).flatmap(lambda k: st.tuples(st.just(k), FIXED[k])))
    def assign_fixed(self, option):
        name, value = option
        if self.is_built:
            self.require_refused(lambda: setattr(self.ours, name, value))
            return
        updates = self.theirs.calls // self.steps
        setattr(self.ours, name, value)
        setattr(self.theirs, name, value)
        if name == "gradient_accumulation_steps":
            self.theirs.calls = updates * self.steps

    @rule(rate=rates, has_schedule=st.sampled_from([False, False, False, True]))
    def assign_rate(self, rate, has_schedule):
        if callable(self.theirs.learning_rate) and not has_schedule:
            self.require_refused(lambda: setattr(self.outer, "learning_rate", rate))
            return
        self.outer.learning_rate = SCHEDULE if has_schedule else rate
        self.theirs.learning_rate = PROGRAM_SCHEDULE if has_schedule else rate

    @rule(value=st.sampled_from([0, 1, 7, 2**40]))
    def assign_iterations(self, value):
        if self.is_built and self.theirs.calls < self.steps:
            self.start_averages()
        self.outer.iterations = value
        self.theirs.calls = value * self.steps + self.theirs.calls % self.steps

    # ---- Saving ----------------------------------------------------------------------------------

    @precondition(lambda self: self.is_built)
    @rule(how=st.sampled_from(["dict", "file", "arrays", "store"]))
    def save(self, how):
        if how == "dict":
            saved = self.outer.state_dict()
        elif how == "file":
            saved = self.folder / f"{len(self.saved)}"
            self.outer.save(saved)
        elif how == "store":
            saved = {}
            self.outer.save_own_variables(saved)
        else:
            saved = [np.array(a) for a in self.outer.variables]
        theirs = copy.deepcopy(self.theirs, {id(PROGRAM_SCHEDULE): PROGRAM_SCHEDULE})
        self.saved.append((how, saved, theirs, self.scale, self.good_steps))

    @precondition(lambda self: self.is_built)
    @rule(
        how=st.sampled_from(["dict", "file", "arrays", "store"]),
        between=calls,
        into=st.sampled_from(["this one", "a new one"]),
    )
    def save_and_load(self, how, between, into):
        self.save(how)
        self.train(between)
        self.load(len(self.saved) - 1, into)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 19), into=st.sampled_from(["this one", "a new one"]))
    def load(self, which, into):
        how, saved, theirs, scale, good_steps = self.saved[which % len(self.saved)]
        if into == "a new one":
            self.make_anew()
        calls = {
            "dict": lambda: self.outer.load_state_dict(saved),
            "file": lambda: self.outer.load(saved),
            "arrays": lambda: self.outer.set_weights(saved),
            "store": lambda: self.outer.load_own_variables(saved),
        }
        now = self.theirs
        if callable(theirs.learning_rate) != callable(now.learning_rate):
            self.require_refused(calls[how])
            return
        calls[how]()
        self.scale, self.good_steps = scale, good_steps
        now.calls, is_exact = theirs.calls, how in ("dict", "file")
        if is_exact:
            now.learning_rate, now.seed = theirs.learning_rate, theirs.seed
        elif not callable(now.learning_rate) and np.float32(now.learning_rate) != np.float32(
            theirs.learning_rate
        ):
            now.learning_rate = float(np.float32(theirs.learning_rate))
        for i, w in enumerate(now.variables):
            for kind in ("m", "u", "average", "accumulator"):
                getattr(now, kind)[i][...] = getattr(theirs, kind)[i]
            is_pending = theirs.pending[i] if is_exact else bool(theirs.accumulator[i].any())
            now.pending[i] = is_pending
            state, other = now.states[i], theirs.states[i]
            if is_exact:
                now.states[i] = copy.deepcopy(other)
            elif w.size:
                state.convert(*other.read())
            weight, master = now.weights[i], theirs.variables[i]
            if now.dtypes[i].name != "bfloat16":
                continue
            if weight.low is not None:
                half, low = program.bf16_split(master)
                if is_exact:
                    weight.low = theirs.weights[i].low.copy()
                else:
                    weight.low = np.where(half == weight.half, low, np.int16(0))
            w[...] = weight.read()

    def make_anew(self):
        """As a process that starts again with another seed: from the config and the weights."""
        config, kind = self.outer.get_config(), type(self.outer)
        names = list(self.weights)
        excluded = "|".join(re.escape(names[i]) for i in self.theirs.excluded)
        self.outer = kind.from_config(config)
        self.ours = getattr(self.outer, "inner_optimizer", self.outer)
        self.ours.seed = 5
        self.outer.exclude_from_weight_decay(var_names=[f"^({excluded})$"] if excluded else [])
        self.outer.build(self.weights)
        theirs = self.theirs
        settings = {key: getattr(theirs, key) for key in (*OPTIONS, *FIXED)} | {"seed": 5}
        self.theirs = LowMemoryReference(
            learning_rate=theirs.learning_rate, excluded=theirs.excluded, **settings
        )
        self.theirs.build(list(self.weights.values()))
        if self.scale is not None:
            self.scale, self.good_steps = 8.0, 0

    @precondition(lambda self: self.is_built)
    @rule(how=st.sampled_from(["pickle", "deepcopy"]))
    def go_on_with_a_copy(self, how):
        both = self.outer, self.weights
        before = self.snapshot(*both)
        self.outer, self.weights = (
            pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
        )
        self.ours = getattr(self.outer, "inner_optimizer", self.outer)
        self.memories = []
        self.originals.append((both, before))
        assert self.snapshot(self.outer, self.weights) == before

    # ---- What must not be ------------------------------------------------------------------------

    @precondition(lambda self: self.is_built)
    @rule(
        calls=calls,
        wrong=st.lists(st.sampled_from(sorted(WRONG_CALLS)), min_size=1, max_size=20),
        where=st.integers(0, 3),
        seed=seeds,
    )
    def do_something_wrong(self, calls, wrong, where, seed):
        self.train(calls)
        names = [name for name, w in self.weights.items() if w.size]
        if not names:
            return
        grads = dict(zip(self.weights, self.gradients(["usual"] * 4, seed), strict=True))
        trained = Trained(self.outer, self.ours, self.weights, grads, self.folder / "wrong")
        for what in wrong:
            call = WRONG_CALLS[what](trained, names[where % len(names)])
            if call is not None:
                self.require_refused(call, what)

    def require_refused(self, call, label=""):
        before = self.snapshot(self.outer, self.weights)
        arrays = [id(a) for kinds in self.ours.state.values() for a in kinds.values()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no gradient for")
            try:
                call()
            except REFUSALS as refusal:
                assert str(refusal), f"{label}: an error without words"
            else:
                pytest.fail(f"{label}: not refused")
        assert self.snapshot(self.outer, self.weights) == before
        assert [id(a) for kinds in self.ours.state.values() for a in kinds.values()] == arrays

    @staticmethod
    def snapshot(optimizer, weights):
        """Return all that there is, as what can be compared."""
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        state = {
            name: {kind: as_it_is(a) for kind, a in kinds.items()}
            for name, kinds in inner.state.items()
        }
        accumulated = inner.state_dict()["accumulated"] if inner.built else None
        progress = inner.progress
        counts = inner.calls, progress.seed, progress.loss_scale, progress.good_steps, accumulated
        arrays = {name: as_it_is(w) for name, w in (weights or {}).items()}
        return state, arrays, counts, optimizer.get_config()

    # ---- What always is --------------------------------------------------------------------------

    @invariant()
    def same_bits(self):
        assert self.ours.calls == self.theirs.calls
        assert self.outer.iterations == self.theirs.calls // self.steps
        assert self.outer.built == self.is_built
        assert self.outer.learning_rate == self.theirs._rate()
        if self.scale is not None:
            assert (self.outer.dynamic_scale, self.outer.step_counter) == (
                self.scale,
                self.good_steps,
            )
        if self.is_built:
            assert_same_training(self.ours, self.theirs, list(self.weights.values()), "this")
            pending = [  # an empty variable never waits for anything
                name
                for (name, w), has in zip(self.weights.items(), self.theirs.pending, strict=True)
                if has and w.size
            ]
            assert self.ours.state_dict()["accumulated"] == pending

    @invariant()
    def guards_are_whole(self):
        for array, memory in zip((self.weights or {}).values(), self.memories, strict=False):
            begin = array.ctypes.data - memory.ctypes.data
            assert (memory[:begin] == 0xA5).all()
            assert (memory[begin + array.nbytes :] == 0xA5).all()

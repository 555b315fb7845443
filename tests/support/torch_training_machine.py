"""All that can be done with `adamax_ext.torch.Adamax`, in any order, beside the NumPy program."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support import reference
from support.bits import dtype_of
from support.low_memory import assert_same
from support.sequences import FLAVOURS, flavoured, rates, seeds
from support.torch_low_memory import BF16, F16, F32, Variable, in_memory
from support.torch_runs import (
    Adamax,
    AdamaxW,
    Snapshot,
    leaf,
    params_of,
    random,
    through_a_file,
    torch,
)

F64 = torch.float64
NAN = float("nan")
REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, AssertionError)
SHAPES = [(5,), (), (0,), (3, 4), (61, 83), (2, 3, 4)]  # one is for 8 bits
LAYOUTS = ["plain", "transposed", "gaps"]

# What can be assigned at any time; no value is a default or a power of two.
OPTIONS = {
    "lr": rates | st.just(torch.tensor(0.0371, dtype=F64)),
    "betas": st.sampled_from([(0.83, 0.957), (0.0, 0.999)]),
    "eps": st.sampled_from([3.1e-5, 1e-8]),
    "weight_decay": st.sampled_from([0, 0.013]),
    "maximize": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "seed": st.sampled_from([0, 9, 2**64 - 1]),
}
# A rate below zero, where some schedules of torch end, is no argument.
ASSIGNED = OPTIONS | {"lr": OPTIONS["lr"] | st.just(-0.0213)}
STORED = {
    "state_bits": st.sampled_from([32, 16, 8]),
    "weight_rounding": st.sampled_from(["nearest", "stochastic", "remainder"]),
}
DEFAULTS = {"state_bits": 32, "weight_rounding": "nearest", "seed": 0}
groups = st.tuples(
    st.lists(
        st.tuples(
            st.sampled_from([F32, BF16, F32, BF16, F16, F64]),
            st.sampled_from(SHAPES),
            st.sampled_from(LAYOUTS),
        ),
        min_size=1,
        max_size=3,
    ),
    st.fixed_dictionaries(STORED, optional=OPTIONS),
    seeds,
)
calls = st.lists(
    st.tuples(
        st.lists(st.sampled_from(FLAVOURS), min_size=12, max_size=12),
        seeds,
        st.sampled_from([*LAYOUTS, None]),  # of the gradients; None: those of their parameters
    ),
    min_size=1,
    max_size=4,
)


# What is done to a group, one of its parameters or the state of that one.
FAULTS = {
    "sparse": lambda group, param, state: setattr(
        param, "grad", param.grad.reshape(param.shape).to_sparse()
    ),
    "rate nan": lambda group, param, state: group.update(lr=NAN),
    "rate infinite": lambda group, param, state: group.update(lr=float("inf")),
    "rate of two": lambda group, param, state: group.update(lr=torch.ones(2)),
    "no rate": lambda group, param, state: group.pop("lr"),
    "beta of one": lambda group, param, state: group.update(betas=(0.9, 1.0)),
    "three betas": lambda group, param, state: group.update(betas=(0.9, 0.9, 0.9)),
    "epsilon nan": lambda group, param, state: group.update(eps=NAN),
    "epsilon None": lambda group, param, state: group.update(eps=None),
    "decay nan": lambda group, param, state: group.update(weight_decay=NAN),
    "capturable": lambda group, param, state: group.update(capturable=True),
    "seed below zero": lambda group, param, state: group.update(seed=-1),
    "other bits": lambda group, param, state: group.update(state_bits=7),
    "another rounding": lambda group, param, state: group.update(weight_rounding="up"),
}
FAULTS_OF_STATE = {
    "count below zero": lambda group, param, state: state.update(step=torch.tensor(-1.0)),
    "count nan": lambda group, param, state: state.update(step=torch.tensor(NAN)),
    "no count": lambda group, param, state: state.pop("step"),
    "no norm": lambda group, param, state: state.pop("exp_inf"),
    "no tensor": lambda group, param, state: state.update(exp_avg=None),
    "momentum of another shape": lambda group, param, state: state.update(
        exp_avg=torch.zeros(param.numel() + 1, dtype=state["exp_avg"].dtype)
    ),
    "norm of another dtype": lambda group, param, state: state.update(
        exp_inf=torch.zeros(param.shape, dtype=torch.int32)
    ),
    "remainder of another dtype": lambda group, param, state: state.update(
        remainder=torch.zeros(param.shape)
    ),
}


def _with_scales(change):
    """Change the scales of a state that has some."""

    def of_file(saved, group):
        states = [saved["state"].get(i, {}) for i in group["params"]]
        states = [state for state in states if "exp_inf_scale" in state]
        return [change(state) for state in states] if states else False

    return of_file


# What is done to a file, or to one of its groups; False if there is nothing to do that to.
CHANGES_OF_FILES = {
    "a group less": lambda saved, group: saved["param_groups"].remove(group),
    "a group more": lambda saved, group: saved["param_groups"].append(group),
    "a parameter more": lambda saved, group: group["params"].append(99),
    "other bits": lambda saved, group: group.update(
        state_bits=24 - group["state_bits"] if group.get("state_bits", 32) != 32 else 16
    ),
    "a seed below zero": lambda saved, group: group.update(seed=-1),
    "no scales": _with_scales(lambda state: state.pop("exp_inf_scale")),
    "scales of NaN": _with_scales(lambda state: state["exp_inf_scale"].fill_(NAN)),
    "scales below zero": _with_scales(lambda state: state["exp_inf_scale"].fill_(-1.0)),
    "moments of floats": _with_scales(
        lambda state: state.update(exp_avg=state["exp_avg"].double())
    ),
    "a scale too many": _with_scales(
        lambda state: state.update(exp_inf_scale=torch.ones(state["exp_inf_scale"].numel() + 1))
    ),
}


def arranged(tensor, layout):
    """Return a copy of a tensor in this layout."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor.clone()
    return (
        torch.stack([tensor] * 2, dim=-1)[..., 0]
        if layout == "gaps" and tensor.numel()
        else tensor.clone()
    )


def in_order(tensor, like):
    """Return the elements of a tensor in the order in which those of another lie in memory."""
    axes = sorted(range(like.ndim), key=lambda axis: -like.stride(axis))
    return tensor.detach().permute(axes).contiguous().view(-1)


class DoubleVariable:
    """As a `Variable`, in float64."""

    def __init__(self, param):
        self.w = in_memory(param)
        self.m, self.u, self.steps = np.zeros_like(self.w), np.zeros_like(self.w), 0

    def step(self, grad, *, lr, betas, eps, weight_decay, decoupled, maximize):
        self.steps += 1
        h = in_memory(grad)
        reference.update(
            self.w,
            -h if maximize else h,
            self.m,
            self.u,
            step=self.steps,
            learning_rate=lr,
            beta_1=betas[0],
            beta_2=betas[1],
            epsilon=eps,
            epsilon_mode="inside",
            weight_decay=weight_decay,
            decay="decoupled" if decoupled else "l2",
        )

    def expected(self):
        step = np.atleast_1d(np.float32(self.steps))
        return {"param": self.w, "exp_avg": self.m, "exp_inf": self.u, "step": step}


class TorchTrainingMachine(RuleBasedStateMachine):
    """Does everything twice, and compares every tensor after each rule."""

    def __init__(self):
        super().__init__()
        self.saved = []
        self.originals = []  # that were copied, and what they were then

    def teardown(self):
        for before in self.originals:
            before.require_unchanged()

    @initialize(group=groups, kind=st.sampled_from([Adamax, AdamaxW]))
    def make(self, group, kind):
        self.kind = kind
        # The first group must be one that can be.
        rows, options, seed = group
        rows = [(F32 if dtype in (F16, F64) else dtype, *rest) for dtype, *rest in rows]
        params = self.parameters(rows, seed)
        self.ours = kind([{"params": params, **options}])
        self.theirs = []  # options and variables of each group
        self.add(params, options)

    def parameters(self, rows, seed):
        return [
            leaf(arranged(random(*shape, dtype=dtype, seed=seed + i), layout))
            for i, (dtype, shape, layout) in enumerate(rows)
        ]

    def add(self, params, options):
        defaults = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
        defaults |= {"maximize": False, "decoupled_weight_decay": self.kind is AdamaxW, **DEFAULTS}
        options = defaults | options
        self.theirs.append((options, []))
        for param in params:
            self.theirs[-1][1].append(self.new_variable(param, options))

    def new_variable(self, param, options, number=None):
        if number is None:
            number = sum(len(variables) for _, variables in self.theirs)
        if param.dtype == F64:
            return DoubleVariable(in_order(param, param))
        bits, rounding, seed = (options[name] for name in DEFAULTS)
        return Variable(in_order(param, param), number, bits, rounding, seed)

    @rule(group=groups)
    def add_group(self, group):
        if len(params_of(self.ours)) > 9:
            return
        rows, options, seed = group
        params = self.parameters(rows, seed)
        dtypes = {dtype for dtype, *_ in rows}
        cannot = options.get("state_bits", 32) != 32 and F64 in dtypes
        cannot |= options.get("weight_rounding", "nearest") != "nearest" and F16 in dtypes
        added = {"params": params, **options}
        if cannot:
            self.require_refused(lambda: self.ours.add_param_group(added))
        else:
            self.ours.add_param_group(added)
            self.add(params, options)

    # ---- Steps -----------------------------------------------------------------------------------

    def feed(self, kinds, seed, layout):
        rng = np.random.default_rng(seed)
        for param, kind in zip(params_of(self.ours), kinds, strict=False):
            values = flavoured(rng, rng.standard_normal(tuple(param.shape)), kind)
            grad = torch.tensor(values, dtype=param.dtype)
            like = torch.empty_like(param).copy_(grad)  # in the order of its parameter
            grad = like if layout is None else arranged(grad, layout)
            param.grad = None if kind == "none" else grad

    @rule(calls=calls)
    def train(self, calls):
        for call in calls:
            self.feed(*call)
            self.ours.step()
            params = iter(params_of(self.ours))
            for options, variables in self.theirs:
                names = ("lr", "betas", "eps", "weight_decay", "maximize")
                given = {name: options[name] for name in names}
                given |= {"lr": float(given["lr"]), "decoupled": options["decoupled_weight_decay"]}
                for variable, param in zip(variables, params, strict=False):
                    if param.grad is not None:
                        with np.errstate(all="ignore"):
                            variable.step(in_order(param.grad, param), **given)
            self.same_bits()

    # ---- Options ---------------------------------------------------------------------------------

    @rule(
        option=st.sampled_from(sorted(OPTIONS)).flatmap(
            lambda name: st.tuples(st.just(name), ASSIGNED[name])
        ),
        where=st.integers(0, 9),
    )
    def assign(self, option, where):
        where %= len(self.theirs)
        name, value = option
        options, variables = self.theirs[where]
        options[name] = self.ours.param_groups[where][name] = value
        if name == "seed":
            for variable in variables:
                variable.seed = value

    @rule(where=st.integers(0, 9), rounding=st.sampled_from(["nearest", "stochastic"]))
    def assign_rounding(self, where, rounding):
        where %= len(self.theirs)
        options, variables = self.theirs[where]
        group = self.ours.param_groups[where]
        has_half = any(param.dtype == F16 for param in group["params"])
        if has_half or options["weight_rounding"] == "remainder":
            return
        options["weight_rounding"] = group["weight_rounding"] = rounding
        for variable in variables:
            if isinstance(variable, Variable):
                variable.weight.rounding = rounding

    # ---- Saving ----------------------------------------------------------------------------------

    @rule(through=st.sampled_from([through_a_file, copy.deepcopy]))
    def save(self, through):
        self.saved.append((through(self.ours.state_dict()), copy.deepcopy(self.theirs)))

    @rule(
        through=st.sampled_from([through_a_file, copy.deepcopy]),
        between=calls,
        is_new=st.booleans(),
    )
    def save_and_load(self, through, between, is_new):
        self.save(through)
        self.train(between)
        self.load(len(self.saved) - 1, is_new)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 19), is_new=st.booleans())
    def load(self, which, is_new):
        saved, theirs = self.saved[which % len(self.saved)]
        saved = copy.deepcopy(saved)  # whose tensors become those of the state, as torch has it
        if is_new:  # with the same storage, and other options
            self.ours = self.kind(
                [
                    {"params": group["params"], **{name: options[name] for name in STORED}}
                    for group, (options, _) in zip(self.ours.param_groups, self.theirs, strict=True)
                ]
            )
            self.theirs = []
            for group in self.ours.param_groups:
                kept = {name: group.get(name, value) for name, value in DEFAULTS.items()}
                self.add(group["params"], kept)
        if len(theirs) != len(self.theirs):
            self.require_refused(lambda: self.ours.load_state_dict(saved))
            return
        self.ours.load_state_dict(saved)
        number, loaded = 0, []
        for group, own, given, (options, variables) in zip(
            self.ours.param_groups, self.theirs, saved["param_groups"], theirs, strict=True
        ):
            options = dict(options)
            if "seed" not in given:  # a group as by default has none of these, and changes none
                options |= {name: own[0][name] for name in DEFAULTS}
            loaded.append((options, []))
            for param, before in zip(group["params"], variables, strict=True):
                loaded[-1][1].append(self.restored(param, options, before, number))
                number += 1
        self.theirs = loaded

    def restored(self, param, options, before, number):
        """Return a variable with the state of another, and the weights as they are."""
        variable = self.new_variable(param, options, number)
        if before.steps == 0:
            return variable
        before = copy.deepcopy(before)
        variable.steps = before.steps
        if isinstance(variable, DoubleVariable):
            variable.m, variable.u = before.m, before.u
            return variable
        variable.state = before.state
        if options["weight_rounding"] == "remainder" and param.dtype == BF16:
            variable.weight.low = before.weight.low
        return variable

    @rule(
        calls=calls,
        wrong=st.sampled_from(sorted(CHANGES_OF_FILES)),
        where=st.integers(0, 9),
        through=st.sampled_from([through_a_file, copy.deepcopy]),
    )
    def load_something_wrong(self, calls, wrong, where, through):
        self.train(calls)
        saved = copy.deepcopy(self.ours.state_dict())
        for state in saved["state"].values():
            state["step"] += 3  # of another training, so that nothing of it goes unnoticed
        group = saved["param_groups"][where % len(saved["param_groups"])]
        group["lr"] = 0.4
        if CHANGES_OF_FILES[wrong](saved, group) is not False:
            saved = through(saved)
            self.require_refused(lambda: self.ours.load_state_dict(saved), wrong)

    @rule(how=st.sampled_from(["pickle", "deepcopy"]))
    def go_on_with_a_copy(self, how):
        for param in params_of(self.ours):
            param.grad = None
        self.originals.append(Snapshot(self.ours))
        self.ours = (
            pickle.loads(pickle.dumps(self.ours)) if how == "pickle" else copy.deepcopy(self.ours)
        )

    # ---- What must not be ------------------------------------------------------------------------

    @rule(
        calls=st.just([]) | calls,  # also before there is state
        wrong=st.lists(st.sampled_from(sorted(FAULTS | FAULTS_OF_STATE)), min_size=1, max_size=8),
        where=st.integers(0, 11),
        seed=seeds,
    )
    def step_with_a_fault(self, calls, wrong, where, seed):
        self.train(calls)
        everything = params_of(self.ours)
        param = everything[where % len(everything)]
        if param.numel() == 0:
            return
        group = next(g for g in self.ours.param_groups if any(p is param for p in g["params"]))
        for fault in wrong:
            self.feed(["usual"] * 12, seed, None)
            options, kept = dict(group), self.ours.state.get(param)
            state = {} if kept is None else dict(kept)
            if fault in FAULTS_OF_STATE and not state:
                continue
            (FAULTS | FAULTS_OF_STATE)[fault](group, param, kept)
            self.require_refused(self.ours.step, fault)
            group.clear()
            group.update(options)
            if kept is not None:
                kept.clear()
                kept.update(state)

    def require_refused(self, call, label=""):
        before = Snapshot(self.ours)
        options = [dict(group) for group in self.ours.param_groups]
        try:
            call()
        except REFUSALS as refusal:
            assert str(refusal), f"{label}: an error without words"
        else:
            pytest.fail(f"{label}: not refused")
        before.require_unchanged()
        after = [dict(group) for group in self.ours.param_groups]
        for group, earlier in zip(after, options, strict=True):
            assert group.keys() == earlier.keys()
            assert all(group[name] is earlier[name] for name in group)

    # ---- What always is --------------------------------------------------------------------------

    @invariant()
    def same_bits(self):
        for group, (_, variables) in zip(self.ours.param_groups, self.theirs, strict=True):
            for param, variable in zip(group["params"], variables, strict=True):
                expected = variable.expected()
                state = self.ours.state.get(param, {})
                if variable.steps == 0:
                    assert not state
                    expected = {"param": expected["param"]}
                tensors = {"param": param, **state}
                assert tensors.keys() == expected.keys()
                for name, tensor in tensors.items():
                    is_one = name in ("step", "exp_inf_scale")
                    actual = in_memory(tensor if is_one else in_order(tensor, param))
                    both = [actual, expected[name]]
                    if tensor.dtype == BF16:  # any NaN is as any other
                        both = [array.view(dtype_of("bfloat16")) for array in both]
                    assert_same(*both, name)

"""Variables in groups on an emulated GPU, with numbers in device memory, and twins on the host."""

import numpy as np
from adamax_ext import _core

from support.bits import PAIRS, assert_same_bits, is_testable, spread
from support.cuda_api import CudaCall, group_of, variable_of
from support.memory import unaligned
from support.steps import EMA_MOMENTUM, RULES, SETTINGS, native, random_arrays

TESTABLE = [pair for pair in PAIRS if is_testable(*pair)]
TYPES = (np.float32, np.float64, np.int32)  # of counts; rates have the first two
OFFSETS = [0, 0, 1, 2, 4, 8]
BOTH = {"step", "learning_rate"}
ON_DEVICE = {  # which numbers of every third group lie in device memory
    "all": [BOTH, BOTH, BOTH],
    "steps": [{"step"}, {"step"}, {"step"}],
    "some": [{"step"}, BOTH, {"learning_rate"}],
    "none": [set(), set(), set()],
}


def plan_of(variables, groups):
    """The host's plan for variables with the arrays of `update`."""
    arrays = {role: [a.get(role) for a in variables] for role in ("param", "m", "u", "average")}
    has_average = "average" in variables[0]
    return _core.Plan(
        tuple(arrays["param"]),
        [f"v{i}" for i in range(len(variables))],
        groups,
        momentum=arrays["m"],
        norm=arrays["u"],
        averages=arrays["average"] if has_average else None,
        accumulators=None,
    )


class Twins:
    """Variables in groups, on an emulated GPU and on the host, with the numbers of each group."""

    def __init__(self, num_variables, num_groups, *, average=True, clips=True, on_device="all"):
        self.rng = np.random.default_rng(num_groups)
        self.chosen = [i * 3 % num_groups for i in range(num_variables)]
        self.host, self.device = [], []
        sizes = (1, 5, 515, 37, 0, 1030) if num_variables < 100 else (5,)
        for i in range(num_variables):
            pair = TESTABLE[i % len(TESTABLE)]
            arrays = random_arrays(self.rng, sizes[i % len(sizes)], *pair)
            if not average:
                del arrays["average"]
            offset = self.rng.choice(OFFSETS)
            self.host.append(arrays)
            self.device.append({role: unaligned(a, offset)[0] for role, a in arrays.items()})
        self.settings = [self.settings_of(k, clips) for k in range(num_groups)]
        self.on_device = ON_DEVICE[on_device]
        self.counts = [np.array([k % 3], TYPES[k % 3]) for k in range(num_groups)]
        self.rates = [np.zeros(1, TYPES[k % 2]) for k in range(num_groups)]
        self.steps = [k % 3 + 1 for k in range(num_groups)]  # the next ones
        self.plan = plan_of(self.host, self.chosen)

    @staticmethod
    def settings_of(k, clips):
        settings = {**SETTINGS, **RULES[k % len(RULES)], "maximize": k % 5 == 3}
        settings |= {"beta_1": (0.83, 0.0, 0.9, 0.998)[k % 4], "ema_momentum": EMA_MOMENTUM}
        return settings | ({"clipvalue": 0.61} if clips and k % 7 == 2 else {})

    def change_numbers(self, rate=None):
        """Change gradients and rates in the memory where they lie."""
        for mine, theirs in zip(self.device, self.host, strict=True):
            theirs["grad"] = spread(self.rng, theirs["grad"].size, theirs["grad"].dtype)
            mine["grad"][...] = theirs["grad"]
        for array in self.rates:
            array[...] = self.rng.uniform(0.001, 0.1) if rate is None else rate

    def call(self, **settings):
        groups = []
        for k, group in enumerate(self.settings):
            numbers = {"step": self.steps[k], "learning_rate": float(self.rates[k][0])}
            if "step" in self.on_device[k % 3]:
                numbers |= {"step": -5, "device_step": self.counts[k]}  # that one is not looked at
            if "learning_rate" in self.on_device[k % 3]:
                numbers |= {"learning_rate": np.nan, "device_learning_rate": self.rates[k]}
            groups.append(group_of(**{**group, **numbers}))
        variables = [variable_of(*both) for both in zip(self.device, self.chosen, strict=True)]
        return CudaCall(variables, groups, **settings)

    def step_host(self, **settings):
        """The host's own kernels, with numbers that it is told."""
        groups = [
            native(_core.Group, **{**group, "step": step, "learning_rate": float(rate[0])})
            for group, step, rate in zip(self.settings, self.steps, self.rates, strict=True)
        ]
        grads = tuple(arrays["grad"] for arrays in self.host)
        assert self.plan.step(grads, None, groups, native(_core.Call, **settings))
        self.steps = [step + 1 for step in self.steps]

    def assert_same(self, label):
        for i, (mine, theirs) in enumerate(zip(self.device, self.host, strict=True)):
            for role, array in theirs.items():
                assert_same_bits(mine[role], array, f"{role} of {i} after {label}")
        for k, count in enumerate(self.counts):
            if "step" in self.on_device[k % 3]:
                assert count[0] == self.steps[k] - 1, f"count of {k} after {label}"

    def copies(self):
        arrays = [a for arrays in self.device for a in arrays.values()]
        return [a.copy() for a in (*arrays, *self.counts, *self.rates)]

    def assert_unchanged(self, before, label):
        for one, other in zip(before, self.copies(), strict=True):
            assert_same_bits(other, one, label)

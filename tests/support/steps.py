"""The functional step beside the program."""

import itertools

import adamax_ext
import numpy as np

from support import reference
from support.bits import assert_same_bits, compute_dtype, dtype_of, rounded, spread, widened

# Nothing here is a default, a power of two, or equal to another value.
SETTINGS = {"learning_rate": 0.0371, "beta_1": 0.83, "beta_2": 0.957, "epsilon": 3.1e-5}
EMA_MOMENTUM = 0.871
RULES = [
    {"weight_decay": weight_decay, "decay": decay, "epsilon_mode": mode}
    for weight_decay, decay in [(0.0, "decoupled"), (0.213, "decoupled"), (0.213, "l2")]
    for mode in ("outside", "inside")
]


def expected_update(arrays, *, grad_scale=1.0, ema_momentum=EMA_MOMENTUM, **settings):
    """Return what `update` makes of `arrays`, by the contract program."""
    storage = arrays["param"].dtype
    T = compute_dtype(storage).type
    w, m, u = widened(arrays["param"]), arrays["m"].copy(), arrays["u"].copy()
    with np.errstate(all="ignore"):
        h = widened(arrays["grad"]) * T(grad_scale)
        reference.update(w, h, m, u, **settings)
        w = w.astype(storage).astype(T)
        result = {"param": rounded(w, storage), "grad": arrays["grad"], "m": m, "u": u}
        if "average" in arrays:  # of the weight as it is stored
            k = T(ema_momentum)
            running = arrays["average"] * k + w * (T(1) - k)
            result["average"] = w if settings["step"] == 1 else running
    return result


def native(kind, **settings):
    """Return a `_core.Group` or `_core.Call` with these settings."""
    made = kind()
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def do_update(arrays, *, ema_momentum=EMA_MOMENTUM, **settings):
    adamax_ext.update(**arrays, ema_momentum=ema_momentum, **settings)


def assert_same_step(arrays, label, update=do_update, **settings):
    """Do one step on `arrays` in place and require the bits of the program; return them."""
    expected = expected_update(arrays, **settings)
    update(arrays, **settings)
    for name, array in arrays.items():
        assert_same_bits(array, expected[name], f"{name} after {label}")
    return arrays


def random_arrays(rng, size, param, grad):
    T = compute_dtype(dtype_of(param))
    return {
        "param": spread(rng, size, dtype_of(param)),
        "grad": spread(rng, size, dtype_of(grad)),
        "m": spread(rng, size, T),
        "u": np.abs(spread(rng, size, T, high=0.5)),
        "average": spread(rng, size, T),
    }


def check_rules(param, grad, update=do_update):
    """Every rule, with and without an average, unscaling and clipping, for several steps."""
    rng = np.random.default_rng(1)
    for rule, with_average, clipvalue, grad_scale in itertools.product(
        RULES, (False, True), (None, 0.61), (1.0, 0.37)
    ):
        arrays = random_arrays(rng, 515, param, grad)
        if not with_average:
            del arrays["average"]
        changes = {**SETTINGS, **rule, "clipvalue": clipvalue, "grad_scale": grad_scale}
        for step in (1, 2, 3, 7, 1000, 2**40):
            arrays["grad"] = spread(rng, 515, dtype_of(grad))
            assert_same_step(arrays, f"step {step} of {changes}", update, step=step, **changes)


def special_values(dtype):
    T = compute_dtype(dtype).type
    info, limit = np.finfo(T), T(reference.tiny(T))
    tenth, most = T(0.1), info.max
    return np.array(
        (
            *(np.nan, np.inf, -np.inf, most, -most, 0.0, -0.0, 1.0, -tenth, 7e-8),
            *(info.smallest_subnormal, -info.tiny / 4, info.tiny),
            *(limit, np.nextafter(limit, T(0)), -2 * limit),
        ),
        T,
    )


def check_special_values(param, grad, update=do_update):
    """All combinations of special values of the weight, the gradient and the state."""
    table = special_values(dtype_of(param))
    w, g, m, u = (axis.ravel() for axis in np.meshgrid(table, table, table, table))
    fresh = {
        "param": rounded(w, dtype_of(param)),
        "grad": rounded(g, dtype_of(grad)),
        "m": m,
        "u": u,
        "average": u[::-1].copy(),
    }
    for rule, clipvalue in itertools.product(RULES, (None, 0.05)):
        arrays = {name: array.copy() for name, array in fresh.items()}
        for step in (2, 1):
            label = f"step {step} of {rule}, clipvalue {clipvalue}"
            changes = {**SETTINGS, **rule, "clipvalue": clipvalue, "step": step}
            assert_same_step(arrays, label, update, **changes)

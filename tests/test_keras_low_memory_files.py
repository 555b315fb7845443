"""Files, copies and values of Keras' models whose optimizer has state in fewer bits, on torch.

They have Keras' layout: numbers in float32, and float32 weights after everything else.
"""

import copy
import pickle

import adamax_ext
import numpy as np
import pytest
from support import reference_lowmem as program
from support.keras_low_memory import (
    Twins,
    apply,
    as_stored,
    as_tensor,
    everything,
    kept_by,
    make_gradients,
    require_equal,
    require_same,
    variables_of,
)
from support.keras_pairs import Adamax, Theirs, keras
from support.keras_torch import torch
from support.low_memory import every_option, set_to

pytest.importorskip("h5py", reason="Keras' files need h5py")

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RULE = {"learning_rate": 2.0**-6, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.02}
LOW = {**RULE, "state_bits": 8, "weight_rounding": "remainder", "seed": 5}


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.config.set_dtype_policy("float32")


def stored(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def as_float32(store):
    """As arrays of NumPy; the bfloat16 of Keras widened, but not the number of calls."""
    return {key: np.asarray(value, None if key == "0" else "f") for key, value in store.items()}


# ---- The layout ----------------------------------------------------------------------------------


@every_option
def test_the_layout_is_that_of_adamax(bits, rounding):
    """Also what is loaded from it: the bits of the weights' remainders, codes within a rounding."""
    twins = Twins(bits, rounding, use_ema=True, gradient_accumulation_steps=2)
    twins.train(range(5))
    store, expected = stored(twins.ours), stored(twins.numpys)
    assert list(store) == list(expected)
    for key in expected:
        np.testing.assert_array_equal(store[key], expected[key], key)
        assert key == "0" or store[key].dtype == expected[key].dtype
    assert store["0"] == 5
    remainders = [as_stored(v) for v in twins.ours._stored.remainders if v is not None]
    # As from a file.
    twins.ours.load_own_variables({key: np.array(a, order="C") for key, a in store.items()})
    twins.numpys.load_own_variables(expected)
    twins.require_same()
    kept = [as_stored(v) for v in twins.ours._stored.remainders if v is not None]
    require_equal(kept, remainders)
    twins.train(range(5, 9))
    twins.require_same()


@every_option
def test_other_settings_load_what_has_no_remainders(bits, rounding):
    """From Keras' class, from float32 and from fewer bits, and into them."""
    twins = Twins(bits, rounding)
    for other in (
        Theirs(**RULE), Adamax(**RULE), Adamax(**RULE, state_bits=8), Adamax(**RULE, state_bits=16),
    ):  # fmt: skip
        variables = variables_of(twins.arrays)
        for call in range(3):
            apply(other, make_gradients(twins.arrays, call), variables)
        store = as_float32(stored(other))
        twins.train(range(1))  # which loading replaces, remainders too
        twins.ours.load_own_variables(store)
        assert int(twins.ours.iterations) == 3
        loaded = as_float32(stored(twins.ours))
        for i, array in enumerate(twins.arrays.values()):
            m, u = (store[str(2 + 2 * i + j)] for j in range(2))
            m_again, u_again = (loaded[str(2 + 2 * i + j)] for j in range(2))
            assert u.shape == array.shape
            assert (abs(u_again - u) <= 0.032 * u + 2e-5 * u.max(initial=0)).all()
            assert (abs(m_again - m) <= 0.07 * (u + RULE["epsilon"]) + 1e-7).all()
        for remainder in twins.ours._stored.remainders:
            assert remainder is None or not as_stored(remainder).any()
        if rounding != "remainder":
            other.load_own_variables(loaded)
            assert as_float32(stored(other)).keys() == loaded.keys()
            if bits == 8 and getattr(other, "state_bits", 32) == 32:
                back = as_float32(stored(other))
                np.testing.assert_array_equal(back["2"], loaded["2"])
                np.testing.assert_array_equal(back["3"], loaded["3"])


def test_float32_weights_set_the_remainders_of_their_bfloat16_alone():
    twins = Twins(16, "remainder")
    twins.train(range(3))
    store, i = stored(twins.ours), list(twins.arrays).index("brain_kernel")
    weight, remainder = twins.variables[i], kept_by(twins.ours, i)["remainder"]
    before = as_stored(remainder)
    assert (before[:2, 0, 0] != 0).all()
    with torch.no_grad():
        weight._value[:2, 0, 0] = torch.tensor([3.0, 0.0])  # by somebody else
    seen = as_stored(weight)
    twins.ours.load_own_variables(store)
    before[:2, 0, 0] = 0
    np.testing.assert_array_equal(as_stored(remainder), before)
    np.testing.assert_array_equal(as_stored(weight), seen)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(1, 4100, 1), (65, 1, 64), (3, 1, 1), (0, 3)], ids=str)
def test_axes_of_length_1_and_0(shape, order, bits):
    """Whose strides mean nothing."""
    rng = np.random.default_rng(3)
    array = np.array(rng.normal(size=shape), "f", order=order).astype("bfloat16")
    settings = {**LOW, "state_bits": bits}
    ours, numpys = Adamax(**settings), adamax_ext.Adamax(**settings)
    variables = variables_of({"a": array})
    ours.build(variables)
    numpys.build({"a": array})
    for _ in range(3):
        gradient = np.array(rng.normal(size=shape), "f", order=order)
        apply(ours, [gradient])
        numpys.apply([gradient])
        require_same(ours, variables, numpys, {"a": array})
        store, expected = stored(ours), stored(numpys)
        require_equal(list(store.values())[2:], list(expected.values())[2:])
        ours.load_own_variables(store)
        numpys.load_own_variables(expected)


# Of 6 variables: calls, rate, first moment and norm of each, then the weights that have remainders.
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("0", lambda _: np.int64(-1), r"store\['0'\] \('.*iteration'\) must be an integer >= 0"),
        ("0", lambda _: np.uint64(2**63), r"store\['0'\] .* must be an integer >= 0; received -92"),
        ("0", lambda _: np.float32(2), r"store\['0'\] .* must have shape \(\) .* float32"),
        ("0", lambda _: np.ones(1, int), r"store\['0'\] .* must have shape \(\) .* shape \(1,\)"),
        ("1", lambda _: np.str_("fast"), r"store\['1'\] .*rate'\) must have shape .* dtype <U4"),
        ("2", lambda a: a[1:], r"store\['2'\] \('.*kernel_mom.*'\) must have shape \(70, 60\) and"),
        ("2", lambda a: a * 1j, r"store\['2'\] .* dtype like float32; .* dtype complex"),
        ("3", set_to(-2), r"norm of 'kernel' must not be below zero; received -2\.0"),
        ("5", set_to(-2), r"norm of 'bias' must not be below zero; received -2\.0"),
        ("13", set_to(-2), r"norm of 'scalar' must not be below zero; received -2\.0"),
        ("13", lambda _: np.float64(1e300), r"store\['13'\] .* like float32; .* dtype float64"),
        ("15", lambda a: a[1:], r"store\['15'\] \('brain_bias'\) must have shape \(17, 15\) and"),
        ("16", lambda _: b"", r"store\['16'\] \('scalar'\) must have shape \(\) .* dtype \|S1"),
    ],
)
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_what_does_not_fit_is_refused(bits, key, change, message):
    twins = Twins(bits, "remainder")
    twins.train(range(2))
    store = stored(twins.ours)
    assert len(store) == 2 + 2 * 6 + 3
    store |= {"0": np.int64(77), "2": store["2"] + 1}
    store[key] = change(store[key])
    before = everything(twins.ours, twins.variables)
    with pytest.raises(ValueError, match=f"^{message}"):
        twins.ours.load_own_variables(store)
    require_equal(everything(twins.ours, twins.variables), before)


def test_state_in_float64_is_loaded_as_it_is():
    optimizer = Adamax(**RULE, weight_rounding="stochastic")
    variables = variables_of({"a": np.linspace(-1, 1, 9)})
    apply(optimizer, [np.linspace(-3, 2, 9)], variables)
    before, store = everything(optimizer, []), stored(optimizer)
    assert before[2].dtype == np.float64
    apply(optimizer, [np.ones(9)])
    optimizer.load_own_variables(store)
    require_equal(everything(optimizer, []), before)


def test_a_norm_of_nan_is_loaded():
    """Float32 state has it where a gradient had."""
    twins = Twins(8, "nearest")
    twins.train(range(2))
    store = stored(twins.ours)
    store["5"] = set_to(np.nan)(store["5"])
    twins.ours.load_own_variables(store)
    assert np.isnan(as_stored(kept_by(twins.ours, 1)["norm"])[-1])


@pytest.mark.parametrize("more", [-1, 1, 6])  # the last are as many as there are variables
def test_another_number_of_variables_is_skipped_in_keras_words(more):
    twins = Twins(8, "nearest")
    twins.train(range(2))
    store = stored(twins.ours)
    for i in range(len(store), len(store) + more):
        store[str(i)] = np.zeros(3, "f")
    if more < 0:
        del store["9"]
    before = everything(twins.ours, twins.variables)
    with pytest.warns(UserWarning, match=rf"^Skipping variable .* has 16 .* has {16 + more} var"):
        twins.ours.load_own_variables(store)
    require_equal(everything(twins.ours, twins.variables), before)


# ---- Values of variables -------------------------------------------------------------------------


@every_option
def test_set_weights_takes_variables_as_they_are_stored(bits, rounding):
    twins, other = Twins(bits, rounding, use_ema=True), Twins(bits, rounding, use_ema=True)
    twins.train(range(3))
    other.ours.set_weights([v.numpy() for v in twins.ours.variables])
    require_equal(everything(other.ours, []), everything(twins.ours, []))
    other.train([0])  # its plan sees what is assigned afterwards
    for variable, value in zip(other.ours.variables, twins.ours.variables, strict=True):
        variable.assign(value)
    for variable, array in zip(other.variables, twins.arrays.values(), strict=True):
        variable.assign(as_tensor(array))
    apply(other.ours, make_gradients(twins.arrays, 3))
    twins.train([3])
    require_equal(everything(other.ours, other.variables), everything(twins.ours, twins.variables))


def test_set_weights_refuses_numbers():
    twins = Twins(8, "remainder")
    twins.train(range(2))
    values = [v.numpy() for v in twins.ours.variables]
    before = everything(twins.ours, twins.variables)
    for changed, message in (
        (
            list(stored(twins.ours).values()),
            r"weights must have one entry for each of the 19 .* 17",
        ),
        ([*values[:2], values[2].astype("f"), *values[3:]], r"weights\[2\] must have dtype int8"),
        ([*values[:-1], np.float32(0)], r"weights\[18\] must have dtype int16 .* received float32"),
        ([*values[:2], values[2][1:], *values[3:]], r"weights\[2\] .* shape \(70, 60\) as '.*kern"),
    ):
        changed[0] = np.int64(77)
        with pytest.raises(ValueError, match="^" + message):
            twins.ours.set_weights(changed)
    require_equal(everything(twins.ours, twins.variables), before)


# ---- Models --------------------------------------------------------------------------------------


def make_model(kind, settings, policy="bfloat16", wrap=None):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(2)
    layers = [
        keras.layers.Dense(80, activation="tanh", name="a"),
        keras.layers.Dense(3, name="b"),
    ]
    model = keras.Sequential([keras.Input((60,)), *layers], name="net")
    optimizer = kind(**settings, name="inner")
    model.compile(wrap(optimizer) if wrap else optimizer, loss="mse")
    return model


def fit(model, begin, end):
    """Steps of one batch each."""
    for step in range(begin, end):
        rng = np.random.default_rng(step)
        x, y = rng.normal(size=(8, 60)).astype("f"), rng.normal(size=(8, model.layers[-1].units))
        model.train_on_batch(x, y.astype("f"))


def inner(model):
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def move_whole(model, make, path):
    model.save(f"{path}.keras")
    return keras.models.load_model(f"{path}.keras")


def move_weights(model, make, path):
    model.save_weights(f"{path}.weights.h5")
    loaded = make()
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(f"{path}.weights.h5")
    return loaded


def require_resumed(moved, source, steps):
    """Weights and remainders are the same; the state is within one rounding."""
    ours, theirs = inner(moved), inner(source)
    assert ours.get_config() == theirs.get_config()
    assert int(ours.iterations) == int(theirs.iterations) == steps
    for a, b in zip(moved.trainable_variables, source.trainable_variables, strict=True):
        np.testing.assert_array_equal(as_stored(a), as_stored(b))
    for a, b in zip(ours._stored.remainders, theirs._stored.remainders, strict=True):
        np.testing.assert_array_equal(as_stored(a), as_stored(b))
    again, store = as_float32(stored(ours)), as_float32(stored(theirs))
    for i in range(len(ours._m)):
        m, u = (store[str(2 + 2 * i + j)] for j in range(2))
        m_again, u_again = (again[str(2 + 2 * i + j)] for j in range(2))
        assert (abs(u_again - u) <= 0.032 * u + 2e-5 * u.max()).all()
        assert (abs(m_again - m) <= 0.07 * (u + RULE["epsilon"])).all()
    fit(source, steps, steps + 4)
    fit(moved, steps, steps + 4)
    for a, b in zip(moved.trainable_variables, source.trainable_variables, strict=True):
        a, b = a.numpy().astype("f"), b.numpy().astype("f")
        assert np.abs(a - b).max() <= 0.02 * np.abs(b).max()


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, 2.0**4, 3)


@pytest.mark.parametrize("move", [move_whole, move_weights])
@pytest.mark.parametrize("wrap", [None, scaled], ids=["", "scaled"])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_a_model_trains_on_after_a_move(bits, wrap, move, tmp_path):
    def make():
        return make_model(Adamax, {**LOW, "state_bits": bits}, wrap=wrap)

    source = make()
    fit(source, 0, 5)
    moved = move(source, make, tmp_path / "model")
    assert type(inner(moved)) is Adamax
    if wrap:
        for name in ("dynamic_scale", "step_counter"):
            a, b = (float(getattr(m.optimizer, name).numpy()) for m in (moved, source))
            assert a == b
    require_resumed(moved, source, 5)


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [16, 8])
def test_files_go_to_keras_and_back(bits, policy, tmp_path):
    settings = {"ours": {**RULE, "state_bits": bits}, "keras": RULE}
    kinds = {"ours": Adamax, "keras": Theirs}
    for source, target in (("ours", "keras"), ("keras", "ours")):
        model = make_model(kinds[source], settings[source], policy)
        fit(model, 0, 5)

        def make(target=target):
            return make_model(kinds[target], settings[target], policy)

        moved = move_weights(model, make, tmp_path / source)
        assert int(moved.optimizer.iterations) == 5
        a, b = (as_float32(stored(m.optimizer)) for m in (moved, model))
        assert a.keys() == b.keys()
        u, again = b["3"], a["3"]
        assert u.shape == (60, 80)
        assert (abs(again - u) <= 0.04 * u + 2e-5 * u.max()).all()
        fit(moved, 5, 7)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_model(copied):
    """Which Keras makes by a file."""
    source = make_model(Adamax, LOW)
    fit(source, 0, 5)
    require_resumed(copied(source), source, 5)


def test_remainders_of_a_model_are_those_of_the_program():
    """What is appended to a file is the weight that a float32 training would have had."""
    model = make_model(Adamax, {**RULE, "weight_rounding": "remainder"})
    full = make_model(Theirs, RULE, "float32")
    for variable, weight in zip(full.trainable_variables, model.trainable_variables, strict=True):
        variable.assign(keras.ops.cast(weight._value, "float32"))
    gradients = [torch.full(tuple(v.shape), 0.5) for v in model.trainable_variables]
    for _ in range(5):
        model.optimizer.apply(gradients, model.trainable_variables)
        full.optimizer.apply(gradients, full.trainable_variables)
    store = stored(model.optimizer)
    for i, weight in enumerate(model.trainable_variables):
        master = np.asarray(store[str(2 + 2 * 4 + i)])
        kept = kept_by(model.optimizer, i)
        joined = program.bf16_join(as_stored(weight), as_stored(kept["remainder"]))
        np.testing.assert_array_equal(master, joined, strict=True)
        expected = full.trainable_variables[i].numpy()
        np.testing.assert_allclose(master, expected, rtol=1e-6, atol=1e-7)

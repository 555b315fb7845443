"""Checkpoints, conversion and Keras' layout of state in fewer bits and of rounded weights."""

import copy
import pickle

import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, checkpoint, convert_state
from data.saving_cases import DATA, refused, trained_for_golden
from safetensors import safe_open
from support import reference_lowmem as program
from support.bits import dtype_of, is_testable, memory_order, spread, widened
from support.low_memory import assert_same, every_option, needs_bfloat16, set_to

SHAPES = {
    "kernel": ("float32", (70, 60), "F"),
    "bias": ("float32", (83,), "C"),
    "scale": ("float32", (), "C"),
    "brain": ("bfloat16", (17, 3, 90), "C"),
    "brain/bias": ("bfloat16", (5,), "C"),
}
SHAPES = {name: row for name, row in SHAPES.items() if is_testable(row[0])}


def make_weights():
    rng = np.random.default_rng(1)
    return {
        name: np.array(spread(rng, shape, dtype_of(dtype)), order=order)
        for name, (dtype, shape, order) in SHAPES.items()
    }


def train(optimizer, weights, calls):
    """Do these calls of a training, whose gradients follow from their numbers."""
    for call in calls:
        rng = np.random.default_rng(call)
        gradients = [
            np.array(spread(rng, w.shape, w.dtype, -9, 4), order="F" if w.flags.fnc else "C")
            for w in weights.values()
        ]
        optimizer.apply(gradients, list(weights.values()))


def trained(calls=4, **settings):
    weights, optimizer = make_weights(), Adamax(0.01, **settings)
    optimizer.build(weights)
    train(optimizer, weights, range(calls))
    return weights, optimizer


def bits_of(weights, optimizer):
    """Return all that training changes, comparable with ==."""
    arrays = {f"weights of {name}": w for name, w in weights.items()}
    arrays |= {f"{k} of {n}": a for n, kinds in optimizer.state.items() for k, a in kinds.items()}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


# ---- Going on ------------------------------------------------------------------------------------


def from_file(weights, optimizer, folder, **settings):
    optimizer.save(folder / "checkpoint")
    other = Adamax(0.01, **settings, seed=99)  # which is replaced
    copies = {name: w.copy("K") for name, w in weights.items()}
    other.build(copies)
    other.load(folder / "checkpoint")
    return copies, other


WAYS = {
    "file": from_file,
    "pickle": lambda weights, optimizer, *_, **__: pickle.loads(pickle.dumps((weights, optimizer))),
    "deepcopy": lambda weights, optimizer, *_, **__: copy.deepcopy((weights, optimizer)),
}


@every_option
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_with_the_same_bits_after_any_call(tmp_path, bits, rounding, way):
    settings = {"state_bits": bits, "weight_rounding": rounding}
    settings |= {"use_ema": True, "gradient_accumulation_steps": 2}
    expected = bits_of(*trained(7, **settings, seed=5))
    for calls in range(7):
        weights, optimizer = trained(calls, **settings, seed=5)
        copies, other = WAYS[way](weights, optimizer, tmp_path, **settings)
        assert other.seed == 5
        assert bits_of(copies, other) == bits_of(weights, optimizer)
        train(other, copies, range(calls, 7))
        assert bits_of(copies, other) == expected, calls
    assert bits_of(*trained(7, **settings, seed=6)) != expected or bits == 32


def test_a_loss_scale_goes_on(tmp_path):
    def make():
        weights = make_weights()
        optimizer = LossScaleOptimizer(Adamax(0.01, state_bits=8, seed=3), initial_scale=8.0)
        optimizer.build(weights)
        return weights, optimizer

    weights, optimizer = make()
    train(optimizer, weights, range(3))
    optimizer.save(tmp_path / "file")
    _, other = make()
    copies = {name: w.copy("K") for name, w in weights.items()}
    other = LossScaleOptimizer(Adamax(0.01, state_bits=8))
    other.build(copies)
    other.load(tmp_path / "file")
    for w, o in ((weights, optimizer), (copies, other)):
        train(o, w, range(3, 6))
    assert bits_of(weights, optimizer) == bits_of(copies, other)
    assert other.dynamic_scale == 8.0


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("way", ["file", "deepcopy"])
def test_blocks_go_by_the_order_of_memory(tmp_path, order, way):
    axes = np.argsort(order)
    w = spread(np.random.default_rng(2), (9, 20, 33), np.float32).transpose(axes)
    results = []
    for calls in (6, 3):
        weights = {"w": w.copy("K")}
        assert weights["w"].strides == w.strides
        optimizer = Adamax(0.01, state_bits=8)
        optimizer.build(weights)
        for call in range(6):
            if call == calls:
                weights, optimizer = WAYS[way](weights, optimizer, tmp_path, state_bits=8)
            g = spread(np.random.default_rng(call), w.size, np.float32).reshape(9, 20, 33)
            optimizer.apply([g.transpose(axes)])
        results.append(bits_of(weights, optimizer))
    assert results[0] == results[1]


def test_blocks_of_another_memory_order_are_rounded_once_more():
    """As where pickling loses the memory order of weights, which only C and Fortran order keep."""
    w = spread(np.random.default_rng(2), (9, 20, 33), np.float32).transpose(2, 0, 1)
    optimizer = Adamax(0.01, state_bits=8)
    optimizer.build({"w": w})
    optimizer.apply([w.copy("K")])
    other_w, other = pickle.loads(pickle.dumps((w, optimizer)))
    assert other_w.strides != w.strides
    codes, other_codes = optimizer.state["w"], other.state["w"]
    np.testing.assert_array_equal(codes["momentum"], other_codes["momentum"])
    u, again = optimizer.decoded_state("w")["norm"], other.decoded_state("w")["norm"]
    assert (abs(again - u) <= 0.032 * u + 2e-5 * u.max()).all()
    assert not np.array_equal(codes["norm_scale"], other_codes["norm_scale"])
    other.apply([other_w.copy()])


# ---- Files ---------------------------------------------------------------------------------------


def test_the_file_of_default_settings_is_the_one_of_before(tmp_path):
    _, optimizer = trained_for_golden(2)
    optimizer.save(tmp_path / "file")
    before = (DATA / "checkpoint_v2.safetensors").read_bytes()
    assert (tmp_path / "file").read_bytes() == before


@every_option
def test_a_file_holds_what_is_stored(tmp_path, bits, rounding):
    _, optimizer = trained(state_bits=bits, weight_rounding=rounding, seed=2**64 - 1)
    optimizer.save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="numpy") as file:
        for name, kinds in optimizer.state.items():
            for kind, array in kinds.items():
                assert_same(file.get_tensor(f"{name}/{kind}"), array, f"{kind} of {name}")
        assert len(file.keys()) == sum(map(len, optimizer.state.values()))
    header = checkpoint.read(tmp_path / "file")
    del header["state"]
    assert header == {
        "format_version": 3,
        "state_bits": bits,
        "weight_rounding": rounding,
        "seed": 2**64 - 1,
        "memory_order": {"kernel": [1, 0]} if bits == 8 else {},
        "calls": 4,
        "learning_rate": 0.01,
        "gradient_accumulation_steps": None,
        "accumulated": [],
    }


def test_a_seed_alone_is_saved(tmp_path):
    _, optimizer = trained(seed=3)
    optimizer.save(tmp_path / "file")
    assert checkpoint.read(tmp_path / "file")["seed"] == 3
    _, other = trained(0)
    other.load(tmp_path / "file")
    assert (other.seed, other.get_config()["seed"]) == (3, 3)


@pytest.mark.parametrize("before", ["nearest", "stochastic"])
@pytest.mark.parametrize("after", ["nearest", "stochastic", "remainder"])
def test_another_rounding_of_weights_goes_on(before, after):
    weights, optimizer = trained(state_bits=16, weight_rounding=before)
    other = Adamax(0.01, state_bits=16, weight_rounding=after)
    other.build(weights)
    other.load_state_dict(optimizer.state_dict())
    assert other.weight_rounding == after
    for name, kinds in other.state.items():
        remainder = kinds.get("remainder")
        has_one = after == "remainder" and weights[name].dtype.name == "bfloat16"
        assert (remainder is not None) == has_one
        assert remainder is None or not remainder.any()
        for kind in ("momentum", "norm", "norm_scale"):
            np.testing.assert_array_equal(kinds[kind], optimizer.state[name][kind])
    train(other, weights, range(2))


# ---- What does not fit ---------------------------------------------------------------------------


def change(key, value):
    return lambda saved: saved.update({key: value})


def change_array(name, kind, edit):
    def changed(saved):
        saved["state"][name][kind] = edit(saved["state"][name][kind].copy())

    return changed


def negative(array):
    array.flat[0] = -1 if array.dtype == np.float32 else 0xBF80
    return array


LOW = {"state_bits": 8, "weight_rounding": "stochastic"}
MISFITS = [
    (LOW, change("state_bits", 16), r"state_bits of the state_dict is 16, .*8.*convert_state\("),
    (LOW, change("state_bits", "8"), r"state_bits of the state_dict is '8'"),
    (LOW, change("weight_rounding", "remainder"), "weight_rounding of .* is 'remainder', .*'stoch"),
    (LOW, change("weight_rounding", "up"), "weight_rounding of the state_dict must be .* 'up'"),
    (LOW, change("seed", 2**64), "seed must be an integer <= 18446744073709551615"),
    (LOW, change("seed", "1"), "seed must be an integer"),
    (LOW, change("memory_order", []), "memory_order must be a dict for built variables"),
    (LOW, change("memory_order", {"x": [0]}), "memory_order must be a dict for built variables"),
    (LOW, change("memory_order", {"kernel": [0, 0]}), r"memory_order of 'kernel' must be a list"),
    (LOW, change("memory_order", {"kernel": 1}), r"memory_order of 'kernel' .*received 1"),
    (LOW, change("memory_order", {"kernel": [0, True]}), r"memory_order of 'kernel' must be"),
    (
        LOW,
        change_array("kernel", "norm_scale", negative),
        "norm_scale of 'kernel' must not be below",
    ),
    (
        LOW,
        change_array("kernel", "norm", lambda a: a.astype(np.int8)),
        "norm of 'kernel' must have",
    ),
    (
        LOW,
        change_array("kernel", "norm_scale", lambda a: a[1:]),
        "norm_scale of 'kernel' must have",
    ),
    (
        LOW,
        change_array("kernel", "norm_scale", set_to(np.inf)),
        "norm_scale of 'kernel' must be finite",
    ),
    (LOW, lambda saved: saved["state"]["kernel"].pop("norm_scale"), "state of 'kernel' must have"),
    (LOW, lambda saved: saved.pop("seed"), "state_dict must have the keys"),
    (
        {"state_bits": 16},
        change_array("bias", "norm", negative),
        r"norm of 'bias' .*received -1\.0",
    ),
]


@pytest.mark.parametrize(("settings", "edit", "message"), MISFITS)
def test_a_state_dict_that_does_not_fit(settings, edit, message):
    weights, optimizer = trained(2, **settings)
    saved = optimizer.state_dict()
    edit(saved)
    refused(optimizer, weights, ValueError, "^" + message, optimizer.load_state_dict, saved)


@pytest.mark.parametrize("ours", [32, 16, 8])
@pytest.mark.parametrize("theirs", [32, 16, 8])
def test_other_bits_need_convert_state(tmp_path, ours, theirs):
    weights, optimizer = trained(2, state_bits=ours)
    _, other = trained(3, state_bits=theirs)
    other.save(tmp_path / "file")
    if ours == theirs:
        optimizer.load(tmp_path / "file")
        return
    message = rf"adamax_ext\.convert_state\(state_dict, state_bits={ours}\)"
    refused(optimizer, weights, ValueError, message, optimizer.load, tmp_path / "file")
    optimizer.load_state_dict(convert_state(other.state_dict(), state_bits=ours))
    assert optimizer.iterations == 3


@needs_bfloat16
def test_remainders_are_not_lost():
    _, optimizer = trained(2, weight_rounding="remainder")
    weights, other = trained(2)
    message = r"^weight_rounding of the state_dict is 'remainder', of the optimizer 'nearest'"
    refused(other, weights, ValueError, message, other.load_state_dict, optimizer.state_dict())


# ---- Conversion ----------------------------------------------------------------------------------


def program_state(w, kinds, bits, epsilon):
    """Return the program's state with these arrays."""
    state = program.LowState(w.size, bits, epsilon)
    for kind in ("momentum", "norm"):
        codes = getattr(state, kind).ravel()
        codes[: w.size] = memory_order(kinds[kind])
        setattr(state, kind, codes.reshape(getattr(state, kind).shape))
    if state.scale is not None:
        state.scale = kinds["norm_scale"] if state.bits == 8 else kinds["norm_scale"][0]
    return state


@pytest.mark.parametrize("source", [32, 16, 8])
@pytest.mark.parametrize("target", [32, 16, 8])
@pytest.mark.parametrize("epsilon", [1e-7, 0.125])
def test_conversion_is_that_of_the_program(source, target, epsilon):
    settings = {"weight_rounding": "remainder", "use_ema": True, "epsilon": epsilon, "seed": 4}
    weights, optimizer = trained(4, state_bits=source, **settings)
    # Arrays of a state_dict are in C order; blocks that are made of them, too.
    weights = {name: np.asarray(w, order="C") for name, w in weights.items()}
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    converted = convert_state(saved, state_bits=target, epsilon=epsilon)
    np.testing.assert_equal(saved, before)

    other = Adamax(0.01, state_bits=target, **settings)
    other.build(weights)
    other.load_state_dict(converted)
    for name, w in weights.items():
        kinds = optimizer.state[name]
        state = program_state(w, kinds, source, epsilon)
        m, u = state.read()
        order = "F" if kinds["norm"].flags.fnc else "C"
        m, u = (x.reshape(w.shape, order=order).ravel("C") for x in (m, u))
        result = program.LowState(w.size, target, epsilon)
        result.convert(m, u)
        expected = {
            "momentum": result.momentum.ravel()[: w.size],
            "norm": result.norm.ravel()[: w.size],
        }
        if result.scale is not None:
            expected["norm_scale"] = np.atleast_1d(result.scale)
        for kind in ("average", "remainder"):
            if kind in kinds:
                expected[kind] = np.ascontiguousarray(kinds[kind]).ravel()
        if source == target and order == "F" and target == 8:
            # Blocks of another memory order: each norm is rounded once more.
            codes = other.state[name]
            assert_same(codes["momentum"], kinds["momentum"], "codes of the first moment")
            u_again = program_state(w, codes, 8, epsilon).read()[1]
            assert (abs(u_again - u) <= 0.032 * u + 2e-5 * u.max()).all()
            continue
        if source == target:
            expected |= {k: a.ravel() for k, a in kinds.items()}
        assert set(other.state[name]) == set(expected)
        for kind, array in other.state[name].items():
            assert_same(array.ravel(), expected[kind], f"{kind} of {name}")
    train(other, weights, range(4, 6))


def test_conversion_to_float32_and_back_is_within_one_rounding():
    _, optimizer = trained(4, state_bits=8)
    saved = optimizer.state_dict()
    again = convert_state(convert_state(saved, state_bits=32), state_bits=8)
    assert "format_version" in again and again["format_version"] == 3
    optimizer.load_state_dict(again)
    before, after = (convert_state(x, state_bits=32)["state"]["kernel"] for x in (saved, again))
    u = before["norm"]
    assert (abs(after["norm"] - u) <= 0.032 * u + 2e-5 * u.max()).all()
    assert (abs(after["momentum"] - before["momentum"]) <= 0.07 * u).all()


def test_default_settings_are_converted_to_version_2():
    _, optimizer = trained(2, state_bits=16)
    converted = convert_state(optimizer.state_dict(), state_bits=32)
    _, other = trained(0)
    assert list(converted) == list(other.state_dict())
    assert converted["format_version"] == 2
    other.load_state_dict(converted)


def test_conversion_of_a_loss_scale():
    weights = make_weights()
    optimizer = LossScaleOptimizer(Adamax(), initial_scale=4.0)
    optimizer.build(weights)
    train(optimizer, weights, range(2))
    other = LossScaleOptimizer(Adamax(state_bits=8))
    other.build(weights)
    other.load_state_dict(convert_state(optimizer.state_dict(), state_bits=8))
    assert (other.dynamic_scale, other.step_counter, other.iterations) == (4.0, 2, 2)


@pytest.mark.parametrize(
    ("edit", "arguments", "error", "message"),
    [
        (None, {"state_bits": 4}, ValueError, "state_bits must be 32, 16 or 8; received 4"),
        (None, {"epsilon": 0}, ValueError, "epsilon must be a number > 0; received 0"),
        (
            change("format_version", 9),
            {},
            ValueError,
            "format_version must be 1, 2 or 3; received 9",
        ),
        (change("state", [1]), {}, ValueError, "state must be a dict of dicts of arrays"),
        (
            lambda saved: saved["state"]["bias"].pop("norm"),
            {},
            ValueError,
            "state of 'bias' must have momentum and norm; received",
        ),
        (
            change_array("bias", "momentum", lambda a: a.astype(np.float64)),
            {},
            TypeError,
            "momentum of 'bias' has dtype float64.*state_bits 16",
        ),
        (change("seed", -1), {}, ValueError, "seed of the state_dict must be an integer >= 0"),
        (change("state_bits", 4), {}, ValueError, "state_bits of the state_dict must be 32, 16 or"),
        (change("state_bits", 16), {}, ValueError, "state of 'kernel' must have .*'norm_scale'"),
        (change("weight_rounding", "up"), {}, ValueError, "weight_rounding of the state_dict must"),
        (
            change("memory_order", {"kernel": [0.0]}),
            {},
            ValueError,
            "memory_order of 'kernel' must",
        ),
        (change("memory_order", []), {}, ValueError, "memory_order must be a dict"),
    ],
)
def test_conversion_refuses(edit, arguments, error, message):
    saved = trained(1, seed=1)[1].state_dict()
    if edit:
        edit(saved)
    with pytest.raises(error, match="^" + message):
        convert_state(saved, **{"state_bits": 16, **arguments})


@pytest.mark.parametrize("target", [32, 16, 8])
@pytest.mark.parametrize(
    ("source", "key", "edit", "message"),
    [
        (32, "kernel/norm", set_to(-2), "must not be below zero; received -2"),
        (8, "bias/norm", set_to(-2), "must not be below zero; received -2"),
        (16, "kernel/norm", negative, "must not be below zero; received -1"),
        (16, "kernel/norm_scale", negative, "must not be below zero; received -1"),
        (16, "kernel/norm_scale", set_to(np.inf), "must be finite; received inf"),
        (8, "kernel/norm_scale", negative, "must not be below zero; received -1"),
        (8, "kernel/norm_scale", set_to(np.inf), "must be finite; received inf"),
        (8, "kernel/norm_scale", set_to(np.nan), "must be finite; received nan"),
        (8, "kernel/norm_scale", lambda a: a[1:], r"must have shape \(17,\) and"),
        (8, "kernel/norm_scale", np.float64, "must have .* float32; received .* float64"),
        (8, "kernel/norm", lambda a: a.view(np.int8), "must have .* uint8; received .* int8"),
        (8, "kernel/momentum", lambda a: a[1:], r"must have shape \(70, 60\) and"),
        (32, "kernel/norm", np.float64, "must have .* float32; received .* float64"),
    ],
)
def test_conversion_refuses_arrays_that_cannot_be(source, target, key, edit, message):
    name, kind = key.split("/")
    saved = trained(1, state_bits=source)[1].state_dict()
    saved["state"][name][kind] = edit(saved["state"][name][kind])
    with pytest.raises(ValueError, match=f"^{kind} of '{name}' {message}"):
        convert_state(saved, target)


@pytest.mark.parametrize("source", [16, 8])
@pytest.mark.parametrize("target", [32, 16, 8])
def test_conversion_refuses_state_without_scales(source, target):
    saved = trained(1, state_bits=source)[1].state_dict()
    del saved["state"]["kernel"]["norm_scale"]
    with pytest.raises(ValueError, match=r"^state of 'kernel' must have \[.*'norm_scale'\]"):
        convert_state(saved, target)


@pytest.mark.parametrize("source", [32, 16, 8])
@pytest.mark.parametrize("target", [32, 16, 8])
def test_conversion_with_an_epsilon_that_8_bits_cannot_have(source, target):
    saved = trained(1, state_bits=source)[1].state_dict()
    convert_state(saved, target, epsilon=2.0**-86)
    if 8 in (source, target):
        with pytest.raises(ValueError, match=r"^epsilon must be >= 2\*\*-86 with state_bits 8"):
            convert_state(saved, target, epsilon=2.0**-87)
    else:
        convert_state(saved, target, epsilon=2.0**-87)


@pytest.mark.parametrize("target", [32, 16, 8])
def test_conversion_keeps_a_norm_of_nan(target):
    """Float32 state has it where a gradient had."""
    saved = trained(1)[1].state_dict()
    saved["state"]["bias"]["norm"][-1] = np.nan
    converted = convert_state(convert_state(saved, target), 32)
    assert np.isnan(converted["state"]["bias"]["norm"][-1])


def test_conversion_refuses_version_1_and_what_is_no_dict():
    version_1 = checkpoint.read(DATA / "checkpoint_v1.safetensors")
    with pytest.raises(ValueError, match=r"^format_version must be 2 or 3 .*received 1"):
        convert_state(version_1, state_bits=16)
    with pytest.raises(TypeError, match=r"^state_dict must be a dict; received list"):
        convert_state([], state_bits=16)


# ---- The layout of Keras -------------------------------------------------------------------------


@every_option
def test_variables_are_numbers(bits, rounding):
    weights, optimizer = trained(state_bits=bits, weight_rounding=rounding, use_ema=True)
    _, _, *arrays = optimizer.variables
    averages, arrays = arrays[: len(weights)], arrays[len(weights) :]
    state, masters = arrays[: 2 * len(weights)], arrays[2 * len(weights) :]
    for i, (name, kinds) in enumerate(optimizer.state.items()):
        assert averages[i] is kinds["average"]
        decoded = optimizer.decoded_state(name)
        np.testing.assert_array_equal(state[2 * i], decoded["momentum"], strict=True)
        np.testing.assert_array_equal(state[2 * i + 1], decoded["norm"], strict=True)
        assert (state[2 * i] is kinds["momentum"]) == ("norm_scale" not in kinds)
    kept = [name for name, kinds in optimizer.state.items() if "remainder" in kinds]
    for name, master in zip(kept, masters, strict=True):
        halves = weights[name].view(np.uint16)
        expected = program.bf16_join(halves, optimizer.state[name]["remainder"])
        np.testing.assert_array_equal(master, expected, strict=True)
    assert bool(kept) == (rounding == "remainder" and is_testable("bfloat16"))


@every_option
def test_keras_layout_is_loaded_within_one_rounding(bits, rounding):
    settings = {"state_bits": bits, "weight_rounding": rounding, "use_ema": True}
    weights, optimizer = trained(**settings)
    store = {}
    optimizer.save_own_variables(store)
    copies = {name: w.copy("K") for name, w in weights.items()}
    other = Adamax(0.01, **settings)
    other.build(copies)
    other.load_own_variables(store)
    assert other.iterations == 4
    for name, kinds in optimizer.state.items():
        loaded = other.state[name]
        for kind in {"average", "remainder"} & kinds.keys():
            np.testing.assert_array_equal(loaded[kind], kinds[kind], strict=True)
        state = program.LowState(weights[name].size, bits, optimizer.epsilon)
        decoded = optimizer.decoded_state(name)
        flat = "F" if kinds["norm"].flags.fnc else "C"
        state.convert(decoded["momentum"].ravel(flat), decoded["norm"].ravel(flat))
        for kind in ("momentum", "norm"):
            codes = getattr(state, kind).ravel()[: weights[name].size]
            assert_same(memory_order(loaded[kind]), codes, f"{kind} of {name}")
        u, again = decoded["norm"], other.decoded_state(name)
        assert (abs(again["norm"] - u) <= 0.032 * u + 2e-5 * u.max(initial=0)).all()
        assert (abs(again["momentum"] - decoded["momentum"]) <= 0.07 * u + 1e-7).all()
    for name, w in weights.items():
        np.testing.assert_array_equal(copies[name], w)
    train(other, copies, range(4, 6))


def test_keras_layout_without_remainders_is_that_of_float32():
    """It goes from any bits to any, and to Keras."""
    _, low = trained(state_bits=8)
    _, full = trained(0)
    store = {}
    low.save_own_variables(store)
    full.load_own_variables(store)
    for name in full.state:
        np.testing.assert_equal(full.decoded_state(name), low.decoded_state(name))
    again = {}
    full.save_own_variables(again)
    np.testing.assert_equal(again, store)


@needs_bfloat16
def test_remainders_of_another_memory_order():
    """Files have C order."""
    w = np.array(spread(np.random.default_rng(2), (7, 9), dtype_of("bfloat16")), order="F")
    optimizer = Adamax(0.01, weight_rounding="remainder")
    optimizer.build({"w": w})
    optimizer.apply([w.copy("K")])
    before = optimizer.state["w"]["remainder"].copy()
    assert before.any()
    optimizer.set_weights([np.array(v, order="C") for v in optimizer.variables])
    np.testing.assert_array_equal(optimizer.state["w"]["remainder"], before)


@needs_bfloat16
def test_a_layout_of_keras_without_float32_weights_leaves_no_remainders():
    weights, optimizer = trained(weight_rounding="remainder")
    _, of_keras = trained()
    optimizer.set_weights(of_keras.variables)
    kept = [kinds["remainder"] for kinds in optimizer.state.values() if "remainder" in kinds]
    assert kept
    assert not any(remainder.any() for remainder in kept)
    name = next(iter(weights))
    momentum = of_keras.state[name]["momentum"]
    np.testing.assert_array_equal(optimizer.state[name]["momentum"], momentum)


@needs_bfloat16
def test_float32_weights_set_the_remainders_of_their_bfloat16_alone():
    weights, optimizer = trained(weight_rounding="remainder")
    variables = [np.array(v) for v in optimizer.variables]
    before = optimizer.state["brain"]["remainder"].copy()
    w = weights["brain"]
    w[0, 0, :2] = 3, 0  # by somebody else
    seen = w.copy()
    optimizer.set_weights(variables)
    after = optimizer.state["brain"]["remainder"]
    assert (after[0, 0, :2] == 0).all()
    np.testing.assert_array_equal(after.ravel()[2:], before.ravel()[2:])
    np.testing.assert_array_equal(w.view(np.uint16), seen.view(np.uint16))
    masters = optimizer.variables[-2]
    np.testing.assert_array_equal(masters.ravel()[2:], variables[-2].ravel()[2:])
    np.testing.assert_array_equal(masters[0, 0, :2], widened(seen[0, 0, :2]))


@pytest.mark.parametrize("bits", [16, 8])
def test_set_weights_refuses_a_norm_below_zero(bits):
    weights, optimizer = trained(2, state_bits=bits)
    arrays = [np.array(v) for v in optimizer.variables]
    arrays[3][3, 3] = -2
    message = r"^norm of 'kernel' must not be below zero; received -2\.0"
    refused(optimizer, weights, ValueError, message, optimizer.set_weights, arrays)

"""Our Adamax for Keras with state in fewer bits and rounded weights, on torch.

Its bits are those of `adamax_ext.Adamax`, and so of the program, whatever Keras does around it.
"""

import functools

import adamax_ext
import numpy as np
import pytest
from support import reference_lowmem as program
from support.bits import memory_order
from support.keras_low_memory import (
    SETTINGS,
    Twins,
    apply,
    as_stored,
    as_tensor,
    every_storage,
    everything,
    kept_by,
    make_arrays,
    make_gradients,
    require_equal,
    variables_of,
)
from support.keras_models import fit, make_model
from support.keras_pairs import Adamax, Theirs, keras
from support.keras_torch import torch
from support.low_memory import LowMemoryReference, assert_same

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EMA = {"use_ema": True, "ema_momentum": 0.871, "ema_overwrite_frequency": 2}
DECAY = {"weight_decay": 0.213, "excluded": ("kernel", "brain_bias"), "loss_scale_factor": 3.7}
CASES = [
    {},
    {**EMA, **DECAY, "global_clipnorm": 2.0},
    {**EMA, "gradient_accumulation_steps": 2, "clipvalue": 0.61},
    {**DECAY, "gradient_accumulation_steps": 3, "clipnorm": 1.5, "use_ema": True},
]
SKIPPED = {(0, "kernel"), (1, "brain_kernel"), (2, "brain_kernel"), (3, "brain_bias"), (4, "bias")}


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")


# ---- Bits ----------------------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("settings", CASES, ids=["plain", "all", "micro-batches", "decay"])
def test_bits_are_those_of_adamax(bits, rounding, settings):
    twins = Twins(bits, rounding, **settings)
    for call in range(6):
        twins.train([call], SKIPPED)
        if call >= settings.get("gradient_accumulation_steps", 1) - 1:  # before, an average is 0
            twins.require_same()
    assert int(twins.ours._iterations) == twins.numpys.calls == 6


@every_storage
def test_bits_are_those_of_the_program(bits, rounding):
    settings = {**SETTINGS, "state_bits": bits, "weight_rounding": rounding, "use_ema": True}
    arrays = make_arrays(rounding)
    variables, optimizer = variables_of(arrays), Adamax(**settings)
    theirs = LowMemoryReference(**settings)
    theirs.build(list(arrays.values()))
    for call in range(4):
        gradients = make_gradients(arrays, call)
        apply(optimizer, gradients, variables)
        theirs.apply(gradients)
        for i, name in enumerate(arrays):
            expected = theirs.kept(i)
            for kind, kept in {**kept_by(optimizer, i), "weights": variables[i]}.items():
                bits_of = expected[kind]
                if bits_of.dtype.name == "bfloat16":
                    bits_of = bits_of.view(np.uint16)
                assert_same(memory_order(as_stored(kept)), bits_of, f"{kind} of {name}, {call}")


def test_the_seed_counts():
    results = []
    for seed in (9, 9, 10):
        twins = Twins(8, "stochastic", seed=seed)
        twins.train(range(2))
        twins.require_same()
        results.append([w.tobytes() for w in everything(twins.ours, twins.variables)])
    assert results[0] == results[1] != results[2]


def test_variables_without_a_gradient_or_not_passed_are_left_alone():
    twins = Twins(8, "remainder")
    twins.train(range(2))
    names = list(twins.arrays)
    chosen = [names.index("brain_bias"), names.index("kernel")]
    gradients = make_gradients(twins.arrays, 2)
    apply(twins.ours, [gradients[i] for i in chosen], [twins.variables[i] for i in chosen])
    twins.numpys.apply([gradients[i] for i in chosen], [twins.arrays[names[i]] for i in chosen])
    twins.require_same()
    twins.variables[0].trainable = False  # which Keras' optimizers do not look at
    twins.train([3], {(3, names[0])})
    twins.variables[0].trainable = True
    twins.train([4])
    twins.require_same()


# ---- What Keras does around a step ---------------------------------------------------------------


def test_a_loss_scale_around_it_skips_what_is_not_finite():
    twins = Twins(8, "stochastic")
    scaling = keras.optimizers.LossScaleOptimizer(twins.ours, 2.0**3, 100)
    scaling.build(twins.variables)
    for call in range(5):
        gradients = make_gradients(twins.arrays, call)
        scale = float(scaling.dynamic_scale.numpy())
        scaled = [g * np.asarray(scale, g.dtype) for g in gradients]
        if call in (1, 3):
            scaled[0][2, 2] = np.inf
        apply(scaling, scaled, twins.variables)
        if call not in (1, 3):
            twins.numpys.apply(gradients)
        twins.require_same()
    assert scale == 2.0
    assert int(twins.ours.iterations) == 3


@every_storage
def test_a_constraint_is_applied_to_the_weights_as_they_are_stored(bits, rounding):
    """The remainder stays: it is what the next step adds to."""
    twins = Twins(bits, rounding)
    places = [i for i, v in enumerate(twins.variables) if v.name in ("kernel", "brain_bias")]
    for i in places:
        twins.variables[i].constraint = keras.constraints.MaxNorm(0.5)
    for call in range(3):
        twins.train([call])
        for i in places:
            array = list(twins.arrays.values())[i]
            constrained = twins.variables[i].constraint(as_tensor(array))
            array.view(f"u{array.itemsize}")[...] = as_stored(constrained).view(
                f"u{array.itemsize}"
            )
        twins.require_same()


@pytest.mark.parametrize("steps", [None, 2])
def test_gradients_overwrite_variables_that_ask_for_it(steps):
    """They have no state, and are not counted as variables."""
    settings = {"state_bits": 8, "weight_rounding": "remainder", **SETTINGS}
    settings["gradient_accumulation_steps"] = steps
    arrays = make_arrays("remainder")
    variables, optimizer = variables_of(arrays), Adamax(**settings)
    numpys = adamax_ext.Adamax(**settings)
    for name in ("kernel", "brain_bias"):
        variables[list(arrays).index(name)].overwrite_with_gradient = True
    others = {n: a for n, a in arrays.items() if n not in ("kernel", "brain_bias")}
    numpys.build(others)
    for call in range(4):
        gradients = dict(zip(arrays, make_gradients(arrays, call), strict=True))
        apply(optimizer, gradients.values(), variables)
        numpys.apply([gradients[name] for name in others])
    places = [i for i, name in enumerate(arrays) if name in others]
    for i, name in zip(places, others, strict=True):
        for kind, expected in numpys.state[name].items():
            assert_same(as_stored(kept_by(optimizer, i)[kind]), expected, f"{kind} of {name}")
    assert kept_by(optimizer, 0).keys() <= {"gradient_accumulator"}
    if steps is None:
        np.testing.assert_array_equal(as_stored(variables[0]), gradients["kernel"])


def test_a_mark_that_is_set_after_building():
    twins = Twins(8, "remainder")
    twins.train(range(2))
    before = [as_stored(v) for v in kept_by(twins.ours, 0).values()]
    twins.variables[0].overwrite_with_gradient = True
    gradients = make_gradients(twins.arrays, 2)
    apply(twins.ours, gradients)
    np.testing.assert_array_equal(as_stored(twins.variables[0]), gradients[0])
    require_equal([as_stored(v) for v in kept_by(twins.ours, 0).values()], before)
    store = {}
    twins.ours.save_own_variables(store)
    twins.ours.load_own_variables(store)


@pytest.mark.parametrize("storage", [(8, "nearest"), (32, "stochastic"), (16, "remainder")])
def test_stateless_and_symbolic_steps_are_refused(storage):
    twins = Twins(*storage)
    twins.train(range(2))
    before = everything(twins.ours, twins.variables)
    gradients = [as_tensor(g) for g in make_gradients(twins.arrays, 2)]
    message = rf"stateless or symbolic .* state_bits {storage[0]} and weight_rounding '{storage[1]}"
    state, weights = ([v._value for v in kept] for kept in (twins.ours.variables, twins.variables))
    with pytest.raises(NotImplementedError, match=message):
        twins.ours.stateless_apply(state, gradients, weights)
    with keras.SymbolicScope(), pytest.raises(NotImplementedError, match=message):
        twins.ours.apply(gradients)
    require_equal(everything(twins.ours, twins.variables), before)


@every_storage
def test_averages_overwrite_weights_and_remainders_at_the_end(bits, rounding):
    twins = Twins(bits, rounding, use_ema=True, ema_momentum=0.7)
    twins.train(range(3))
    for i, kinds in enumerate(twins.numpys.state.values()):
        average = kept_by(twins.ours, i)["average"]
        ties = as_stored(average) * 0 + np.float32(1 + 2.0**-8)  # between two of bfloat16
        average.assign(np.where(as_stored(average) > 0, ties, as_stored(average)))
        kinds["average"][...] = as_stored(average)
    twins.ours.finalize_variable_values(twins.variables)
    twins.numpys.finalize_variable_values()
    twins.require_same()


def test_weights_swapped_with_averages_and_back_keep_their_remainders():
    twins = Twins(16, "remainder", use_ema=True)
    twins.train(range(3))
    weights = [as_stored(v) for v in twins.variables]
    remainders = [as_stored(v) for v in twins.ours._stored.remainders if v is not None]
    swap = keras.callbacks.SwapEMAWeights()
    swap._backend_swap_variables(twins.ours)
    assert not np.array_equal(as_stored(twins.variables[0]), weights[0])
    swap._backend_swap_variables(twins.ours)
    require_equal([as_stored(v) for v in twins.variables], weights)
    kept = [as_stored(v) for v in twins.ours._stored.remainders if v is not None]
    require_equal(kept, remainders)


# ---- Memory --------------------------------------------------------------------------------------


def in_another_order(tensor):
    axes = list(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def with_gaps(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


@every_storage
@pytest.mark.parametrize("move", [torch.clone, in_another_order, with_gaps])
@pytest.mark.parametrize("of", ["weights", "state", "all"])
def test_variables_whose_memory_moved_are_stepped_in_the_order_of_their_blocks(
    bits, rounding, move, of
):
    twins = Twins(bits, rounding, use_ema=True, ema_momentum=0.7)
    twins.train(range(2))
    state = twins.ours.variables[2:]
    for variable in {"weights": twins.variables, "state": state, "all": twins.variables + state}[
        of
    ]:
        tensor = variable._value
        moved = move(tensor.detach())
        variable._value = torch.nn.Parameter(moved, tensor.requires_grad)
    twins.train(range(2, 4))
    twins.require_same()
    # So they are where they are saved.
    store, expected = {}, {}
    twins.ours.save_own_variables(store)
    twins.numpys.save_own_variables(expected)
    for key in list(expected)[2:]:
        np.testing.assert_array_equal(np.asarray(store[key]), expected[key], key, strict=True)
    twins.ours.load_own_variables(store)
    twins.numpys.load_own_variables(expected)
    twins.require_same()


def test_state_is_in_the_memory_order_of_its_variable():
    twins = Twins(8, "remainder")
    i = list(twins.arrays).index("brain_kernel")
    kept = kept_by(twins.ours, i)
    assert twins.variables[i]._value.stride() == (1, 64, 192)
    for kind in ("momentum", "norm", "remainder"):
        assert kept[kind]._value.stride() == (1, 64, 192)
    twins.train(range(1))
    assert twins.ours._step.tensors._copies == []


def test_bytes_of_state():
    """Half as many, and a quarter, with a float32 for each 256 elements."""
    bytes_of = {}
    for bits in (32, 16, 8):
        optimizer = Adamax(state_bits=bits)
        optimizer.build([keras.Variable(np.zeros(shape, "f")) for shape in ((1000, 100), (4096,))])
        tensors = [v._value for v in optimizer.variables[2:]]
        bytes_of[bits] = sum(t.nbytes for t in tensors) / 104_096
    assert bytes_of[32] == 8
    assert 4 < bytes_of[16] < 4.001
    assert 2 < bytes_of[8] <= 2.02


# ---- Variables and settings ----------------------------------------------------------------------


def test_variables_are_named_after_those_of_keras():
    optimizer = Adamax(state_bits=8, weight_rounding="remainder", name="low")
    shapes = {"kernel": ((64, 65), "bfloat16"), "bias": ((65,), "bfloat16")}
    optimizer.build([keras.Variable(np.zeros(s), dtype=d, name=n) for n, (s, d) in shapes.items()])
    assert [(v.path, v.dtype, tuple(v.shape)) for v in optimizer.variables[2:]] == [
        ("low/kernel_momentum", "int8", (64, 65)),
        ("low/kernel_norm", "uint8", (64, 65)),
        ("low/bias_momentum", "float32", (65,)),
        ("low/bias_norm", "float32", (65,)),
        ("low/kernel_norm_scale", "float32", (17,)),
        ("low/kernel_remainder", "int16", (64, 65)),
        ("low/bias_remainder", "int16", (65,)),
    ]
    assert not any(v.trainable or as_stored(v).any() for v in optimizer.variables[2:])
    halves = Adamax(state_bits=16)
    halves.build([keras.Variable(np.zeros(3, "f"))])
    assert [v.dtype for v in halves.variables[2:]] == ["bfloat16", "bfloat16", "float32"]
    assert as_stored(halves.variables[-1]).tolist() == [1.0]


def test_defaults_add_nothing():
    ours, theirs = Adamax(name="adamax"), Theirs(name="adamax")
    for optimizer in (ours, theirs):
        optimizer.build([keras.Variable(np.zeros((64, 65), "f"), name="kernel")])
    described = [[(v.path, v.dtype, v.shape) for v in o.variables] for o in (ours, theirs)]
    assert described[0] == described[1]
    assert ours.get_config() == theirs.get_config()
    assert (ours.state_bits, ours.weight_rounding, ours.seed) == (32, "nearest", 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"state_bits": 8},
        {"weight_rounding": "stochastic", "seed": 2**64 - 1},
        {"state_bits": 16, "weight_rounding": "remainder"},
        {"seed": 3},
    ],
    ids=str,
)
def test_a_config_has_what_is_not_the_default(settings):
    optimizer = Adamax(0.02, **settings, name="adamax")
    config = optimizer.get_config()
    assert config == {**Theirs(0.02, name="adamax").get_config(), **settings}
    again = Adamax.from_config(dict(config))
    assert again.get_config() == config
    serialized = keras.optimizers.serialize(optimizer)
    assert keras.optimizers.deserialize(serialized).get_config() == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_bits": 4}, "state_bits must be 32, 16 or 8; received 4"),
        ({"state_bits": "8"}, "state_bits must be 32, 16 or 8; received '8'"),
        ({"weight_rounding": "up"}, "weight_rounding must be 'nearest', 'stochastic' or 'remai"),
        ({"seed": -1}, "seed must be an integer >= 0; received -1"),
        ({"seed": 0.5}, r"seed must be an integer >= 0; received 0\.5"),
    ],
    ids=str,
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match="^" + message):
        Adamax(**settings)


@pytest.mark.parametrize("name", ["state_bits", "weight_rounding", "seed"])
def test_settings_are_fixed(name):
    optimizer = Adamax()
    with pytest.raises(AttributeError, match=name):
        setattr(optimizer, name, 8)


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        ("float64", {"state_bits": 8}, "has dtype float64, whose state is float64; expected"),
        ("float64", {"state_bits": 16}, "has dtype float64, whose state is float64; expected"),
        (
            "float16",
            {"weight_rounding": "stochastic"},
            "has dtype float16, which weight_rounding 'stochastic' does not know; expected bfloat",
        ),
    ],
)
def test_variables_that_are_refused(dtype, settings, message):
    optimizer = Adamax(**settings)
    variables = [
        keras.Variable(np.ones(3), dtype=d, name=n) for d, n in (("float32", "a"), (dtype, "b"))
    ]
    with pytest.raises(TypeError, match=rf"^variables\[1\] \(variable 'b'\) {message}"):
        optimizer.build(variables)
    assert not optimizer.built
    assert len(optimizer.variables) == 2
    optimizer.build(variables[:1])


def test_betas_that_8_bits_cannot_have():
    twins = Twins(8, "nearest")
    twins.train(range(1))
    before = everything(twins.ours, twins.variables)
    twins.ours.beta_1 = 0.96
    with pytest.raises(ValueError, match=r"^beta_1 must be below beta_2 with state in 8 bits"):
        twins.ours.apply([as_tensor(g) for g in make_gradients(twins.arrays, 1)])
    require_equal(everything(twins.ours, twins.variables), before)


def test_epsilon_is_fixed_by_build():
    """What stands for the first moments in 8 bits is relative to it."""
    twins = Twins(8, "nearest")
    twins.train(range(1))
    before = everything(twins.ours, twins.variables)
    twins.ours.epsilon = 1.0
    with pytest.raises(ValueError, match=r"^epsilon cannot be assigned after build.*received 1\.0"):
        twins.ours.apply([as_tensor(g) for g in make_gradients(twins.arrays, 1)])
    require_equal(everything(twins.ours, twins.variables), before)


# ---- Models --------------------------------------------------------------------------------------


LOW = {"state_bits": 16, "weight_rounding": "remainder", "learning_rate": 0.02}


def train_policy(policy, **settings):
    keras.config.set_dtype_policy(policy)
    return fit(make_model(Adamax(**{**LOW, **settings})))


def test_fit_under_dtype_policies():
    """Of "mixed_bfloat16" the weights are float32, with nothing to round."""
    models = {policy: train_policy(policy) for policy in ("mixed_bfloat16", "bfloat16")}
    remainders = {p: m.optimizer._stored.remainders for p, m in models.items()}
    assert remainders["mixed_bfloat16"] == [None] * 4
    assert all(as_stored(r).any() for r in remainders["bfloat16"])
    for model in models.values():
        assert {v.dtype for v in model.optimizer._m} == {"bfloat16"}
        assert int(model.optimizer.iterations) == 8


def test_fit_where_floatx_is_bfloat16():
    """Of Keras the rate is, too; what belongs to codes is not."""
    keras.config.set_floatx("bfloat16")
    model = train_policy("bfloat16")
    assert model.optimizer._learning_rate.dtype == "bfloat16"
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    assert {v.dtype for v in model.optimizer._stored.norm_scales} == {"float32"}
    assert all(as_stored(r).any() for r in model.optimizer._stored.remainders)


def test_small_steps_are_not_lost():
    """A weight of 1 and steps of 1e-4: to nearest it stays; with its remainder it is as float32."""
    ends = {}
    for dtype, rounding in (
        ("float32", "nearest"),
        ("bfloat16", "nearest"),
        ("bfloat16", "remainder"),
    ):
        weight = keras.Variable(np.ones(300), dtype=dtype)
        optimizer = Adamax(1e-4, weight_rounding=rounding)
        for _ in range(200):
            optimizer.apply([torch.ones(300)], [weight])
        ends[dtype, rounding] = as_stored(weight)
    full = ends["float32", "nearest"]
    assert (full < 0.99).all()
    assert_same(ends["bfloat16", "nearest"], program.bf16_nearest(np.ones(300, "f")), "nearest")
    assert_same(ends["bfloat16", "remainder"], program.bf16_split(full)[0], "remainder")


@pytest.mark.filterwarnings("ignore")  # of Dynamo and Inductor
def test_fit_with_jit_compile(monkeypatch):
    results = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for compiled in (False, True):
        torch._dynamo.reset()
        keras.config.set_dtype_policy("bfloat16")
        model = fit(make_model(Adamax(**LOW), jit_compile=compiled))
        results.append(everything(model.optimizer, model.trainable_variables))
    require_equal(*results)

"""What saved arrays may be: of other libraries and dtypes; others are refused by name."""

import numpy as np
import pytest
from adamax_ext import Adamax
from data.saving_cases import TWO, Case, bits, refused, trained
from support.frameworks import load_keras, load_torch
from support.memory import DLPackOnly


def of_torch(dtype, **options):
    def convert(array):
        torch = load_torch()
        return torch.tensor(np.array(array), dtype=getattr(torch, dtype), **options)

    return convert


def of_jax(dtype):
    return lambda array: pytest.importorskip("jax.numpy").asarray(array, dtype)


def read_only(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


def with_gaps(array):
    wide = np.zeros((*array.shape, 2), array.dtype)
    wide[..., 0] = array
    return wide[..., 0]


def void(array):
    """Return bfloat16 as HDF5 does."""
    patterns = np.array(array, np.float32).view(np.uint32) >> 16
    return patterns.astype(np.uint16).view("V2")


FLOAT32 = {
    "NumPy": np.array,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "with gaps": with_gaps,
    "memoryview": lambda array: memoryview(np.array(array)),
    "DLPack": lambda array: DLPackOnly(np.array(array)),
    "torch": of_torch("float32"),
    "torch, requires grad": of_torch("float32", requires_grad=True),
    "torch, other strides": lambda array: of_torch("float32")(np.stack([array, array], -1))[..., 0],
    "jax": of_jax("float32"),
}
BFLOAT16 = {
    "void": void,
    "void with gaps": lambda array: with_gaps(void(array)),
    "torch bfloat16": of_torch("bfloat16"),
    "torch bfloat16, requires grad": of_torch("bfloat16", requires_grad=True),
}
CONVERTED = {  # in the layout of Keras
    "big-endian": lambda array: array.astype(">f4"),
    "float16": lambda array: array.astype(np.float16),
    "float64": lambda array: array.astype(np.float64),
    "list": lambda array: array.tolist(),
    "torch float64": of_torch("float64"),
    "torch float16": of_torch("float16"),
    "jax bfloat16": of_jax("bfloat16"),
}
EXACT = {n: np.arange(-1, 1 + np.prod(s, dtype=int))[1:-1].reshape(s) for n, (s, *_) in TWO.items()}


@pytest.mark.parametrize("convert", FLOAT32 | BFLOAT16 | CONVERTED)
@pytest.mark.parametrize("through", ["set_weights", "load_own_variables", "load_state_dict"])
def test_arrays_of_every_kind_load(through, convert):
    """All numbers here are exact in bfloat16."""
    weights, optimizer = trained(Case())
    to = (FLOAT32 | BFLOAT16 | CONVERTED)[convert]
    values = [to(EXACT[n].astype(np.float32) / 8) for n in optimizer.state for _ in range(2)]
    own = [np.array(5), np.float32(0.125)]
    if through == "set_weights":
        optimizer.set_weights(own + values)
    elif through == "load_own_variables":
        optimizer.load_own_variables({str(i): x for i, x in enumerate(own + values)})
    else:
        state_dict = {**optimizer.state_dict(), "calls": 5, "learning_rate": 0.125}
        places = [(n, kind) for n in optimizer.state for kind in ("momentum", "norm")]
        for (name, kind), value in zip(places, values, strict=True):
            state_dict["state"][name][kind] = value
        if convert in CONVERTED:
            match = r"momentum of 'kernel' must have shape \(3, 5\) and dtype float32; received "
            refused(optimizer, weights, ValueError, match, optimizer.load_state_dict, state_dict)
            return
        optimizer.load_state_dict(state_dict)
    assert (optimizer.calls, optimizer.learning_rate) == (5, 0.125)
    for name, kinds in optimizer.state.items():
        for array in kinds.values():
            assert bits(array) == bits(EXACT[name].astype(np.float32) / 8)
    optimizer.apply([np.ones_like(w) for w in weights.values()])


def deleted(array):
    array = of_jax("float32")(array)
    array.delete()
    return array


UNREADABLE = {
    "sparse": lambda array: of_torch("float32")(array).to_sparse(),
    "deleted": deleted,
    "an object": lambda array: object(),
    "text": lambda array: "norm",
    "None": lambda array: None,
    "ragged": lambda array: [[1.0], [1.0, 2.0]],
    "complex": lambda array: array.astype(complex),
    "void of one byte": lambda array: array.astype(np.int8).view("V1"),
}


@pytest.mark.parametrize("convert", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("through", ["set_weights", "load_own_variables", "load_state_dict"])
def test_what_is_no_array_of_numbers_is_refused_by_name(through, convert):
    weights, optimizer = trained(Case())
    bad, match = convert(EXACT["kernel"].astype(np.float32)), r"weights\[3\] must "
    state_dict, values = optimizer.state_dict(), [*map(np.array, optimizer.variables)]
    values[3] = state_dict["state"]["kernel"]["norm"] = bad
    if through == "load_state_dict":
        values, match = state_dict, "norm of 'kernel' must "
    elif through == "load_own_variables":
        values = {str(i): x for i, x in enumerate(values)}
    refused(optimizer, weights, ValueError, match, getattr(optimizer, through), values)


@pytest.mark.parametrize("through", ["set_weights", "load_state_dict"])
def test_a_norm_of_nan_or_minus_zero_is_kept(through):
    optimizer = trained(Case())[1]
    norm = np.full((3, 5), np.nan, np.float32)
    norm[0] = -0.0
    state_dict, values = optimizer.state_dict(), [*map(np.array, optimizer.variables)]
    values[3] = state_dict["state"]["kernel"]["norm"] = norm
    getattr(optimizer, through)(state_dict if through == "load_state_dict" else values)
    assert bits(optimizer.state["kernel"]["norm"]) == bits(norm)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
def test_hdf5_of_a_keras_model_in_bfloat16_loads(tmp_path):
    keras, h5py = load_keras(), pytest.importorskip("h5py", reason="needs h5py")
    layers = keras.layers.Input((3,)), keras.layers.Dense(5, dtype="bfloat16")
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adamax(0.125), "mse")
    theirs, variables = model.optimizer, model.trainable_variables
    theirs.build(variables)
    theirs.apply([keras.ops.convert_to_tensor(np.full(v.shape, 0.75), v.dtype) for v in variables])
    model.save_weights(tmp_path / "x.weights.h5")
    optimizer = trained(Case())[1]
    with h5py.File(tmp_path / "x.weights.h5") as file:
        assert file["optimizer/vars/2"].dtype == np.dtype("V2")
        optimizer.load_own_variables(file["optimizer/vars"])
    for array, variable in zip(optimizer.variables, theirs.variables, strict=True):
        expected = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
        np.testing.assert_array_equal(array, expected)
    assert optimizer.state["bias"]["norm"].tolist() == [0.75] * 5


def test_gradients_of_another_window_are_refused():
    """Keras' layout does not tell the accumulation count, but gradients where none can wait do."""
    saved, store = Adamax(gradient_accumulation_steps=4), {}
    saved.build([np.ones(3, np.float32)])
    for _ in range(10):
        saved.apply([np.ones(3, np.float32)])
    saved.save_own_variables(store)
    other = Adamax(gradient_accumulation_steps=2)
    other.build([np.ones(3, np.float32)])
    with pytest.raises(ValueError, match=r"^gradient_accumulator of 'variable_0' must be zero"):
        other.load_own_variables(store)
    state_dict = other.state_dict()
    state_dict["state"]["variable_0"]["gradient_accumulator"][...] = 5
    with pytest.raises(ValueError, match=r"^gradient_accumulator of 'variable_0' must be zero"):
        other.load_state_dict(state_dict)
    assert other.calls == 0

"""torch and JAX: their Adamax as a rule of ours, their tensors as memory like any other."""

import copy

import numpy as np
import pytest
from adamax_ext import Adamax, update
from support.bits import assert_same_bits, dtype_of, every_16_bit_dtype, every_pair

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")

STEPS = 100
SHAPES = [(7, 13), (13,), (3, 4, 5)]


def make_weights(dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(5)
    return [np.array(rng.normal(size=shape), dtype_of(dtype)) for shape in shapes]


def make_grads(call, dtype="float32", shapes=SHAPES):
    """Gradients of different size from call to call, now and then zero for one variable."""
    rng = np.random.default_rng(500 + call)
    size = 10 ** rng.uniform(-1.0, 0.5)
    return [
        np.array(rng.normal(size=shape) * size * (rng.random() > 0.1), dtype_of(dtype))
        for shape in shapes
    ]


def tensor_of(array):
    """A tensor with the bits, shape and memory order of `array`; bfloat16 is unknown to NumPy."""
    owned = array.copy(order="K")
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(owned)
    return torch.from_numpy(owned.view(np.int16)).view(torch.bfloat16)


def array_of(tensor):
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(dtype_of("bfloat16"))


# Each of a hundred steps rounds an element a few times, at most by half a unit in the last place
# (2^-24, 2^-53) of the largest; errors have either sign, so that the sum stays near ten units.
# In single elements of `m` terms cancel: what is compared is the largest element.
TOLERANCES = {"float32": 1e-6, "float64": 2e-15}
# Keywords of torch.optim.Adamax, with its names.
TORCH_SETTINGS = [
    {},
    {"lr": 0.02},
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.6, 0.9), "eps": 0.05},
    {"lr": 0.01, "betas": (0.0, 0.0), "eps": 0.5, "weight_decay": 1.0},
]


def in_our_words(settings):
    words = {"lr": "learning_rate", "eps": "epsilon", "weight_decay": "weight_decay"}
    ours = {words[key]: value for key, value in settings.items() if key != "betas"}
    ours["beta_1"], ours["beta_2"] = settings.get("betas", (0.9, 0.999))
    defaults = {"learning_rate": 2e-3, "epsilon": 1e-8}  # of torch
    return {**defaults, **ours, "decay": "l2", "epsilon_mode": "inside"}


def steps_of(weights, settings):
    """Yield weights, `m` and `u` after each step of `update`."""
    m, u = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for call in range(STEPS):
        grads = make_grads(call, weights[0].dtype.name)
        for arrays in zip(weights, grads, m, u, strict=True):
            update(*arrays, step=call + 1, **settings)
        yield weights, m, u


def require_close(actual, expected, dtype):
    for array, other in zip(actual, expected, strict=True):
        other = np.asarray(other)
        assert np.abs(array - other).max() <= TOLERANCES[dtype] * np.abs(other).max()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("settings", TORCH_SETTINGS, ids=str)
def test_the_rule_of_torch(settings, dtype, foreach):
    parameters = [torch.nn.Parameter(tensor_of(w)) for w in make_weights(dtype)]
    optimizer = torch.optim.Adamax(parameters, foreach=foreach, **settings)
    for call, (weights, m, u) in enumerate(steps_of(make_weights(dtype), in_our_words(settings))):
        for parameter, grad in zip(parameters, make_grads(call, dtype), strict=True):
            parameter.grad = torch.from_numpy(grad)
        optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        require_close(m, [state["exp_avg"] for state in states], dtype)
        require_close(u, [state["exp_inf"] for state in states], dtype)
        require_close(weights, [parameter.detach() for parameter in parameters], dtype)


@pytest.mark.parametrize("settings", TORCH_SETTINGS, ids=str)
def test_the_rule_of_optax(settings):
    jax = pytest.importorskip("jax", reason="needs jax")
    optax = pytest.importorskip("optax", reason="needs optax")
    ours = in_our_words(settings)
    betas = ours["beta_1"], ours["beta_2"]
    rule = optax.chain(
        optax.add_decayed_weights(settings.get("weight_decay", 0.0)),
        optax.adamax(ours["learning_rate"], *betas, ours["epsilon"]),
    )

    @jax.jit
    def step(grads, state, weights):
        updates, state = rule.update(grads, state, weights)
        return state, optax.apply_updates(weights, updates)

    theirs = make_weights()
    state = rule.init(theirs)
    for call, (weights, m, u) in enumerate(steps_of(make_weights(), ours)):
        state, theirs = step(make_grads(call), state, theirs)
        require_close(m, state[1][0].mu, "float32")
        require_close(u, state[1][0].nu, "float32")
        require_close(weights, theirs, "float32")


class DLPackOnly:
    """A tensor of a library without the exchange table."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **keywords):
        return self.tensor.__dlpack__(**keywords)


class OldDLPack(DLPackOnly):
    """Of a library from before DLPack 1.0: a capsule of the old kind, and no keywords."""

    def __dlpack__(self):
        return self.tensor.__dlpack__()


class Subclass(torch.Tensor):
    pass


KINDS = {
    "tensor": lambda tensor: tensor,
    "Parameter": torch.nn.Parameter,
    "that requires grad": lambda tensor: tensor.requires_grad_(),
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "DLPack": DLPackOnly,
    "old DLPack": OldDLPack,
}


def channels_last(array):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "transposed": lambda array: array.copy().T,
    "permuted": lambda array: channels_last(array.reshape(2, 3, 4, 5)),
}
SETTINGS = {"weight_decay": 0.1, "global_clipnorm": 3.0, "gradient_accumulation_steps": 2}


def require_same_run(arrays, tensors, make, grads_of, place=tensor_of):
    """Train `arrays` on the gradients, and `tensors` made by `make` on those placed in tensors."""
    reference, optimizer = (Adamax(0.02, use_ema=True, **SETTINGS) for _ in range(2))
    reference.build(arrays)
    optimizer.build([make(tensor) for tensor in tensors])
    for call in range(20):
        reference.apply(grads_of(call))
        optimizer.apply([make(place(grad)) for grad in grads_of(call)])
    for tensor, array in zip(tensors, arrays, strict=True):
        assert_same_bits(array_of(tensor), array, "weights")
    for ours, other in zip(optimizer.variables, reference.variables, strict=True):
        assert_same_bits(ours, other, "state")


@pytest.mark.parametrize("kind", KINDS)
@every_pair
def test_tensors_have_the_bits_of_arrays(param, grad, kind):
    arrays = make_weights(param)
    tensors = [tensor_of(array) for array in arrays]
    require_same_run(arrays, tensors, KINDS[kind], lambda call: make_grads(call, grad))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_16_bit_dtype
def test_tensors_in_any_memory_order(layout, kind, dtype):
    for name in ("float32", dtype):
        arrays = [LAYOUTS[layout](w) for w in make_weights(name, [(6, 20)])]
        tensors = [tensor_of(array) for array in arrays]
        assert tensors[0].stride() == tuple(s // arrays[0].itemsize for s in arrays[0].strides)

        def grads_of(call, name=name):
            return [LAYOUTS[layout](g) for g in make_grads(call, name, [(6, 20)])]

        require_same_run(arrays, tensors, KINDS[kind], grads_of)
        before = tensors[0].clone()
        grad = tensor_of(np.array(arrays[0], order="F" if layout == "C" else "C"))
        with pytest.raises(ValueError, match=r"grads\[0\] .*expected the layout of variables"):
            Adamax().apply([grad], tensors)
        assert torch.equal(tensors[0], before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1, 3, 17])
def test_views_with_a_storage_offset(offset, kind):
    def shifted(array):
        view = torch.full((array.size + offset + 9,), 7.0)[offset:-9].view(array.shape)
        return view.copy_(tensor_of(array))

    arrays = make_weights()
    tensors = [shifted(array) for array in arrays]
    require_same_run(arrays, tensors, KINDS[kind], make_grads, shifted)
    for tensor in tensors:
        whole = tensor.detach().as_strided((tensor.numel() + offset + 9,), (1,), 0)
        assert (whole[:offset] == 7).all()
        assert (whole[-9:] == 7).all()


def test_training_by_autograd():
    """As users write it: no `no_grad`, no `detach`, gradients that autograd made."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    x = torch.randn(64, 5)
    optimizer, reference = Adamax(0.02), Adamax(0.02)
    optimizer.build(dict(model.named_parameters()))
    reference.build([p.detach().numpy() for p in twin.parameters()])
    losses = []
    for _ in range(50):
        for one in (model, twin):
            one.zero_grad()
            loss = torch.nn.functional.mse_loss(one(x), x.sum(1, keepdim=True))
            loss.backward()
        losses.append(loss.item())
        optimizer.apply([p.grad for p in model.parameters()])
        reference.apply([p.grad.numpy() for p in twin.parameters()])
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert losses[-1] < 0.1 * losses[0]
    assert list(optimizer.state) == list(dict(model.named_parameters()))


def test_a_parameter_with_new_data_is_followed():
    first, second = make_weights(shapes=[(4, 6), (4, 6)])
    parameter = torch.nn.Parameter(tensor_of(first))
    old, new = parameter.data, tensor_of(second)
    optimizer, reference, weight = Adamax(0.1), Adamax(0.1), first.copy()
    optimizer.build([parameter])
    reference.build([weight])
    for call in range(6):
        if call == 3:
            frozen = old.clone()
            parameter.data = new
            weight[...] = second
        grad = make_grads(call, shapes=[(4, 6)])
        optimizer.apply([torch.from_numpy(g) for g in grad], [parameter])
        reference.apply(grad)
        assert_same_bits(parameter.detach().numpy(), weight, f"after call {call}")
    assert torch.equal(old, frozen)
    assert parameter.data_ptr() == new.data_ptr()


SWAPS = [
    (lambda _: torch.ones(5, 6), ValueError, "has 30 elements; expected the 24"),
    (lambda _: torch.ones(6, 4).t(), ValueError, "expected the layout of the variable at build"),
    (lambda _: torch.ones(4, 12)[:, ::2], ValueError, "expected the layout"),
    (lambda _: torch.ones(4, 6, dtype=torch.float64), TypeError, "was built with float32"),
    (lambda other: other.data, ValueError, "overlap"),
]


@pytest.mark.parametrize(("swap", "error", "message"), SWAPS)
def test_new_data_that_does_not_fit_is_refused(swap, error, message):
    parameter, other = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    optimizer = Adamax(0.1)
    optimizer.build([parameter, other])
    optimizer.apply([torch.ones(4, 6)] * 2)
    before = [other.data.clone(), *(a.copy() for a in optimizer.variables)]
    old, parameter.data = parameter.data, swap(other)
    with pytest.raises(error, match=message):
        optimizer.apply([torch.ones(4, 6)] * 2)
    assert torch.equal(other.data, before[0])
    for array, expected in zip(optimizer.variables, before[1:], strict=True):
        assert_same_bits(array, expected, "state")
    parameter.data = old
    assert optimizer.apply([torch.ones(4, 6)] * 2) == 2
    assert torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        # Which older versions of torch do not export.
        (torch.ones(4).to(torch.float8_e4m3fn), (TypeError, BufferError), "(dtype|float8)"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "has dtype"),
        (torch.ones(4, dtype=torch.float64), TypeError, "has dtype float64 but .* float32"),
    ],
)
def test_gradients_that_are_refused(grad, error, message):
    weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(error, match=rf"^grads\[0\] .*{message}"):
        Adamax().apply([grad], [weight])
    assert (weight == 1).all()


@every_pair
def test_gradients_of_jax(param, grad):
    jax = pytest.importorskip("jax", reason="needs jax")
    from support.jax_runs import x64

    weights, expected = make_weights(param), make_weights(param)
    with x64():
        place = jax.numpy.asarray
        require_same_run(expected, weights, lambda x: x, lambda call: make_grads(call, grad), place)


def test_a_parameter_of_jax_is_refused():
    """It claims to be writable, and other arrays may share its memory."""
    jax = pytest.importorskip("jax", reason="needs jax")
    parameter, grad = jax.numpy.ones(3), np.ones(3, np.float32)
    optimizer = Adamax()
    with pytest.raises(BufferError, match=r"^variables\[0\] .*is read-only .*immutable"):
        optimizer.build([parameter])
    with pytest.raises(BufferError, match=r"^variables\[0\] .*is read-only .*immutable"):
        optimizer.apply([grad], [parameter])
    assert not optimizer.built
    for role in range(3):
        param, m, u = (parameter if i == role else np.ones(3, np.float32) for i in range(3))
        with pytest.raises(BufferError, match=f"^{('param', 'm', 'u')[role]} is read-only"):
            update(param, grad, m, u, step=1)
    assert (np.asarray(parameter) == 1).all()

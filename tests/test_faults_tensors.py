"""Tensors that autograd watches see what is written; tensors without plain memory are named."""

import warnings

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer
from support.frameworks import load_torch
from support.memory import SHAPE, jax_array, torch_alias, values
from support.processes import in_own_process

# ---- Tensors that autograd watches ---------------------------------------------------------------


def parameter(value=2.0):
    torch = load_torch()
    return torch.nn.Parameter(torch.full((3,), value))


def one():
    return parameter(1.0).detach()


def optimizer_on(*variables, calls=0, make=Adamax, **settings):
    optimizer = make(**settings)
    optimizer.build(variables)
    for _ in range(calls):
        optimizer.apply([one() for _ in variables])
    return optimizer


def loss_scale_on(w):
    return optimizer_on(w, make=lambda: LossScaleOptimizer(Adamax()))


def refuse(w):
    with pytest.raises(ValueError, match="has 4 elements"):
        optimizer_on(w, one()).apply([one(), np.ones(4, np.float32)])


def update(param, grad, m, u, average):
    adamax_ext.update(param, grad, m, u, step=2, average=average)


TWICE = {"gradient_accumulation_steps": 2}
OVERWRITTEN = {"use_ema": True, "ema_overwrite_frequency": 4, "calls": 3}
# What is called, with what: calls that write to a tensor, and calls that do not.
WRITES = {
    "apply": lambda w: (optimizer_on(w).apply, [one()]),
    "apply to its data": lambda w: (optimizer_on(w.detach()).apply, [one()]),
    "apply with variables": lambda w: (Adamax().apply, [one()], [w]),
    "None in the last": lambda w: (optimizer_on(one(), w, calls=1, **TWICE).apply, [one(), None]),
    "None, overwritten": lambda w: (optimizer_on(one(), w, **OVERWRITTEN).apply, [one(), None]),
    "loss scale": lambda w: (loss_scale_on(w).apply, [one()]),
    "finalize": lambda w: (optimizer_on(w, calls=2, use_ema=True).finalize_variable_values,),
    "finalize it": lambda w: (optimizer_on(w, calls=2, use_ema=True).finalize_variable_values, [w]),
    **{
        f"update, argument {i}": lambda w, i=i: (
            update,
            *(w if i == j else one() for j in range(5)),
        )
        for i in (0, 2, 3, 4)
    },
}
NO_WRITES = {
    "accumulate": lambda w: (optimizer_on(w, **TWICE).apply, [one()]),
    "None": lambda w: (optimizer_on(one(), w, use_ema=True).apply, [one(), None]),
    "not finite": lambda w: (loss_scale_on(w).apply, [one() / 0]),
    "refused": lambda w: (refuse, w),
    "nothing to finalize": lambda w: (optimizer_on(w, use_ema=True).finalize_variable_values,),
    "finalize another": lambda w: (
        *(optimizer_on(w, other := one(), calls=2, use_ema=True).finalize_variable_values, [other]),
    ),
    "its gradient": lambda w: (optimizer_on(one()).apply, [w]),
    "norm": lambda w: (adamax_ext.global_norm, [w]),
}


@pytest.mark.filterwarnings("ignore:no gradient for")
@pytest.mark.parametrize("prepare", WRITES.values(), ids=WRITES)
def test_autograd_sees_a_write(prepare):
    w = parameter()
    write, *arguments = prepare(w)
    loss, before = (w**3).sum(), w.tolist()
    write(*arguments)
    assert w.tolist() != before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:no gradient for")
@pytest.mark.parametrize("prepare", NO_WRITES.values(), ids=NO_WRITES)
def test_autograd_goes_on_where_nothing_was_written(prepare):
    w = parameter()
    call, *arguments = prepare(w)
    loss, before = (w**3).sum(), w.tolist()
    call(*arguments)
    assert w.tolist() == before
    loss.backward()
    assert w.grad.tolist() == pytest.approx([3 * value**2 for value in before])


def test_tensors_of_inference_have_no_version():
    torch = load_torch()
    w, twin = parameter(), parameter()
    with torch.inference_mode():
        lonely = one() * 2
    loss = (w**3).sum()
    optimizer_on(lonely, w, lonely.clone(), calls=1)
    optimizer_on(twin, calls=1)
    assert lonely.tolist() == w.tolist() == twin.tolist()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        update(*(lonely.clone() for _ in range(5)))


# ---- Tensors without plain memory ----------------------------------------------------------------


def sparse(layout, *arguments):
    def make():
        tensor = load_torch().ones(SHAPE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a beta
            return getattr(tensor, f"to_sparse{layout}")(*arguments)

    return make


def masked():
    torch = load_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.masked.masked_tensor(torch.ones(SHAPE), torch.ones(SHAPE) > 0)


def wrapper():
    torch = load_torch()

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise TypeError(f"{function} finds no memory here")  # as of a tensor without any

    return torch.Tensor._make_wrapper_subclass(Wrapper, SHAPE)


def fake():
    load_torch()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return mode.from_tensor(torch_alias(values(0)))


def jagged():
    torch = load_torch()
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def deleted():
    array = jax_array(values(0))
    array.delete()
    return array


SPARSE = r"sparse.*to_dense\(\)"
STRANGE = {
    "COO": (sparse(""), (TypeError, ValueError), SPARSE),
    "CSR": (sparse("_csr"), (TypeError, ValueError), SPARSE),
    "CSC": (sparse("_csc"), (TypeError, ValueError), SPARSE),
    "BSR": (sparse("_bsr", (2, 3)), (TypeError, ValueError), SPARSE),
    "MaskedTensor": (masked, (TypeError, ValueError), "MaskedTensor"),
    "Wrapper": (wrapper, (TypeError, ValueError, BufferError), "Wrapper"),
    "FakeTensor": (fake, (TypeError, ValueError, BufferError), "FakeTensor"),
    "NestedTensor": (jagged, (TypeError, ValueError, BufferError), "NestedTensor"),
    "JAX, deleted": (deleted, BufferError, "deleted"),
}


def require_refusal(tensor, error, message):
    w = values(0)
    optimizer, before = optimizer_on(w), w.tobytes()
    calls = {
        r"grads\[0\] \(variable 'variable_0'\)": lambda: optimizer.apply([tensor]),
        r"buffers\[0\]": lambda: adamax_ext.global_norm([tensor]),
        "grad": lambda: update(w, tensor, w + 1, w + 1, None),
    }
    if "jax" not in type(tensor).__module__:  # is refused as a variable anyway
        calls |= {
            r"variables\[0\]": lambda: Adamax().build([tensor]),
            "m": lambda: update(w, w + 1, tensor, w + 1, None),
        }
    for label, call in calls.items():
        with pytest.raises(error, match=f"^{label} .*{message}"):
            call()
    assert (w.tobytes(), optimizer.calls) == (before, 0)


@pytest.mark.parametrize(("make", "error", "message"), STRANGE.values(), ids=STRANGE)
def test_tensors_without_plain_memory_are_named(make, error, message):
    require_refusal(make(), error, message)


def use_distributed_tensor():
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = DeviceMesh("cpu", [0, 1])
    tensor = DTensor.from_local(torch.ones(SHAPE), mesh, [Replicate()])
    require_refusal(tensor, (TypeError, ValueError), r"DTensor.*to_local\(\)")
    assert Adamax().apply([tensor.to_local()], [values(0)]) == 1


def test_a_distributed_tensor_is_named():
    pytest.importorskip("torch.distributed.tensor", reason="needs a torch with distributed tensors")
    in_own_process(use_distributed_tensor)


def test_subclasses_with_plain_memory_are_tensors():
    torch = load_torch()

    class Plain(torch.Tensor):
        pass

    expected, w = parameter(), parameter().detach().as_subclass(Plain)
    optimizer_on(expected, calls=1)
    optimizer_on(w, calls=1)
    assert w.tolist() == expected.tolist()


def test_a_parameter_that_became_a_negated_view_is_refused():
    torch = load_torch()
    weights = torch.ones(1)
    optimizer = Adamax()
    optimizer.build([weights])
    optimizer.apply([torch.ones(1)])
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    weights.data = negated
    with pytest.raises(ValueError, match=r"^variables\[0\] .* is a negated view"):
        optimizer.apply([torch.ones(1)])
    assert (optimizer.calls, weights.item()) == (1, -2)
    weights.data = torch.ones(1)
    assert optimizer.apply([torch.ones(1)]) == 2

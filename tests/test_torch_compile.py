"""torch.compile of a step, and of a function that does one: the same numbers, hooks included."""

import pytest
from support.torch_runs import (
    Adamax,
    assert_near,
    assert_same_training,
    every_class,
    feed,
    gradients,
    parameter,
    params_of,
    random,
    torch,
)

every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(kind, **settings):
    params = [parameter(4, 3), parameter(4, seed=1), parameter(2, seed=2, dtype=torch.bfloat16)]
    return kind([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], **settings), params


def require_same_training(kind, compiled, tolerance=0.0):
    """`compiled` makes a function of an optimizer that does a step."""
    optimizer, params = make(kind)
    reference, others = make(kind)
    step = compiled(optimizer)
    for call in range(6):
        grads = gradients(call, params)
        if call == 3:
            grads[1] = None
        if call == 4:
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.3
        feed(params, grads)
        feed(others, grads)
        step()
        reference.step()
        assert_same_training(optimizer, reference, f"after call {call}", tolerance)
    return optimizer


@every_class
@every_backend
def test_a_compiled_step(kind, backend):
    require_same_training(kind, lambda optimizer: torch.compile(optimizer.step, backend=backend))


@every_class
@every_backend
def test_a_compiled_function_that_does_a_step(kind, backend):
    def compiled(optimizer):
        @torch.compile(backend=backend)
        def step():
            optimizer.step()

        return step

    require_same_training(kind, compiled)


@every_class
@every_backend
def test_hooks_of_a_compiled_step(kind, backend):
    ran = []

    def compiled(optimizer):
        optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
        optimizer.register_step_post_hook(lambda *_: ran.append("after"))
        return torch.compile(optimizer.step, backend=backend)

    require_same_training(kind, compiled)
    assert ran == ["before", "after"] * 6


@every_backend
def test_a_compiled_step_with_a_schedule(backend):
    """A scheduler replaces `step` on the instance."""
    runs = []
    for is_compiled in (True, False):
        optimizer, params = make(Adamax)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        step = torch.compile(optimizer.step, backend=backend) if is_compiled else optimizer.step
        for call in range(8):
            feed(params, gradients(call, params))
            step()
            scheduler.step()
        runs.append(optimizer)
    assert_same_training(*runs)


def training(optimizer, model):
    def step(inputs):
        optimizer.zero_grad()
        loss = (model(inputs).squeeze(1) - inputs.sum(1)).pow(2).mean()
        loss.backward()
        loss = loss.detach()
        optimizer.step()
        return loss

    return step


# torch's own: a graph that begins behind `backward` looks at the loss; inductor uses TorchScript.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_training_step(backend):
    """Forward, backward and step in one function; "inductor" needs a C++ compiler."""
    runs = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = Adamax(model.parameters(), lr=0.02)
        step = training(optimizer, model)
        step = torch.compile(step, backend=backend) if compiled else step
        losses = [step(random(16, 6, seed=call)).item() for call in range(12)]
        assert losses[-1] < losses[0]
        runs.append(optimizer)
    for one, other in zip(*map(params_of, runs), strict=True):
        assert_near(one, other, 2e-5)
    assert all(state["step"] == 12 for state in runs[0].state.values())

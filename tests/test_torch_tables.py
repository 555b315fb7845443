"""torch's own tables for Adamax, run on our classes: wrong arguments, directions, no-ops, numbers.

The tables are those of torch.testing._internal.common_optimizers. Of the checks that torch's
test_optim.py applies to Adamax, these are here: errors; goes_right_direction (contiguous or not,
with schedulers or not, maximized), param_group_with_lrscheduler, tensor_lr, complex, complex_2d,
foreach_matches_forloop, mixed_device_dtype (dtypes), set_default_dtype_works_with_foreach,
param_groups_weight_decay and _lr, step_is_noop (no gradients, zero gradients),
optimizer_can_be_printed, non_empty_state. Those of errors and no-ops are in
test_torch_tables_arguments.py, of state dicts in ..._saving.py, of hooks in ..._hooks.py. Not here:
what needs a GPU (multigpu, cpu_load_state_dict, state_dict_with_cuda_params, foreach_large_tensor,
peak_memory_foreach, which reads the counters of CUDA's allocator), fused and sparse (torch's Adamax
has neither), differentiable (refused), and defaults_changed_to_foreach, which replaces a function
of torch's implementation.
"""

import pytest
from support.torch_runs import (
    assert_same,
    assert_same_training,
    every_class,
    feed,
    gradients,
    leaf,
    loss_of,
    parameter,
    random,
    states_of,
    torch,
)
from support.torch_tables import CONFIGS, SCHEDULERS, every_config, fresh

STEPS = 20


def lie_apart(tensor):
    """Its values at every other place of memory."""
    return leaf(torch.stack([tensor, tensor], dim=-1)[..., 0])


def linear(place=torch.nn.Parameter):
    return place(random(10, 5, seed=1)), place(random(10, seed=2)), random(5, seed=3)


def step_scheduler(scheduler, loss):
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss.detach())
    else:
        scheduler.step()


def require_direction(before, after, config):
    assert (after > before) if config.get("maximize") else (after < before)


@every_config
@pytest.mark.parametrize("schedulers", [[], *SCHEDULERS])
@pytest.mark.parametrize("place", [torch.nn.Parameter, lie_apart])
def test_goes_in_the_right_direction(kind, config, schedulers, place):
    config = fresh(config)
    weight, bias, inputs = linear(place)
    optimizer = kind([weight, bias], **config)
    schedulers = [make(optimizer) for make in schedulers]
    closure = loss_of(optimizer, weight, bias, inputs)
    before = closure().item()
    for _ in range(STEPS):
        loss = closure()
        optimizer.step()
        for scheduler in schedulers:
            step_scheduler(scheduler, loss)
    require_direction(before, closure().item(), config)


@every_class
@pytest.mark.parametrize("schedulers", SCHEDULERS)
def test_groups_with_schedulers_go_down(kind, schedulers):
    weight, bias, inputs = linear()
    optimizer = kind([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
    schedulers = [make(optimizer) for make in schedulers]
    closure = loss_of(optimizer, weight, bias, inputs)
    before = closure().item()
    for _ in range(STEPS):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            step_scheduler(scheduler, loss)
    assert closure().item() < before


@every_config
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_rate_may_be_a_tensor(kind, config, shape):
    trained = []
    for rate in (0.0078125, torch.full(shape, 0.0078125)):  # a float32
        weight, bias, inputs = linear()
        optimizer = kind([weight, bias], **{**fresh(config), "lr": rate})
        closure = loss_of(optimizer, weight, bias, inputs)
        for _ in range(STEPS):
            optimizer.step(closure)
        trained.append(optimizer)
    assert_same_training(*trained)


@every_config
def test_complex_parameters_are_pairs_of_real_ones(kind, config):
    kinds = [torch.complex64, torch.complex64, torch.float32]
    mixed = [parameter(10, 5, dtype=dtype, seed=i) for i, dtype in enumerate(kinds)]
    real = [torch.nn.Parameter(as_real(p.detach()).clone()) for p in mixed]
    ours, pairs = kind(mixed, **fresh(config)), kind(real, **fresh(config))
    for call in range(5):
        grads = gradients(call, mixed)
        feed(mixed, grads)
        feed(real, [as_real(grad) for grad in grads])
        ours.step()
        pairs.step()
        for one, other in zip(mixed, real, strict=True):
            assert_same(as_real(one), other, f"parameters of call {call}")
            for key in ("step", "exp_avg", "exp_inf"):
                assert_same(as_real(ours.state[one][key]), pairs.state[other][key], key)


def as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@every_config
def test_complex_parameters_on_a_curved_loss(kind, config):
    """Real and imaginary parts of a parameter beside two real parameters."""

    def curved(z):
        x, y = z
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()

    whole = parameter(2, dtype=torch.complex64)
    parts = [torch.nn.Parameter(part.detach().clone()) for part in (whole.real, whole.imag)]
    ours, twin = kind([whole], **fresh(config)), kind(parts, **fresh(config))
    for _ in range(10):
        ours.zero_grad()
        twin.zero_grad()
        curved(whole).backward()
        curved(torch.complex(*parts)).backward()
        feed(parts, [whole.grad.real.clone(), whole.grad.imag.clone()])
        ours.step()
        twin.step()
        assert_same(whole.real, parts[0])
        assert_same(whole.imag, parts[1])


@every_class
@pytest.mark.parametrize("config", [config.kwargs for config in CONFIGS])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64, torch.float16])
def test_foreach_changes_nothing(kind, config, default_dtype):
    """A layer that is frozen for a while, a step without gradients, a 0-d parameter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        trained = [train_frozen(kind, {**fresh(config), "foreach": f}) for f in (False, True)]
    finally:
        torch.set_default_dtype(before)
    assert_same_training(*trained)
    is_double = default_dtype == torch.float64
    for state in states_of(trained[0]):
        assert state["step"].dtype == (torch.float64 if is_double else torch.float32)
    assert [state["step"].item() for state in states_of(trained[0])] == [6, 6, 4, 4, 6]


def train_frozen(kind, config):
    torch.manual_seed(1)
    layers = torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    model = torch.nn.Sequential(*layers).double()
    scalar = parameter(dtype=torch.float64)
    optimizer = kind([*model.parameters(), scalar], **config)
    for call in range(7):
        optimizer.zero_grad()
        model[2].requires_grad_(call not in (3, 4))
        if call != 2:
            loss = model(random(4, 2, dtype=torch.float64, seed=call)).sum() + scalar * call
            loss.backward()
        optimizer.step()
    return optimizer


@every_class
@pytest.mark.parametrize("config", [config.kwargs for config in CONFIGS])
def test_dtypes_in_one_group_are_those_in_groups_of_their_own(kind, config):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
    trained = []
    for is_one_group in (True, False):
        params = [parameter(2, 3, dtype=dtype) for dtype in dtypes]
        optimizers = [
            kind(group, **fresh(config)) for group in ([params] if is_one_group else zip(params))
        ]
        for call in range(7):
            feed(params, gradients(call, params))
            for optimizer in optimizers:
                optimizer.step()
        trained.append([*params, *(s for o in optimizers for s in states_of(o))])
    for one, other in zip(*trained, strict=True):
        if isinstance(one, dict):
            for key in one:
                assert_same(one[key], other[key], key)
        else:
            assert_same(one, other, f"parameter of {one.dtype}")


@every_config
def test_decay_of_a_group_leaves_the_other_alone(kind, config):
    weight, bias, inputs = linear()
    groups = [
        {"params": [weight], **fresh(config)},
        {"params": [bias], **fresh(config), "weight_decay": 0.0},
    ]
    optimizer = kind(groups)
    closure = loss_of(optimizer, weight, bias, inputs)
    before = closure().item()
    for _ in range(STEPS):
        optimizer.step(closure)
    require_direction(before, closure().item(), config)


@every_config
def test_a_group_has_a_rate_of_its_own(kind, config):
    weight, bias, inputs = linear()
    irrelevant = parameter(2)
    untouched = irrelevant.detach().clone()
    groups = [{"params": [weight, bias], "lr": 1e-3, **fresh(config)}, {"params": [irrelevant]}]
    optimizer = kind(groups, lr=1e-28)
    closure = loss_of(optimizer, weight, bias, inputs)
    before = closure().item()
    for _ in range(STEPS):
        closure()
        irrelevant.grad = random(2)
        optimizer.step()
    require_direction(before, closure().item(), config)
    assert_same(irrelevant, untouched)

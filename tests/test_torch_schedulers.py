"""Schedulers, averages, loss scaling, clipping and steps in backward, beside torch's class."""

import inspect
import pickle

import pytest
from support.torch_runs import (
    Adamax,
    AdamaxW,
    assert_near,
    assert_same_training,
    every_class,
    feed,
    gradients,
    parameter,
    random,
    through_a_file,
    torch,
    train,
)
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

# What SequentialLR itself does before torch 2.9.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

STEPS = 30
LOOP = 2e-5  # of a training loop, whose gradients see the differences


def of_several(optimizer):
    parts = [
        schedulers.LinearLR(optimizer, 0.1, total_iters=5),
        schedulers.ExponentialLR(optimizer, 0.8),
        schedulers.ConstantLR(optimizer, 0.5, total_iters=4),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[6, 15])


def of_two(optimizer):
    parts = [schedulers.ConstantLR(optimizer, 0.1, 4), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.ChainedScheduler(parts, optimizer=optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 7, gamma=0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 11], gamma=0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.2, total_iters=9),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=12),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": of_several,
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 20, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "ChainedScheduler": of_two,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 0.1, 4, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "SWALR": lambda o: SWALR(o, swa_lr=0.2, anneal_epochs=6),
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def make_optimizer(kind, is_tensor=False):
    params = [parameter(3, 4), parameter(4, seed=1)]
    rate = torch.tensor(0.05) if is_tensor else 0.05
    return kind([{"params": params[:1]}, {"params": params[1:], "lr": rate / 2}], lr=rate), params


def schedule(scheduler, call):
    loss = [abs(call - 9.0)] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []
    scheduler.step(*loss)


def test_no_scheduler_of_torch_is_left_out():
    found = {
        name
        for name, value in vars(schedulers).items()
        if inspect.isclass(value)
        and issubclass(value, schedulers.LRScheduler)
        and value.__module__ == schedulers.__name__
    }
    assert found - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@every_scheduler
@pytest.mark.parametrize("is_tensor", [False, True])
def test_a_schedule_is_followed(name, is_tensor):
    (ours, params), (theirs, others) = (
        make_optimizer(kind, is_tensor) for kind in (Adamax, torch.optim.Adamax)
    )
    ours_of, theirs_of = SCHEDULERS[name](ours), SCHEDULERS[name](theirs)
    seen = set()
    for call in range(STEPS):
        train(ours, params, [call])
        train(theirs, others, [call])
        assert_same_training(ours, theirs, f"after call {call}", 2e-7)
        schedule(ours_of, call)
        schedule(theirs_of, call)
        for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert (one["lr"], one["betas"]) == (other["lr"], other["betas"])
        seen.add((float(ours.param_groups[0]["lr"]), ours.param_groups[0]["betas"]))
    assert len(seen) > 1
    cycles_betas = name in ("CyclicLR", "OneCycleLR")
    assert (len({betas for _, betas in seen}) > 1) == cycles_betas


@every_scheduler
def test_a_schedule_goes_on_from_a_checkpoint(name):
    first, params = make_optimizer(AdamaxW)
    schedule_of = SCHEDULERS[name](first)
    for call in range(10):
        train(first, params, [call])
        schedule(schedule_of, call)
    second, others = make_optimizer(AdamaxW)
    other_schedule = SCHEDULERS[name](second)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    saved = [first.state_dict(), schedule_of.state_dict()]
    optimizer_state, schedule_state = through_a_file(saved, weights_only=False)
    other_schedule.load_state_dict(schedule_state)
    second.load_state_dict(optimizer_state)
    for call in range(10, 20):
        train(first, params, [call])
        train(second, others, [call])
        assert_same_training(second, first, f"after call {call}")
        schedule(schedule_of, call)
        schedule(other_schedule, call)


def test_numbers_for_a_gpu_are_not_read_where_the_host_counts():
    optimizer, params = make_optimizer(Adamax)
    twin, others = make_optimizer(Adamax)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    train(optimizer, params, range(3))
    train(twin, others, range(3))
    assert_same_training(optimizer, twin)


@every_class
def test_a_scheduler_notices_that_it_is_called_before_the_step(kind):
    optimizer, params = make_optimizer(kind)
    feed(params, gradients(0, params))
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)` before"):
        scheduler.step()


@every_class
def test_an_optimizer_with_a_schedule_is_pickled(kind):
    optimizer, params = make_optimizer(kind)
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    train(optimizer, params, range(3), after=lambda _: scheduler.step())
    twin = pickle.loads(pickle.dumps(optimizer))
    train(optimizer, params, [3])
    train(twin, [p for group in twin.param_groups for p in group["params"]], [3])
    assert_same_training(twin, optimizer)


def make_model():
    torch.manual_seed(0)
    first = torch.nn.Linear(6, 8, bias=False)  # its gradient would be nothing but rounding
    return torch.nn.Sequential(
        first, torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )


def train_model(kind, after_backward=lambda model, call: None, steps=STEPS, **settings):
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.02, **settings)
    losses = []
    for call in range(steps):
        inputs = random(16, 6, seed=call)
        optimizer.zero_grad()
        loss = (model(inputs).squeeze(1) - inputs.sum(1)).pow(2).mean()
        loss.backward()
        after_backward(model, call)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    return optimizer, model


CLIPS = {
    "norm": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3),
    "norm, one by one": lambda model: torch.nn.utils.clip_grad_norm_(
        model.parameters(), 0.3, norm_type=float("inf"), foreach=False
    ),
    "value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.05),
}


@pytest.mark.parametrize("clip", CLIPS)
def test_clipped_gradients(clip):
    runs = [
        train_model(kind, after_backward=lambda model, _: CLIPS[clip](model))[0]
        for kind in (Adamax, torch.optim.Adamax)
    ]
    assert_same_training(*runs, tolerance=LOOP)


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_averaged_models(average):
    averages = []
    for kind in (Adamax, torch.optim.Adamax):
        averaged = AveragedModel(make_model(), **average)
        train_model(kind, after_backward=lambda model, _, to=averaged: to.update_parameters(model))
        update_bn([random(16, 6, seed=call) for call in range(3)], averaged)
        averages.append(averaged)
    assert averages[0].n_averaged == STEPS
    for one, other in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert_near(one, other, LOOP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grad_scaler_and_autocast_on_the_cpu(dtype):
    """Steps with infinite gradients are left out; the scale falls and rises."""

    def run(kind):
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)
        scales = []
        for call in range(STEPS):
            inputs = random(16, 6, seed=call)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = (model(inputs).squeeze(1) - inputs.sum(1)).pow(2).mean()
            scaler.scale(loss).backward()
            if call % 7 == 3:
                model[0].weight.grad[0, 0] = float("inf")
            if call % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return optimizer, scales

    (ours, scales), (theirs, expected) = run(Adamax), run(torch.optim.Adamax)
    assert scales == expected
    assert set(scales) == {128.0, 256.0}
    counts = {state["step"].item() for state in ours.state.values()}
    assert counts == {STEPS - len(range(3, STEPS, 7))}
    assert_same_training(ours, theirs, tolerance=1e-2)  # of 16 bits


def test_an_optimizer_for_each_parameter_that_steps_in_backward():
    """So that gradients need not be kept; the numbers are those of one optimizer."""

    def run_in_backward(kind):
        model = make_model()
        optimizers = {param: kind([param], lr=0.02) for param in model.parameters()}

        def step(param):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(step)
        for call in range(STEPS):
            inputs = random(16, 6, seed=call)
            (model(inputs).squeeze(1) - inputs.sum(1)).pow(2).mean().backward()
            assert all(param.grad is None for param in model.parameters())
        return list(model.parameters())

    in_backward = run_in_backward(Adamax)
    _, model = train_model(Adamax)
    for one, other in zip(in_backward, model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(in_backward, run_in_backward(torch.optim.Adamax), strict=True):
        assert_near(one, other, LOOP)

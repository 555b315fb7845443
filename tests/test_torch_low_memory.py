"""torch: state in 16 and 8 bits, rounding of bfloat16 weights, bit for bit like the program."""

import collections
import copy
import itertools
import math
import pickle

import adamax_ext
import numpy as np
import pytest
from support.torch_low_memory import (
    BF16,
    F16,
    F32,
    SETTINGS,
    STORAGES,
    Variable,
    bytes_of,
    require_same,
)
from support.torch_runs import (
    Adamax,
    AdamaxW,
    Snapshot,
    assert_same,
    clones,
    every_class,
    feed,
    gradients,
    leaf,
    parameter,
    params_of,
    random,
    states_of,
    through_a_file,
    torch,
    train,
)

OPTIONS = ("state_bits", "weight_rounding", "seed")
every_storage = pytest.mark.parametrize(("dtype", "bits", "rounding"), STORAGES)
# A short last block, the least that is in 8 bits and one less, several, no axis, nothing.
SHAPES = [(61, 83), (4096,), (45, 91), (3, 5), (), (0,)]


def parameters(dtype, shapes=SHAPES):
    return [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def some_gradients(call, params):
    """Those of a call; each parameter lacks one now and then."""
    return [None if (call + i) % 4 == 1 else grad for i, grad in enumerate(gradients(call, params))]


def train_with_gaps(optimizer, params, calls):
    for call in calls:
        feed(params, some_gradients(call, params))
        optimizer.step()


def require_same_states(one, other):
    """Require two optimizers with the same bits in parameters and state."""
    for a, b in zip(params_of(one), params_of(other), strict=True):
        assert_same(a, b, "parameter")
    for a, b in zip(states_of(one), states_of(other), strict=True):
        assert (a is None) == (b is None)
        assert list(a or ()) == list(b or ())
        for key in a or ():
            assert_same(a[key], b[key], key)


# ---- Bits ---------------------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("changes", [{}, {"decoupled": True, "maximize": True}], ids=str)
def test_every_storage_equals_the_program(dtype, bits, rounding, changes):
    params = parameters(dtype)
    kind = AdamaxW if changes else Adamax
    options = {"state_bits": bits, "weight_rounding": rounding, "seed": 2**63 + 5}
    optimizer = kind(params, **SETTINGS, **options, maximize=bool(changes))
    program = [Variable(p, i, bits, rounding, 2**63 + 5) for i, p in enumerate(params)]
    for call in range(7):
        grads = some_gradients(call, params)
        feed(params, grads)
        optimizer.step()
        for variable, param, grad in zip(program, params, grads, strict=True):
            if grad is not None:
                variable.step(grad, **SETTINGS, **changes)
            if variable.steps:
                state, label = optimizer.state[param], f"{tuple(param.shape)} after call {call}"
                require_same(param, state, variable.expected(), label)


@every_storage
def test_groups_with_options_of_their_own(dtype, bits, rounding):
    """Numbers go through all groups, also those whose parameters never have a gradient."""
    params = parameters(dtype, [(70, 60), (9,), (70, 60), (4500,)])
    params[1].requires_grad_(False)
    own = {"state_bits": bits, "weight_rounding": rounding}
    groups = [
        {"params": params[:2], **own, "seed": 3, "lr": 0.01},
        {"params": params[2:3], "betas": (0.7, 0.9)},
        {"params": params[3:], "state_bits": 16, "seed": 4},
    ]
    optimizer = Adamax(groups, **SETTINGS)
    wanted = [(bits, rounding, 3), None, (32, "nearest", 0), (16, "nearest", 4)]
    program = [
        w and Variable(p, i, *w) for i, (p, w) in enumerate(zip(params, wanted, strict=True))
    ]
    of_group = [{"lr": 0.01}, {}, {"betas": (0.7, 0.9)}, {}]
    for call in range(4):
        grads = gradients(call, params)
        feed(params, [*grads[:1], None, *grads[2:]])
        optimizer.step()
        for variable, param, grad, changes in zip(program, params, grads, of_group, strict=True):
            if variable:
                variable.step(grad, **SETTINGS | changes)
                require_same(param, optimizer.state[param], variable.expected(), f"call {call}")


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("dtype", "bits", "rounding"), STORAGES[1:])
def test_options_of_one_group_are_not_those_of_another(dtype, bits, rounding, is_first):
    """The bits of two optimizers; a parameter without gradients keeps the number of the other."""
    own = {"state_bits": bits, "weight_rounding": rounding, "seed": 5}
    options = [own, {}] if is_first else [{}, own]
    first, second = parameters(dtype, [(70, 60), (45, 91)])
    together = Adamax([{"params": [first], **options[0]}, {"params": [second], **options[1]}])
    one, other = clones([first, second])
    nothing = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    alone = [Adamax([one], **options[0]), Adamax([nothing, other], **options[1])]
    for call in range(3):
        grads = gradients(call, [first, second])
        feed([first, second, one, other], grads * 2)
        for optimizer in (together, *alone):
            optimizer.step()
    for param, copied, optimizer in zip((first, second), (one, other), alone, strict=True):
        assert_same(param, copied)
        assert list(together.state[param]) == list(optimizer.state[copied])
        for key, tensor in together.state[param].items():
            assert_same(tensor, optimizer.state[copied][key], key)


@pytest.mark.parametrize(("dtype", "bits", "rounding"), STORAGES[1:])
def test_the_functional_step_has_the_same_bits(dtype, bits, rounding):
    params = parameters(dtype, [(4500,), (70, 60)])
    optimizer = Adamax(params, **SETTINGS, state_bits=bits, weight_rounding=rounding, seed=11)
    train(optimizer, params, range(3))
    others, states = clones(params), copy.deepcopy(states_of(optimizer))
    train(optimizer, params, [3])
    for i, (param, state) in enumerate(zip(others, states, strict=True)):
        adamax_ext.update(
            param,
            gradients(3, params)[i],
            state["exp_avg"],
            state["exp_inf"],
            step=4,
            learning_rate=SETTINGS["lr"],
            beta_1=SETTINGS["betas"][0],
            beta_2=SETTINGS["betas"][1],
            epsilon=SETTINGS["eps"],
            epsilon_mode="inside",
            weight_decay=SETTINGS["weight_decay"],
            decay="l2",
            norm_scale=state.get("exp_inf_scale"),
            remainder=state.get("remainder"),
            weight_rounding=rounding,
            seed=11,
            variable=i,
        )
        assert_same(params[i], param)
        for key in set(state) - {"step"}:
            assert_same(optimizer.state[params[i]][key], state[key], key)


def test_groups_that_come_later_and_a_seed_that_changes():
    params = parameters(BF16, [(4500,), (4600,)])
    options = {"state_bits": 8, "weight_rounding": "stochastic"}
    optimizer = Adamax(params[:1], **SETTINGS, **options)
    program = [Variable(p, i, 8, "stochastic", 0) for i, p in enumerate(params)]
    for call in range(4):
        if call == 1:
            optimizer.add_param_group({"params": params[1:]})
        if call == 2:
            optimizer.param_groups[1]["seed"] = program[1].seed = 77
        feed(params, gradients(call, params))
        optimizer.step()
        for param, variable in zip(params[: 1 + (call > 0)], program, strict=False):
            variable.step(param.grad, **SETTINGS)
            require_same(param, optimizer.state[param], variable.expected(), f"call {call}")


def test_an_option_that_a_plain_group_is_given_later():
    params = parameters(BF16, [(4500,)])
    optimizer, program = Adamax(params, **SETTINGS), Variable(params[0], 0, 32, "nearest", 0)
    for call in range(4):
        if call == 2:
            optimizer.param_groups[0]["weight_rounding"] = program.weight.rounding = "stochastic"
        feed(params, gradients(call, params))
        optimizer.step()
        program.step(params[0].grad, **SETTINGS)
        require_same(params[0], optimizer.state[params[0]], program.expected(), f"call {call}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_options_of_one_group_leave_moments_of_another_in_their_dtype(dtype):
    """A plain group takes moments that somebody made in another one, as torch's class does."""
    params = parameters(F32, [(4500,), (4600,)])
    alone = clones(params)[1]
    both = Adamax([{"params": params[:1], "state_bits": 8}, {"params": params[1:]}])
    one = Adamax([alone])
    for call in range(3):
        feed([*params, alone], [*gradients(call, params), gradients(call, params)[1]])
        both.step()
        one.step()
        for state in (both.state[params[1]], one.state[alone]):
            state.update({key: state[key].to(dtype) for key in ("exp_avg", "exp_inf")})
    assert_same(params[1], alone)
    for key in ("exp_avg", "exp_inf"):
        assert_same(both.state[params[1]][key], one.state[alone][key], key)


def test_the_seed_is_of_every_rounding():
    results = []
    for seed in (0, 1, 2**32, np.int64(0)):
        params = parameters(BF16, [(4500,)])
        optimizer = Adamax(params, state_bits=8, weight_rounding="stochastic", seed=seed)
        train(optimizer, params, range(2))
        results.append((params[0].detach(), optimizer.state[params[0]]["exp_avg"]))
    for (one, m), (other, other_m) in itertools.combinations(results[:3], 2):
        assert not torch.equal(one, other)
        assert not torch.equal(m, other_m)
    for one, other in zip(results[0], results[3], strict=True):
        assert_same(one, other)


# ---- Saving -------------------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("done", [1, 2, 5])
def test_training_that_is_resumed_from_a_file_has_the_same_bits(dtype, bits, rounding, done):
    params = parameters(dtype)
    options = {"state_bits": bits, "weight_rounding": rounding, "seed": 7}
    first = AdamaxW(params, **SETTINGS, **options)
    train_with_gaps(first, params, range(done))
    others = clones(params)
    # What the file says counts, but for state_bits, which has to be the same.
    second = AdamaxW(others, state_bits=bits)
    second.load_state_dict(through_a_file(first.state_dict()))
    require_same_states(second, first)
    train_with_gaps(first, params, range(done, 9))
    train_with_gaps(second, others, range(done, 9))
    require_same_states(second, first)
    keys = dict(second.param_groups[0])
    assert [keys.get(name, value) for name, value in DEFAULTS.items()] == [bits, rounding, 7]


DEFAULTS = {"state_bits": 32, "weight_rounding": "nearest", "seed": 0}


@every_class
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_on(kind, copied):
    params = parameters(BF16)
    first = kind(params, **SETTINGS, state_bits=8, weight_rounding="remainder", seed=3)
    train(first, params, range(3))
    second = copied(first)
    train(first, params, range(3, 6))
    train(second, params_of(second), range(3, 6))
    require_same_states(second, first)
    second.add_param_group({"params": [parameter(5000, dtype=BF16)]})
    assert second.param_groups[1]["state_bits"] == 8


@every_class
def test_defaults_leave_no_trace(kind):
    params = parameters(BF16)
    plain, named = kind(params), kind(params, **DEFAULTS)
    groups = kind([{"params": params, **DEFAULTS}])
    for optimizer in (plain, named, groups):
        assert not DEFAULTS.keys() & optimizer.defaults.keys()
        assert not DEFAULTS.keys() & optimizer.param_groups[0].keys()
    train(named, params, range(2))
    assert {tuple(state) for state in named.state.values()} == {("step", "exp_avg", "exp_inf")}
    torch.optim.Adamax(clones(params)).load_state_dict(through_a_file(named.state_dict()))


def test_a_group_has_all_options_or_none():
    params = parameters(F32)
    optimizer = Adamax([{"params": params[:1], "seed": 5}, {"params": params[1:]}])
    assert {k: optimizer.param_groups[0][k] for k in DEFAULTS} == {**DEFAULTS, "seed": 5}
    assert not DEFAULTS.keys() & optimizer.param_groups[1].keys()


@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
@pytest.mark.parametrize("kind", [torch.optim.Adamax, Adamax])
def test_rounding_begins_with_a_file_that_knows_none(kind, rounding):
    """The weights were all there was: a remainder begins as zero."""
    params = parameters(BF16)
    first = kind(params, **SETTINGS)
    train(first, params, range(3))
    others = clones(params)
    second = Adamax(others, weight_rounding=rounding, seed=6)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.param_groups[0]["weight_rounding"] == rounding
    program = [Variable(p, i, 32, rounding, 6) for i, p in enumerate(others)]
    for variable, state in zip(program, states_of(second), strict=True):
        variable.steps = 3
        variable.state.momentum, variable.state.norm = (
            state[key].detach().clone().ravel().numpy() for key in ("exp_avg", "exp_inf")
        )
    train(second, others, [3])
    for variable, param, grad in zip(program, others, gradients(3, params), strict=True):
        variable.step(grad, **SETTINGS)
        require_same(param, second.state[param], variable.expected(), str(param.shape))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_there_twice_is_loaded():
    param = parameter(5000)
    first, second = (Adamax([param, param], state_bits=8) for _ in range(2))
    train(first, [param], range(2))
    assert first.state[param]["step"] == 4
    second.load_state_dict(through_a_file(first.state_dict()))
    require_same_states(second, first)


def test_a_file_with_more_groups_is_refused_as_torch_does():
    params = parameters(F32)
    first = Adamax([{"params": params[:1]}, {"params": params[1:]}], state_bits=8)
    train(first, params, range(1))
    second = Adamax(params[:1], state_bits=8)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        second.load_state_dict(first.state_dict())
    assert not second.state


class Loaded(Adamax):
    """Knows what torch's own class has loaded."""

    def __setstate__(self, state):
        self.seen = [set(own) for own in state["state"].values()]
        super().__setstate__(state)


def test_what_is_loaded_is_never_there_in_another_dtype():
    params = parameters(F32, [(5000,)])
    first, second = Adamax(params, state_bits=8), Loaded(params, state_bits=8)
    train(first, params, range(2))
    given = first.state_dict()
    second.load_state_dict(given)
    assert second.seen == [{"step"}]
    for key in ("exp_avg", "exp_inf", "exp_inf_scale"):
        assert second.state[params[0]][key] is given["state"][0][key]


def test_bytes_of_state():
    size = 1 << 16
    sizes = {}
    for dtype, bits, rounding in STORAGES:
        params = [parameter(size, dtype=dtype)]
        optimizer = Adamax(params, state_bits=bits, weight_rounding=rounding)
        train(optimizer, params, range(1))
        sizes[dtype, bits, rounding] = bytes_of(optimizer.state[params[0]]) / size
    for (dtype, bits, rounding), measured in sizes.items():
        remainder = 2 if rounding == "remainder" and dtype == BF16 else 0
        assert measured - remainder <= {32: 8.001, 16: 4.001, 8: 2.016}[bits]


# ---- What torch's own things do -----------------------------------------------------------------


def test_grad_scaler_skips_a_step_and_changes_nothing():
    params = parameters(BF16)
    optimizer = Adamax(params, state_bits=8, weight_rounding="remainder")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(optimizer, params, range(2))
    for bad in (True, False):
        grads = [4 * grad for grad in gradients(2, params)]
        if bad:
            grads[1][7] = torch.inf
        feed(params, grads)
        scaler.scale(torch.zeros(()))  # it is lazy
        before = Snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update(4.0)
        if bad:
            before.require_unchanged()
    others = parameters(BF16)
    other = Adamax(others, state_bits=8, weight_rounding="remainder")
    train(other, others, range(3))
    require_same_states(optimizer, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(backend):
    torch._dynamo.reset()
    runs = []
    for compiled in (lambda step: step, lambda step: torch.compile(step, backend=backend)):
        params = parameters(BF16)
        optimizer = Adamax(params, state_bits=8, weight_rounding="stochastic", seed=2)
        step = compiled(optimizer.step)
        for call in range(4):
            feed(params, some_gradients(call, params))
            step()
        runs.append(optimizer)
    require_same_states(*runs)
    torch._dynamo.reset()


def test_rates_and_closures_as_with_full_state():
    runs = []
    for rate in (0.03, torch.tensor(0.03, dtype=torch.float64)):
        params = parameters(BF16)
        optimizer = Adamax(params, rate, state_bits=16, weight_rounding="stochastic")
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for call in range(3):
            versions = [param._version for param in params]

            def closure(optimizer=optimizer, params=params, call=call):
                optimizer.zero_grad()
                feed(params, gradients(call, params))
                return 1.5

            assert optimizer.step(closure) == 1.5
            assert [param._version for param in params] == [v + 1 for v in versions]
            schedule.step()
        runs.append(optimizer)
    require_same_states(*runs)


# ---- Memory -------------------------------------------------------------------------------------

LAST = torch.channels_last


def images(dtype):
    """A parameter of more than 4096 elements with its channels last."""
    return parameter(24, 20, 3, 3, dtype=dtype).data.to(memory_format=LAST)


@every_storage
def test_state_lies_as_its_parameter(dtype, bits, rounding):
    param = torch.nn.Parameter(images(dtype))
    optimizer = Adamax([param], **SETTINGS, state_bits=bits, weight_rounding=rounding, seed=1)
    variable = Variable(param, 0, bits, rounding, 1)
    for call in range(3):
        param.grad = random(24, 20, 3, 3, dtype=dtype, seed=call)  # in another order
        optimizer.step()
        variable.step(param.grad.to(memory_format=LAST), **SETTINGS)
    state = optimizer.state[param]
    for key, tensor in state.items():
        assert key in ("step", "exp_inf_scale") or tensor.stride() == param.stride()
    require_same(param, state, variable.expected(), "after three steps")


@every_storage
def test_a_parameter_with_gaps(dtype, bits, rounding):
    gaps = random(70, 130, dtype=dtype)[:, ::2]
    params = [leaf(gaps), torch.nn.Parameter(gaps.contiguous())]
    runs = []
    for param in params:
        optimizer = Adamax([param], **SETTINGS, state_bits=bits, weight_rounding=rounding)
        train(optimizer, [param], range(3))
        runs.append(optimizer)
    assert not params[0].is_contiguous()
    require_same_states(*runs)


@every_storage
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_parameter_that_changes_its_memory_order(dtype, bits, rounding, is_loaded):
    """Blocks stay those of the state; random numbers go with the order of a step."""
    kept, moved = (torch.nn.Parameter(images(dtype).clone()) for _ in range(2))
    options = {"state_bits": bits, "weight_rounding": rounding}
    runs = [Adamax([param], **SETTINGS, **options) for param in (kept, moved)]
    for optimizer, param in zip(runs, (kept, moved), strict=True):
        train(optimizer, [param], range(2))
    moved.data = moved.data.contiguous()
    if is_loaded:
        saved = through_a_file(runs[1].state_dict())
        runs[1] = Adamax([moved], state_bits=bits)
        runs[1].load_state_dict(saved)
    for optimizer, param in zip(runs, (kept, moved), strict=True):
        train(optimizer, [param], range(2, 5))
    assert kept.stride() != moved.stride()
    states = [optimizer.state[param] for optimizer, param in zip(runs, (kept, moved), strict=True)]
    if bits == 8:
        for key, tensor in states[0].items():
            assert_same(states[1][key], tensor, key)
        assert_same(moved, kept)
    else:  # the same numbers are drawn for other elements
        for key in ("exp_avg", "exp_inf"):
            difference = (states[1][key].float() - states[0][key].float()).abs().max()
            assert difference <= 0.02 * states[0][key].float().abs().max()


@pytest.mark.parametrize("bits", [16, 8])
def test_parameters_that_share_memory_are_stepped_one_after_the_other(bits):
    whole, grads = random(9000), [random(5000, seed=1), random(5000, seed=2)]
    alone = whole.clone()
    together = [torch.nn.Parameter(whole[:5000]), torch.nn.Parameter(whole[4000:])]
    separate = [torch.nn.Parameter(alone[:5000]), torch.nn.Parameter(alone[4000:])]
    optimizer = Adamax(together, **SETTINGS, state_bits=bits)
    # A gap before, so that the second is gathered too.
    others = [Adamax(separate[:1], **SETTINGS, state_bits=bits)]
    first = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    others.append(Adamax([first, separate[1]], **SETTINGS, state_bits=bits))
    for _ in range(3):
        feed(together, grads)
        feed(separate, grads)
        optimizer.step()
        for other in others:
            other.step()
    assert_same(whole, alone)
    for param, other, one in zip(together, separate, others, strict=True):
        for key, tensor in optimizer.state[param].items():
            assert_same(tensor, one.state[other][key], key)


ACROSS = [  # dtype, bits, key, and where in the gradient what is kept begins
    (F32, 32, "exp_inf", 2000),
    (F32, 16, "exp_avg", 2000),
    (F32, 8, "exp_avg", 2000),
    (F32, 8, "exp_inf", 2000),
    (F32, 8, "exp_inf_scale", 4990),
    (BF16, 32, "remainder", 2000),
]


@pytest.mark.parametrize(("dtype", "bits", "key", "begin"), ACROSS)
def test_a_gradient_that_lies_across_the_state_of_its_parameter(dtype, bits, key, begin):
    """It is read before anything is written over it."""
    runs = []
    for is_across in (False, True):
        params = parameters(dtype, [(5000,)])
        options = {"state_bits": bits, "weight_rounding": "remainder"}
        optimizer = Adamax(params, **SETTINGS, **options)
        train(optimizer, params, range(2))
        buffer = random(10000, dtype=dtype)
        state = optimizer.state[params[0]]
        kept = buffer[begin:].view(state[key].dtype)[: state[key].numel()].copy_(state[key])
        params[0].grad = buffer[:5000] if is_across else buffer[:5000].clone()
        state[key] = kept if is_across else kept.clone()
        optimizer.step()
        runs.append(optimizer)
    require_same_states(*runs)


@pytest.mark.parametrize("key", ["exp_inf_scale", "remainder"])
def test_state_that_is_shared_is_stepped_one_after_the_other(key):
    """As all of a state may be: the second parameter finds what the first one has left."""
    options = {"state_bits": 8, "weight_rounding": "remainder"}
    together, separate = (parameters(BF16, [(5000,), (5000,)]) for _ in range(2))
    optimizer = Adamax(together, **SETTINGS, **options)
    train(optimizer, together, range(2))
    states = [optimizer.state[param] for param in together]
    states[1][key] = states[0][key]
    for param, other in zip(together, separate, strict=True):
        other.data.copy_(param.data)
    other = Adamax(separate, state_bits=8)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    one, two = (other.state[param] for param in separate)
    feed(together, gradients(2, together))
    optimizer.step()
    feed(separate, [gradients(2, separate)[0], None])
    other.step()
    two[key].copy_(one[key])
    feed(separate, [None, gradients(2, separate)[1]])
    other.step()
    one[key].copy_(two[key])
    require_same_states(optimizer, other)


def test_a_gathered_step_that_fails_restores_scales_and_remainders():
    whole = random(40000, dtype=BF16)
    params = [
        torch.nn.Parameter(whole[: 2 * 9000 : 2]),  # is gathered, and shares memory
        torch.nn.Parameter(whole[10000 : 10000 + 2 * 9000 : 2]),
    ]
    optimizer = Adamax(params, state_bits=8, weight_rounding="remainder")
    train(optimizer, params, range(2))
    optimizer.state[params[1]]["step"] += 0.5
    feed(params, gradients(2, params))
    before = Snapshot(optimizer, [whole])
    with pytest.raises(ValueError, match="must be a whole number"):
        optimizer.step()
    before.require_unchanged()


# ---- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"state_bits": 4}, "state_bits must be 32, 16 or 8; received 4"),
        ({"state_bits": "8"}, "state_bits must be 32, 16 or 8; received '8'"),
        ({"state_bits": [8]}, r"state_bits must be 32, 16 or 8; received \[8\]"),
        ({"weight_rounding": "up"}, "weight_rounding must be 'nearest', 'stochastic' or 'remai"),
        ({"weight_rounding": None}, "weight_rounding must be .*; received None"),
        ({"seed": -1}, "seed must be an integer >= 0; received -1"),
        ({"seed": 2**64}, "seed must be an integer .*; received 18446744073709551616"),
        ({"seed": 1.0}, "seed must be an integer .*; received 1.0"),
        ({"seed": True}, "seed must be an integer .*; received True"),
    ],
)
def test_options_out_of_range(option, message):
    params = parameters(F32)
    with pytest.raises(ValueError, match=message):
        Adamax(params, **option)
    optimizer = Adamax(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **option})
    assert len(optimizer.param_groups) == 1
    for done in range(2):  # edited before the first step, and after it
        optimizer.param_groups[0].update(option)
        feed(params, gradients(0, params))
        before = clones(params)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert len(optimizer.state) == done
        for param, kept in zip(params, before, strict=True):
            assert_same(param, kept)
        del optimizer.param_groups[0][next(iter(option))]
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("bits", [16, 8])
def test_parameters_that_keep_full_state(dtype, bits):
    params = [parameter(3), parameter(3, dtype=dtype)]
    message = (
        rf"params\[1\] of param_groups\[0\] has dtype {dtype}, whose state .*={bits}; expected"
    )
    with pytest.raises(TypeError, match=message):
        Adamax(params, state_bits=bits)
    with pytest.raises(TypeError, match=f"^'b' has dtype {dtype}"):
        Adamax([("a", params[0]), ("b", params[1])], state_bits=bits)
    optimizer = Adamax([{"params": params[:1], "state_bits": bits}, {"params": params[1:]}])
    train(optimizer, params, range(2))
    for param in params:
        assert (
            optimizer.state[param]["exp_avg"].dtype
            == (BF16 if bits == 16 else F32, dtype)[param is params[1]]
        )


@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_float16_is_rounded_to_nearest_alone(rounding):
    message = rf"params\[0\] of param_groups\[0\] has dtype torch.float16, .*'{rounding}' does not"
    with pytest.raises(TypeError, match=message):
        Adamax([parameter(3, dtype=F16)], weight_rounding=rounding)
    params = [parameter(3), parameter(3, dtype=torch.float64), parameter(3, dtype=torch.complex64)]
    optimizer = Adamax(params, weight_rounding=rounding)  # nothing is rounded
    others = clones(params)
    train(optimizer, params, range(3))
    train(Adamax(others), others, range(3))
    for one, other in zip(params, others, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations([32, 16, 8], 2)))
def test_bits_of_state_do_not_change_without_the_state(before, after):
    params = parameters(F32, [(4500,)])
    optimizer = Adamax(params, state_bits=before)
    train(optimizer, params, range(2))
    kept = Snapshot(optimizer)
    optimizer.param_groups[0]["state_bits"] = after
    message = rf"state_bits of param_groups\[0\] .* in {before} bits; received {after}"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    kept.require_unchanged()
    optimizer.param_groups[0]["state_bits"] = before
    optimizer.step()


def test_options_are_kept_as_numbers_that_any_file_can_hold():
    params = parameters(BF16, [(4500,)])
    optimizer = Adamax(params, state_bits=np.int64(8), seed=np.uint64(3))
    optimizer.add_param_group({"params": parameters(BF16, [(4600,)]), "seed": np.int8(4)})
    through_a_file(optimizer.state_dict())
    assert [type(group[key]) for group in optimizer.param_groups for key in OPTIONS] == 2 * [
        int,
        str,
        int,
    ]


@pytest.mark.parametrize("seed", [1.0, True])
def test_a_seed_is_an_integer_also_where_it_equals_one(seed):
    params = parameters(BF16, [(4500,)])
    optimizer = Adamax(params, weight_rounding="stochastic", seed=1)
    train(optimizer, params, range(1))
    optimizer.param_groups[0]["seed"] = seed
    with pytest.raises(ValueError, match=f"seed must be an integer >= 0; received {seed}"):
        optimizer.step()


def test_groups_that_change_while_they_are_read():
    """A step is one of the groups that there are when it begins, whatever a tensor does."""

    class Rebuilds(torch.nn.Parameter):
        @property
        def grad(self):
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            optimizer.param_groups.extend([bytearray(100) for _ in range(5000)])
            optimizer.param_groups[:] = groups
            return torch.ones(4)

    params = [Rebuilds(torch.zeros(4)), *parameters(F32, [(4,)] * 20)]
    optimizer = Adamax([{"params": [param]} for param in params])
    feed(params[1:], gradients(0, params[1:]))
    optimizer.step()
    optimizer.param_groups = tuple(optimizer.param_groups[1:])  # which torch's class takes, too
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [1] + 20 * [2]


@pytest.mark.parametrize("kept", [collections.UserDict(step=torch.ones(())), [1], 0])
def test_state_that_is_no_dict_is_refused(kept):
    params = parameters(F32, [(4,), (5,)])
    optimizer = Adamax(params)
    train(optimizer, params, range(1))
    optimizer.state[params[1]] = kept
    with pytest.raises(TypeError, match="the state of a parameter must be a dict; received <class"):
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_a_parameter_that_became_another_one_before_its_first_step():
    params = parameters(F32)
    optimizer = Adamax(params, state_bits=16)
    feed(params[:1], gradients(0, params[:1]))
    optimizer.step()
    params[1].data = params[1].data.double()
    feed(params, gradients(0, params))
    before = Snapshot(optimizer)
    with pytest.raises(TypeError, match=r"of shape \(4096,\) has dtype torch.float64"):
        optimizer.step()
    before.require_unchanged()


BROKEN = [
    (
        8,
        {"exp_inf_scale": None},
        ValueError,
        r"exp_inf_scale\[1\] must be given where momentum",
    ),
    (
        16,
        {"exp_inf_scale": None},
        ValueError,
        r"exp_inf_scale\[1\] must be given where momentum and norm",
    ),
    (8, {"exp_inf_scale": torch.ones(15)}, ValueError, r"exp_inf_scale\[1\] has 15 .*expected 16,"),
    (16, {"exp_inf_scale": torch.ones(2)}, ValueError, r"exp_inf_scale\[1\] has 2 .*expected 1 w"),
    (8, {"exp_inf_scale": torch.ones(16, dtype=BF16)}, TypeError, r"exp_inf_scale\[1\] has dtype"),
    (
        8,
        {"exp_avg": torch.ones(4096)},
        TypeError,
        r"exp_inf\[1\] has dtype uint8; expected float32",
    ),
    (
        8,
        {"exp_avg": torch.ones(4096).short()},
        TypeError,
        r"exp_avg\[1\] has dtype int16; expected",
    ),
    (
        8,
        {"exp_inf": torch.ones(4096).char()},
        TypeError,
        r"exp_inf\[1\] has dtype int8; expected ui",
    ),
    (16, {"exp_inf": torch.ones(4096)}, TypeError, r"exp_inf\[1\] has dtype float32; expected bf"),
    (
        32,
        {"exp_inf_scale": torch.ones(1)},
        ValueError,
        r"exp_inf_scale\[1\] must be None where mom",
    ),
    (32, {"exp_avg": torch.ones(4096).char()}, TypeError, r"exp_inf\[1\] has dtype float32; expe"),
    (
        8,
        {"exp_avg": torch.ones(4095).char()},
        RuntimeError,
        r"state must have the shape \(4096,\) ",
    ),
    (
        8,
        {"remainder": None},
        ValueError,
        r"remainder\[1\] must be given where weight_rounding is",
    ),
    (
        8,
        {"remainder": torch.ones(4096)},
        TypeError,
        r"remainder\[1\] has dtype float32; expected in",
    ),
    (8, {"remainder": "none"}, RuntimeError, "remainder of a state must be a tensor; received 'no"),
    (16, {"exp_inf_scale": 1.0}, RuntimeError, "exp_inf_scale of a state must be a tensor; rec"),
]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("bits", "changes", "error", "message"), BROKEN)
def test_state_that_does_not_fit(bits, changes, error, message, is_first):
    """In a group with options, beside one without."""
    params = parameters(BF16)
    groups = [{"params": params[: 1 + is_first]}, {"params": params[1 + is_first :]}]
    groups[not is_first] |= {"state_bits": bits, "weight_rounding": "remainder"}
    optimizer = Adamax(groups)
    train(optimizer, params, range(2))
    state = optimizer.state[params[1]]
    for key, value in changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    feed(params, gradients(2, params))
    before = Snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    before.require_unchanged()


def test_state_in_blocks_of_two_memory_orders():
    params = [torch.nn.Parameter(images(F32))]
    optimizer = Adamax(params, state_bits=8)
    train(optimizer, params, range(2))
    state = optimizer.state[params[0]]
    state["exp_inf"] = state["exp_inf"].contiguous()
    before = Snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match="exp_avg and exp_inf in 8 bits must have the same strid"
    ):
        train(optimizer, params, [2])
    before.require_unchanged()


def test_a_remainder_is_not_forgotten():
    params = parameters(BF16)
    optimizer = Adamax(params, weight_rounding="remainder")
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["weight_rounding"] = "nearest"
    feed(params, gradients(2, params))
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^remainder\[0\] must be None where no remainder"):
        optimizer.step()
    before.require_unchanged()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"betas": (0.9, 0.9)}, "beta"), ({"eps": 0.0}, "epsilon"), ({"eps": 1e-27}, "epsilon")],
)
def test_settings_that_8_bits_cannot_have(settings, message):
    params = parameters(F32)
    optimizer = Adamax(params, **settings, state_bits=8)
    feed(params, gradients(0, params))
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    before.require_unchanged()
    train(Adamax(params, **settings, state_bits=16), params, range(1))


@pytest.mark.parametrize(("saved", "own"), list(itertools.permutations([32, 16, 8], 2)))
def test_a_file_with_state_in_other_bits(saved, own):
    params, others = parameters(F32), parameters(F32)
    first, second = Adamax(params, state_bits=saved), Adamax(others, state_bits=own)
    train(first, params, range(1))
    train(second, others, range(1))
    before = Snapshot(second)
    message = rf"state_dict has state_bits={saved} in param_groups\[0\], and this optimizer {own}"
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(through_a_file(first.state_dict()))
    before.require_unchanged()
    train(second, others, [1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", torch.zeros(4096), "exp_avg of parameter 1 in state_dict is of torch.float32"),
        ("exp_inf_scale", None, "exp_inf_scale of parameter 1 .* is None; expected torch.float32"),
        ("remainder", torch.zeros(4096), "remainder of parameter 1 .* expected torch.int16"),
        ("remainder", None, "remainder of parameter 1 .* is None; expected torch.int16"),
        ("exp_inf_scale", torch.zeros(1), r"exp_inf_scale of parameter 1 .* has shape \(1,\)"),
        ("exp_avg", torch.zeros(3, dtype=torch.int8), r"exp_avg of parameter 1 .* shape \(3,\)"),
        ("remainder", torch.zeros(3, dtype=torch.int16), r"remainder of parameter 1 .* shape \(3,"),
    ],
)
def test_a_file_that_does_not_hold_what_it_says(key, value, message):
    params = parameters(BF16)
    optimizer = Adamax(params, state_bits=8, weight_rounding="remainder")
    train(optimizer, params, range(1))
    given = copy.deepcopy(optimizer.state_dict())
    given["state"][1][key] = value
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(given)
    before.require_unchanged()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_file_with_scales_that_cannot_be(bits, value):
    params = parameters(F32)
    optimizer = Adamax(params, state_bits=bits)
    train(optimizer, params, range(1))
    given = copy.deepcopy(optimizer.state_dict())
    given["state"][1]["exp_inf_scale"][-1] = value
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=r"exp_inf_scale of parameter 1 .* must be finite"):
        optimizer.load_state_dict(given)
    before.require_unchanged()


@pytest.mark.parametrize("bits", [16, 8])
def test_state_without_values_is_loaded(bits):
    """Of a model on the meta device, in which no scale can be looked at."""
    params = parameters(F32)
    first = Adamax(params, state_bits=bits)
    train(first, params, range(1))
    others = [torch.nn.Parameter(param.to("meta")) for param in params]
    second = Adamax(others, state_bits=bits)
    second.load_state_dict(through_a_file(first.state_dict(), map_location="meta"))
    for param, other in zip(params, others, strict=True):
        for key, value in first.state[param].items():
            if key != "step" and value is not None:
                loaded = second.state[other][key]
                assert loaded.is_meta
                assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape)


def test_a_file_with_options_that_cannot_be():
    optimizer = Adamax(parameters(BF16), state_bits=16)
    given = copy.deepcopy(optimizer.state_dict())
    given["param_groups"][0]["seed"] = -3
    with pytest.raises(ValueError, match="seed must be an integer >= 0; received -3"):
        optimizer.load_state_dict(given)


def test_a_remainder_for_weights_that_are_not_bfloat16():
    params = parameters(BF16)
    first = Adamax(params, weight_rounding="remainder")
    train(first, params, range(1))
    second = Adamax(clones(params, F32), weight_rounding="remainder")
    with pytest.raises(
        ValueError, match=r"remainder of parameter 0 .* of torch.int16; expected No"
    ):
        second.load_state_dict(first.state_dict())

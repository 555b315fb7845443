"""adamax_ext.torch on an emulated GPU: the numbers of a step in its memory, graphs, GradScaler."""

import contextlib

import pytest
from support import emulated
from support.emulated import log_of
from support.torch_gpu_checks import (
    OPTIONS,
    Gpu,
    check_capture_refused,
    check_graph,
    check_steps,
    parameters,
    require_same,
    set_gradients,
)
from support.torch_runs import Adamax, params_of, torch

# isort: split
from support.emulated_torch import on_gpu, on_host, torch_makes_gpu_tensors


@contextlib.contextmanager
def captured():
    """Capture a graph; gives what replays it."""
    stream = emulated.TableArray.current_stream
    with emulated.captured(stream):
        yield lambda: emulated.replay(stream)


EMULATED = Gpu(place=on_gpu, fetch=on_host, capture=captured, warm_up=contextlib.nullcontext)


def on_emulated(check, *arguments):
    with torch_makes_gpu_tensors():
        check(EMULATED, *arguments)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_have_the_bits_of_the_host(options, dtype, capturable):
    emulated.run(on_emulated, check_steps, options, dtype, capturable)


def check_narrow_rate():
    """Of a type that the kernels do not read."""
    with torch_makes_gpu_tensors():
        rate = torch.tensor(0.01, dtype=torch.bfloat16)
        optimizer = Adamax(parameters(on_gpu), lr=on_gpu(rate), capturable=True)
        reference = Adamax(parameters(), lr=rate)
        for call in range(3):
            set_gradients(params_of(optimizer), call, on_gpu)
            set_gradients(params_of(reference), call)
            optimizer.step()
            reference.step()
        require_same(EMULATED, optimizer, reference)


def test_a_rate_of_another_type_on_the_gpu():
    emulated.run(check_narrow_rate)


def check_rates_in_turn():
    """Of groups whose variables share memory with gaps, and so are stepped one by one."""
    with torch_makes_gpu_tensors():
        results = []
        for place in (on_gpu, torch.clone):
            whole = place(torch.ones(6, 2))
            params = [whole[:, k].detach().requires_grad_() for k in (0, 0, 1)]
            for k, param in enumerate(params):
                param.grad = place(torch.full((6,), 1.0 + k))
            rates = [place(torch.tensor(rate)) for rate in (0.5, 0.25)]
            groups = [
                {"params": params[:2], "lr": rates[0]},
                {"params": params[2:], "lr": rates[1]},
            ]
            Adamax(groups, capturable=place is on_gpu).step()
            results.append(on_host(whole))
        assert torch.equal(*results)
        assert results[0][0].tolist() == pytest.approx([0.0, 0.75])


def test_every_group_has_its_rate_also_in_turn():
    emulated.run(check_rates_in_turn)


def run_captured(step):
    log = log_of(step)
    assert [line.split(" on ")[0] for line in log] == ["launch groups", "launch update"]


def test_a_captured_step_is_another_one_at_each_replay():
    """And asks the device for two launches: no event, no copy, no memory, no wait."""
    emulated.run(on_emulated, check_graph, run_captured)


def test_a_capture_is_refused_where_the_host_counts():
    emulated.run(on_emulated, check_capture_refused)


def check_loss_scale():
    """As torch.amp.GradScaler does it: attributes, for the time of one step."""
    with torch_makes_gpu_tensors():
        host = parameters()
        optimizer = Adamax(parameters(on_gpu), lr=0.02, capturable=True)
        reference = Adamax(host, lr=0.02)
        assert optimizer._step_supports_amp_scaling
        assert not reference._step_supports_amp_scaling
        done = 0
        for call in range(8):
            set_gradients(params_of(optimizer), call, on_gpu, scale=1024.0)
            set_gradients(host, call)
            found_inf = call % 3 == 1
            optimizer.grad_scale = on_gpu(torch.tensor(1024.0))
            optimizer.found_inf = on_gpu(torch.tensor(float(found_inf)))
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            if not found_inf:
                reference.step()
                done += 1
                for param, twin in zip(params_of(optimizer), host, strict=True):
                    assert torch.equal(on_host(param.grad), twin.grad)
            require_same(EMULATED, optimizer, reference)
        assert on_host(optimizer.state[params_of(optimizer)[0]]["step"]) == done


def test_grad_scaler():
    emulated.run(check_loss_scale)


def check_gathered_gradients():
    """What is unscaled in other memory comes back; a gradient that two have is read in turn."""
    with torch_makes_gpu_tensors():
        param = on_gpu(torch.ones(4, requires_grad=True))
        optimizer = Adamax([param], lr=0.02, capturable=True)
        param.grad = on_gpu(torch.full((8,), 8.0))[::2]
        optimizer.grad_scale = on_gpu(torch.tensor(4.0))
        optimizer.step()
        assert on_host(param.grad).tolist() == [2.0] * 4
        twins = [on_gpu(torch.ones(4, requires_grad=True)) for _ in range(2)]
        optimizer = Adamax(twins, lr=0.02, capturable=True)
        twins[0].grad = twins[1].grad = on_gpu(torch.full((4,), 8.0))
        optimizer.grad_scale = on_gpu(torch.tensor(4.0))
        log = log_of(optimizer.step)
        assert len([line for line in log if "launch update" in line]) == 2
        moments = [on_host(optimizer.state[twin]["exp_avg"])[0].item() for twin in twins]
        assert moments == pytest.approx([0.2, 0.05])


def test_gradients_that_are_gathered_or_shared_are_unscaled():
    emulated.run(check_gathered_gradients)


def check_mixed_devices():
    with torch_makes_gpu_tensors():
        host, device = parameters()[0], on_gpu(parameters()[1])
        optimizer = Adamax([host, device])
        set_gradients([host], 0)
        set_gradients([device], 0, on_gpu)
        optimizer.step()
        before = [host.detach().clone(), on_host(device).clone()]
        count = optimizer.state[host]["step"].clone()
        with captured(), pytest.raises(RuntimeError, match="captured"):
            optimizer.step()
        assert torch.equal(host, before[0])
        assert torch.equal(on_host(device), before[1])
        assert optimizer.state[host]["step"] == count
        optimizer.step()
        assert optimizer.state[host]["step"] == count + 1


def test_a_refusal_of_one_device_changes_nothing_on_the_others():
    emulated.run(check_mixed_devices)

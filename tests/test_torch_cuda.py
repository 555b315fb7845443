"""adamax_ext.torch on an emulated GPU: the numbers of a step in its memory, graphs, GradScaler."""

import copy

import pytest
from support import emulated
from support.emulated import log_of

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")

from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402
from support.emulated_torch import GpuTensor, gpu, on_gpu, on_host  # noqa: E402


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((7, 13), (5,), (), (0, 3), (300,))
    ]


def set_gradients(params, call, scale=1.0):
    generator = torch.Generator().manual_seed(100 + call)
    for param in params:
        grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        param.grad = on_gpu(grad) if isinstance(param, GpuTensor) else grad


def require_same(optimizer, other):
    for param, expected in zip(params_of(optimizer), params_of(other), strict=True):
        assert torch.equal(on_host(param), expected)
        for key, value in other.state[expected].items():
            assert torch.equal(on_host(optimizer.state[param][key]), value), key


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


OPTIONS = [
    {},
    {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]


def check_steps(options, dtype, capturable):
    with gpu():
        host = parameters(dtype)
        optimizer = Adamax([on_gpu(param) for param in host], capturable=capturable, **options)
        reference = Adamax(host, **options)
        for call in range(20):
            for one in (optimizer, reference):
                set_gradients(params_of(one), call)
                one.step()
        require_same(optimizer, reference)
        counts = [optimizer.state[param]["step"] for param in params_of(optimizer)]
        assert all(isinstance(count, GpuTensor) == capturable for count in counts)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_have_the_bits_of_the_host(options, dtype, capturable):
    emulated.run(check_steps, options, dtype, capturable)


def check_graph():
    with gpu():
        host = parameters()
        rate = on_gpu(torch.tensor(0.01))
        device = [on_gpu(param) for param in host]
        groups = [{"params": device[:2]}, {"params": device[2:], "betas": (0.5, 0.9)}]
        optimizer = AdamaxW(groups, lr=rate, capturable=True, weight_decay=0.1)
        twin = [{"params": host[:2]}, {"params": host[2:], "betas": (0.5, 0.9)}]
        reference = AdamaxW(twin, lr=rate.item(), weight_decay=0.1)
        for call in range(3):  # a graph needs a warm-up
            set_gradients(device, call)
            set_gradients(host, call)
            optimizer.step()
            reference.step()
        with emulated.captured(emulated.TableArray.current_stream):
            log = log_of(optimizer.step)
        require_same(optimizer, reference)  # nothing ran
        assert [line.split(" on ")[0] for line in log] == ["launch groups", "launch update"]
        for call in range(3, 12):
            rate.copy_(torch.tensor(0.01 * (call % 4 + 1)))
            for group in reference.param_groups:
                group["lr"] = rate.item()
            set_gradients(host, call)
            for param, twin in zip(device, host, strict=True):
                param.grad.copy_(twin.grad)
            emulated.replay(emulated.TableArray.current_stream)
            reference.step()
        require_same(optimizer, reference)


def test_a_captured_step_is_another_one_at_each_replay():
    emulated.run(check_graph)


def check_capture_refused():
    with gpu():
        optimizer = Adamax([on_gpu(param) for param in parameters()])
        set_gradients(params_of(optimizer), 0)
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        with (
            emulated.captured(emulated.TableArray.current_stream),
            pytest.raises(RuntimeError, match=r"captured into a CUDA graph.*capturable=True"),
        ):
            optimizer.step()
        for key, value in before["state"][0].items():
            assert torch.equal(optimizer.state_dict()["state"][0][key], value)


def test_a_capture_is_refused_where_the_host_counts():
    emulated.run(check_capture_refused)


def check_loss_scale():
    """As torch.amp.GradScaler does it: attributes, for the time of one step."""
    with gpu():
        host = parameters()
        optimizer = Adamax([on_gpu(param) for param in host], lr=0.02, capturable=True)
        reference = Adamax(host, lr=0.02)
        assert optimizer._step_supports_amp_scaling
        assert not reference._step_supports_amp_scaling
        done = 0
        for call in range(8):
            set_gradients(params_of(optimizer), call, scale=1024.0)
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
            require_same(optimizer, reference)
        assert on_host(optimizer.state[params_of(optimizer)[0]]["step"]) == done


def test_grad_scaler():
    emulated.run(check_loss_scale)


def check_gathered_gradients():
    """What is unscaled in other memory comes back; a gradient that two have is read in turn."""
    with gpu():
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
    with gpu():
        host, device = parameters()[0], on_gpu(parameters()[1])
        optimizer = Adamax([host, device])
        set_gradients([host, device], 0)
        optimizer.step()
        before = [host.detach().clone(), on_host(device).clone()]
        count = optimizer.state[host]["step"].clone()
        stream = emulated.TableArray.current_stream
        with emulated.captured(stream), pytest.raises(RuntimeError, match="captured"):
            optimizer.step()
        assert torch.equal(host, before[0])
        assert torch.equal(on_host(device), before[1])
        assert optimizer.state[host]["step"] == count
        optimizer.step()
        assert optimizer.state[host]["step"] == count + 1


def test_a_refusal_of_one_device_changes_nothing_on_the_others():
    emulated.run(check_mixed_devices)

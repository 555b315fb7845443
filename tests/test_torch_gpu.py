"""adamax_ext.torch on a real GPU: the bits of the CPU, graphs, GradScaler; see bench/gpu.sh."""

import contextlib

import adamax_ext
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not adamax_ext.build_info()["cuda_architectures"]:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)

from support.torch_gpu_checks import (  # noqa: E402
    OPTIONS,
    Gpu,
    check_capture_refused,
    check_graph,
    check_steps,
    parameters,
    require_same,
    set_gradients,
)
from support.torch_runs import Adamax, params_of  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]


def place(tensor):
    return tensor.detach().to("cuda", copy=True)


@contextlib.contextmanager
def captured():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        yield graph.replay
        torch.ones(1, device="cuda")  # torch warns of an empty graph


@contextlib.contextmanager
def on_another_stream():
    """torch's rule for what comes before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


GPU = Gpu(place, fetch=lambda t: t.detach().cpu(), capture=captured, warm_up=on_another_stream)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_have_the_bits_of_the_host(options, dtype, capturable):
    check_steps(GPU, options, dtype, capturable)


def test_a_captured_step_is_another_one_at_each_replay():
    check_graph(GPU)


def test_a_capture_is_refused_where_the_host_counts():
    check_capture_refused(GPU)


def places_of(optimizer):
    return [place] if params_of(optimizer)[0].is_cuda else []


@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler(capturable):
    optimizer = Adamax(parameters(place), lr=0.02, capturable=capturable)
    reference = Adamax(parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    done = 0
    for call in range(8):
        scale = scaler.scale(torch.tensor(1.0, device="cuda")).item()
        set_gradients(params_of(optimizer), call, place, scale)
        is_finite = call % 3 != 1
        if not is_finite:
            params_of(optimizer)[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if is_finite:
            set_gradients(params_of(reference), call)
            reference.step()
            done += 1
            for param, twin in zip(params_of(optimizer), params_of(reference), strict=True):
                assert torch.equal(param.grad.cpu(), twin.grad)
        require_same(GPU, optimizer, reference)
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == done


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_does_not_wait_for_the_gpu(capturable):
    optimizer = Adamax(parameters(place), capturable=capturable)
    set_gradients(params_of(optimizer), 0, place)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # clock cycles
    is_awake = torch.cuda.Event()
    is_awake.record()
    optimizer.step()
    assert not is_awake.query()
    torch.cuda.synchronize()


def test_a_checkpoint_moves_between_devices():
    optimizer = Adamax(parameters(place), capturable=True)
    reference = Adamax(parameters())
    for call in range(3):
        for one in (optimizer, reference):
            set_gradients(params_of(one), call, *places_of(one))
            one.step()
    twin = Adamax(parameters(place))
    twin.load_state_dict(reference.state_dict())
    for param, from_reference in zip(params_of(twin), params_of(reference), strict=True):
        param.data.copy_(from_reference.data)
    for call in range(3, 6):
        for one in (optimizer, reference, twin):
            set_gradients(params_of(one), call, *places_of(one))
            one.step()
    require_same(GPU, optimizer, reference)
    require_same(GPU, twin, reference)

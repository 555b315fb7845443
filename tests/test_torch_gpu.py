"""adamax_ext.torch on a real GPU: the bits of the CPU, graphs, GradScaler; see bench/gpu.sh."""

import copy

import adamax_ext
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not adamax_ext.build_info()["cuda_architectures"]:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)

from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402

SHAPES = [(7, 13), (5,), (), (0, 3), (300, 1000)]
OPTIONS = [
    {},
    {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    return [param.requires_grad_() for param in made]


def set_gradients(params, call, scale=1.0):
    """Write over gradients that are there, as a graph needs it."""
    generator = torch.Generator().manual_seed(100 + call)
    for param in params:
        grad = (torch.randn(param.shape, generator=generator) * scale).to(param)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def require_same(optimizer, other):
    for param, expected in zip(params_of(optimizer), params_of(other), strict=True):
        assert torch.equal(param.cpu(), expected)
        for key, value in other.state[expected].items():
            assert torch.equal(optimizer.state[param][key].cpu(), value), key


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_have_the_bits_of_the_host(options, dtype, capturable):
    optimizer = Adamax(parameters("cuda", dtype), capturable=capturable, **options)
    reference = Adamax(parameters("cpu", dtype), **options)
    for call in range(20):
        for one in (optimizer, reference):
            set_gradients(params_of(one), call)
            one.step()
    require_same(optimizer, reference)


def test_a_captured_step_is_another_one_at_each_replay():
    rate = torch.tensor(0.01, device="cuda")
    optimizer = AdamaxW(parameters("cuda"), lr=rate, capturable=True, weight_decay=0.1)
    reference = AdamaxW(parameters("cpu"), lr=rate.item(), weight_decay=0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch's rule: a warm-up on another stream
        for call in range(3):
            set_gradients(params_of(optimizer), call)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for call in range(12):
        if call >= 3:
            rate.fill_(0.01 * (call % 4 + 1))
            set_gradients(params_of(optimizer), call)
            graph.replay()
        reference.param_groups[0]["lr"] = rate.item()
        set_gradients(params_of(reference), call)
        reference.step()
    require_same(optimizer, reference)


def test_a_capture_is_refused_where_the_host_counts():
    optimizer = Adamax(parameters("cuda"))
    set_gradients(params_of(optimizer), 0)
    optimizer.step()
    torch.cuda.synchronize()
    before = copy.deepcopy(params_of(optimizer))
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    assert all(map(torch.equal, params_of(optimizer), before))


@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler(capturable):
    optimizer = Adamax(parameters("cuda"), lr=0.02, capturable=capturable)
    reference = Adamax(parameters("cpu"), lr=0.02)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    done = 0
    for call in range(8):
        scale = scaler.scale(torch.tensor(1.0, device="cuda")).item()
        set_gradients(params_of(optimizer), call, scale)
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
        require_same(optimizer, reference)
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == done


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_does_not_wait_for_the_gpu(capturable):
    optimizer = Adamax(parameters("cuda"), capturable=capturable)
    set_gradients(params_of(optimizer), 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # clock cycles
    is_awake = torch.cuda.Event()
    is_awake.record()
    optimizer.step()
    assert not is_awake.query()
    torch.cuda.synchronize()


def test_a_checkpoint_moves_between_devices():
    optimizer = Adamax(parameters("cuda"), capturable=True)
    reference = Adamax(parameters("cpu"))
    for call in range(3):
        for one in (optimizer, reference):
            set_gradients(params_of(one), call)
            one.step()
    twin = Adamax(parameters("cuda"))
    twin.load_state_dict(reference.state_dict())
    for param, from_reference in zip(params_of(twin), params_of(reference), strict=True):
        param.data.copy_(from_reference.data)
    for call in range(3, 6):
        for one in (optimizer, reference, twin):
            set_gradients(params_of(one), call)
            one.step()
    require_same(optimizer, reference)
    require_same(twin, reference)

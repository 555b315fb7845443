"""A small training for torch's trainers, and how near two runs of it must come.

Who imports from here is skipped where torch is not.
"""

from support.frameworks import load_torch

torch = load_torch()

from adamax_ext.torch import Adamax as Adamax  # noqa: E402

FEATURES, CLASSES, IMAGES, BATCH = 12, 4, 64, 8
SETTINGS = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.01}


def make_data():
    """Return points (64, 12) and the class of each; the same at every call."""
    random = torch.Generator().manual_seed(7)
    y = torch.arange(IMAGES) % CLASSES
    centers = torch.randn(CLASSES, FEATURES, generator=random)
    return centers[y] + 0.3 * torch.randn(IMAGES, FEATURES, generator=random), y


def make_loader():
    """The same batches in the same order in every epoch, so that a run can be resumed."""
    dataset = torch.utils.data.TensorDataset(*make_data())
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH)


def make_model(dtype=torch.float32):
    torch.manual_seed(3)
    layers = [torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Linear(16, CLASSES)]
    return torch.nn.Sequential(*layers).to(dtype)


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x).float(), y)


def make_schedule(optimizer, total_steps, max_lr=0.05):
    """One that moves the betas too."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps)


def weights_of(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def assert_near(weights, expected, tolerance=1e-5):
    """Within `tolerance` of the largest element of each tensor."""
    for name, w in expected.items():
        assert (weights[name] - w).abs().max() <= tolerance * w.abs().max(), name


def assert_same(weights, expected):
    """Bit for bit, and no weight is NaN."""
    assert weights.keys() == expected.keys()
    for name, w in expected.items():
        assert torch.equal(weights[name], w), name


def assert_float32_state(optimizer):
    """The state of 16-bit weights, after whatever has saved and loaded it."""
    assert optimizer.state
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_inf"):
            assert state[key].dtype == torch.float32
            # Not rounded to 16 bits on the way.
            assert not torch.equal(state[key], state[key].bfloat16().float())

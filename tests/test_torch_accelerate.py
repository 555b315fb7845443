"""accelerate trains with our Adamax as with torch's, and resumes bit for bit."""

import pytest
from support.torch_training import (
    BATCH,
    IMAGES,
    SETTINGS,
    Adamax,
    assert_float32_state,
    assert_near,
    assert_same,
    loss_of,
    make_loader,
    make_model,
    make_schedule,
    torch,
    weights_of,
)

accelerate = pytest.importorskip("accelerate", reason="needs accelerate, which cannot be imported")

EPOCHS = 4

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(autouse=True)
def own_state():
    """Nothing of one Accelerator is left for the next: they share settings in a process."""
    yield
    states = accelerate.state
    for state in (states.AcceleratorState, states.GradientState, states.PartialState):
        state._reset_state()


class Run:
    """A training that can be stopped; all its parts went through `prepare`."""

    def __init__(self, optimizer_class=Adamax, dtype=torch.float32, accumulated=1, **settings):
        accelerate.state.AcceleratorState._reset_state()
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulated, **settings
        )
        model = make_model(dtype)
        optimizer = optimizer_class(model.parameters(), **SETTINGS)
        schedule = make_schedule(optimizer, EPOCHS * IMAGES // BATCH)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, make_loader(), schedule
        )
        assert type(self.optimizer.optimizer) is optimizer_class

    def train(self, epochs):
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    x = x.to(next(self.model.parameters()).dtype)
                    self.accelerator.backward(loss_of(self.model, (x, y)))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
        return weights_of(self.accelerator.unwrap_model(self.model))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_trains_as_with_torch(accumulated):
    expected = Run(torch.optim.Adamax, accumulated=accumulated).train(EPOCHS)
    assert_near(Run(accumulated=accumulated).train(EPOCHS), expected)


def test_mixed_precision_trains_as_with_torch():
    """Autocast rounds what differs in the last bit to bfloat16 neighbours, now and then."""
    expected = Run(torch.optim.Adamax, mixed_precision="bf16").train(EPOCHS)
    weights = Run(mixed_precision="bf16").train(EPOCHS)
    assert_near(weights, expected, tolerance=1e-2)
    assert all(w.dtype == torch.float32 for w in weights.values())


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulated": 2}, {"mixed_precision": "bf16"}, {"dtype": torch.bfloat16}],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_resumes_bit_for_bit(settings, tmp_path):
    expected = Run(**settings).train(EPOCHS)
    first = Run(**settings)
    first.train(EPOCHS // 2)
    first.accelerator.save_state(tmp_path)
    second = Run(**settings)
    second.accelerator.load_state(tmp_path)
    assert_same(second.train(EPOCHS - EPOCHS // 2), expected)
    if "dtype" in settings:
        assert_float32_state(second.optimizer.optimizer)

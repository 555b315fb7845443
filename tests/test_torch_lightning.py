"""Lightning trains with our Adamax as with torch's, and resumes bit for bit."""

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

lightning = pytest.importorskip(
    "pytorch_lightning", reason="needs pytorch-lightning, which cannot be imported"
)

EPOCHS = 4

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Module(lightning.LightningModule):
    """Optimizes automatically, or by hand with the batches of two steps added up."""

    def __init__(self, optimizer_class, is_automatic=True):
        super().__init__()
        self.model, self.optimizer_class = make_model(), optimizer_class
        self.automatic_optimization = is_automatic

    def configure_optimizers(self):
        optimizer = self.optimizer_class(self.model.parameters(), **SETTINGS)
        schedule = make_schedule(optimizer, EPOCHS * IMAGES // BATCH)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch, index):
        loss = loss_of(self.model, batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss)
        if index % 2 == 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None


def make_trainer(path, epochs=EPOCHS, **settings):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **settings,
    )


def trained(path, optimizer_class, is_automatic=True, **settings):
    module = Module(optimizer_class, is_automatic)
    trainer = make_trainer(path, **settings)
    trainer.fit(module, make_loader())
    assert type(trainer.optimizers[0]) is optimizer_class
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_automatic": False},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_trains_as_with_torch(settings, tmp_path):
    expected = trained(tmp_path, torch.optim.Adamax, **settings)
    assert_near(weights_of(trained(tmp_path, Adamax, **settings).model), weights_of(expected.model))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("is_automatic", [True, False], ids=["automatic", "manual"])
def test_resumes_bit_for_bit(precision, is_automatic, tmp_path):
    uninterrupted = trained(tmp_path, Adamax, is_automatic, precision=precision)

    checkpoint = tmp_path / "half.ckpt"
    first = make_trainer(tmp_path, EPOCHS // 2, precision=precision)
    first.fit(Module(Adamax, is_automatic), make_loader())
    first.save_checkpoint(checkpoint)
    resumed = Module(Adamax, is_automatic)
    second = make_trainer(tmp_path, precision=precision)
    second.fit(resumed, make_loader(), ckpt_path=checkpoint)

    assert second.global_step == EPOCHS * IMAGES // BATCH // (1 if is_automatic else 2)
    assert_same(weights_of(resumed.model), weights_of(uninterrupted.model))
    if precision == "bf16-true":
        assert_float32_state(second.optimizers[0])

"""The Trainer of transformers trains with our Adamax as with torch's, and resumes bit for bit."""

import pytest
from support.torch_training import (
    SETTINGS,
    Adamax,
    assert_float32_state,
    assert_near,
    assert_same,
    make_schedule,
    torch,
    weights_of,
)

transformers = pytest.importorskip(
    "transformers", reason="needs transformers, which cannot be imported"
)
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

WORDS, LENGTH, TEXTS, BATCH, EPOCHS = 16, 10, 32, 4, 4
STEPS = EPOCHS * TEXTS // BATCH

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def make_texts():
    """Each counts in steps of its own, modulo the number of words."""
    starts, strides = torch.arange(TEXTS) % 7, 1 + torch.arange(TEXTS) % 3
    texts = (starts[:, None] + strides[:, None] * torch.arange(LENGTH)) % WORDS
    return [{"input_ids": text, "labels": text} for text in texts]


def make_model(dtype=torch.float32):
    transformers.set_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=0.1,  # so that a resumed run must go on with the same random numbers
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def trained(path, optimizer_class, is_resumed=False, dtype=torch.float32, **settings):
    model = make_model(dtype)
    optimizer = optimizer_class(model.parameters(), **SETTINGS)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            path,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            max_grad_norm=0.5,
            save_steps=STEPS // 2,
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=make_texts(),
        optimizers=(optimizer, make_schedule(optimizer, STEPS, max_lr=0.01)),
    )
    trainer.train(resume_from_checkpoint=is_resumed and f"{path}/checkpoint-{STEPS // 2}")
    assert trainer.state.global_step == STEPS or "gradient_accumulation_steps" in settings
    return weights_of(model), optimizer


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_trains_as_with_torch(settings, tmp_path):
    expected, _ = trained(tmp_path / "torch", torch.optim.Adamax, **settings)
    weights, _ = trained(tmp_path / "ours", Adamax, **settings)
    assert_near(weights, expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"dtype": torch.bfloat16}],
    ids=["float32", "autocast", "bfloat16"],
)
def test_resumes_bit_for_bit(settings, tmp_path):
    expected, _ = trained(tmp_path, Adamax, **settings)
    weights, optimizer = trained(tmp_path, Adamax, is_resumed=True, **settings)
    assert_same(weights, expected)
    if "dtype" in settings:
        assert_float32_state(optimizer)


def test_trainer_makes_the_optimizer(tmp_path):
    trainer = transformers.Trainer(
        make_model(),
        transformers.TrainingArguments(
            tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=make_texts(),
        optimizer_cls_and_kwargs=(Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Adamax
    assert len(trainer.optimizer.param_groups) == 2  # with decay and without

"""The examples for torch and JAX learn to read digits, resume with the same bits, and draw it."""

import importlib.util
import re
from pathlib import Path

import pytest
from support.frameworks import load_jax, load_optax, load_torch

for name in ("sklearn", "matplotlib"):
    pytest.importorskip(name, reason=f"the examples need {name}: adamax_ext[demo]")

EXAMPLES = Path(__file__).parent.parent / "examples"
# Names of the optimizers, and what the example needs.
OPTIMIZERS = {
    "torch_digits": ("adamax_ext.torch", "torch.optim", [load_torch]),
    "jax_digits": ("adamax_ext.jax", "optax", [load_jax, load_optax]),
}


@pytest.fixture(params=OPTIMIZERS)
def example(request, tmp_path, monkeypatch):
    """The module, with the names of its two optimizers as `ours` and `theirs`."""
    ours, theirs, needed = OPTIMIZERS[request.param]
    for load in needed:
        load()
    if load_torch in needed:
        request.getfixturevalue("one_torch_thread")
    monkeypatch.chdir(tmp_path)  # where it leaves its files
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ours, module.theirs = ours, theirs
    return module


def results(text):
    """Return accuracy and digest of the weights by optimizer."""
    found = re.findall(
        r"^(\S+) +held-out accuracy ([\d.]+)%.* weights (\w{16})$", text, re.MULTILINE
    )
    assert len(found) == 2, text
    return {name: (float(percent) / 100, digest) for name, percent, digest in found}


def test_learns_as_with_theirs_and_draws_it(example, tmp_path, capsys):
    import matplotlib.image

    assert example.main(["--epochs", "12", "--output", "picture.png"]) == 0
    accuracies = {
        name: accuracy for name, (accuracy, _) in results(capsys.readouterr().out).items()
    }
    assert accuracies[example.ours] > 0.95
    assert abs(accuracies[example.ours] - accuracies[example.theirs]) < 0.02
    if example.ours == "adamax_ext.jax":  # where both drop the same values
        _, about = example.load(tmp_path / "jax_digits.safetensors")
        losses = {name: history["loss"] for name, history in about["histories"].items()}
        assert losses[example.ours] == pytest.approx(losses[example.theirs], rel=0.02)
    picture = tmp_path / "picture.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    height, width, _ = matplotlib.image.imread(picture, format="png").shape
    assert width >= 1000
    assert height >= 400
    assert picture.stat().st_size > 20_000  # an empty canvas compresses to less


def test_resumes_bit_for_bit(example, capsys):
    assert example.main(["--epochs", "4"]) in (0, 1)
    expected = results(capsys.readouterr().out)
    assert not example.main(["--epochs", "4", "--stop-after", "2"])
    assert "stopped after epoch 2 of 4: --resume goes on" in capsys.readouterr().out
    assert example.main(["--epochs", "4", "--resume"]) in (0, 1)
    assert results(capsys.readouterr().out) == expected
    # So the digest tells runs apart.
    assert expected[example.ours][1] != expected[example.theirs][1]


def test_another_length_than_that_of_the_checkpoint_is_refused(example, capsys):
    example.main(["--epochs", "2", "--stop-after", "1"])
    with pytest.raises(SystemExit):
        example.main(["--epochs", "3", "--resume"])
    assert "made for --epochs 2" in capsys.readouterr().err

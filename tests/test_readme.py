"""What the README shows runs, and says what is there."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from adamax_ext import Adamax
from support.building import run_cpp
from support.frameworks import load_keras, load_torch

README = (Path(__file__).parent.parent / "README.md").read_text()
SETTINGS = [
    [cell.strip() for cell in line.split("|")[1:4]]
    for line in re.findall(r"\n(\| `.*)", README.partition("## Settings")[2].partition("\n## ")[0])
]


def block(language, title):
    """The first one in the section with this title."""
    section = README[README.index(f"\n## {title}\n") :]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL).group(1)


def assert_prints_0_to_7(program, capsys):
    exec(program, {})
    printed = re.findall(r"-?\d+\.\d*", capsys.readouterr().out)
    np.testing.assert_allclose([float(word) for word in printed], range(8), atol=0.011)


def test_python_example(capsys):
    assert_prints_0_to_7(block("python", "In Python"), capsys)


def test_torch_example(capsys):
    load_torch().manual_seed(0)
    assert_prints_0_to_7(block("python", "In torch"), capsys)


def test_low_memory_example():
    torch, names = load_torch(), {}
    exec(block("python", "Training with less memory"), names)
    weight, optimizer = names["model"].weight, names["optimizer"]
    names["model"](torch.ones(256, dtype=weight.dtype)).sum().backward()
    optimizer.step()
    kept = [weight, *optimizer.state[weight].values()]
    bytes_of_one = sum(tensor.numel() * tensor.itemsize for tensor in kept) / weight.numel()
    assert f"{bytes_of_one:.2f}, 10 |" in README  # of the table


# Of Keras, whose variables do not yet say `copy` to NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_example(capsys):
    load_keras().utils.set_random_seed(0)
    assert_prints_0_to_7(block("python", "In Keras"), capsys)


def test_jax_example(capsys):
    pytest.importorskip("jax", reason="adamax_ext.jax needs jax")
    assert_prints_0_to_7(block("python", "In JAX"), capsys)


def test_examples_that_are_named_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / path).exists(), path


def test_cpp_example(cpp_library, tmp_path):
    run_cpp(cpp_library, block("cpp", "In C++"), tmp_path)


def test_settings_and_their_defaults():
    documented = {}
    for names, defaults, _ in SETTINGS:
        values = [default.replace("1e-7", "1e-07") for default in defaults.split(", ")]
        documented |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    parameters = inspect.signature(Adamax).parameters.values()
    assert documented == {p.name: str(p.default) for p in parameters if p.name != "name"}

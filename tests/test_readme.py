"""What the README shows runs, and says what is there."""

import inspect
import re
from pathlib import Path

import numpy as np
from adamax_ext import Adamax
from support.building import run

README = (Path(__file__).parent.parent / "README.md").read_text()
SETTINGS = [
    [cell.strip() for cell in line.split("|")[1:4]]
    for line in re.findall(r"\n(\| `.*)", README[: README.index("## What differs")])
]


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_python_example(capsys):
    exec(block("python"), {})
    printed = capsys.readouterr().out.strip("[]\n").split()
    np.testing.assert_allclose([float(word) for word in printed], range(8), atol=0.011)


def test_cpp_example(cpp_library, tmp_path):
    source, program = tmp_path / "example.cpp", tmp_path / "example"
    source.write_text(block("cpp"))
    (archive,) = cpp_library.prefix.rglob("*.a")
    include = cpp_library.prefix / "include"
    run("c++", "-std=c++20", "-pthread", f"-I{include}", source, archive, "-o", program)
    run(program)


def test_settings_and_their_defaults():
    documented = {}
    for names, defaults, _ in SETTINGS:
        values = [default.replace("1e-7", "1e-07") for default in defaults.split(", ")]
        documented |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    parameters = inspect.signature(Adamax).parameters.values()
    assert documented == {p.name: str(p.default) for p in parameters if p.name != "name"}

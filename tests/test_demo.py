"""The command line: the demonstration reaches its accuracy and says when it does not."""

import re
import sys
from pathlib import Path

import adamax_ext
import pytest
from adamax_ext.__main__ import main

# Of the newest pyparsing, about older names, which the lowest matplotlib uses.
pytestmark = pytest.mark.filterwarnings("ignore:'.*deprecated:DeprecationWarning")


@pytest.fixture
def demo_packages():
    for name in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(name, reason=f"the demonstration needs {name}: adamax_ext[demo]")


def printed_accuracy(text):
    match = re.search(r"test accuracy +([\d.]+)% with averaged weights", text)
    assert match, text
    return float(match[1]) / 100


@pytest.mark.usefixtures("demo_packages")
def test_demo_reaches_the_target_and_draws_it(tmp_path, capsys):
    import matplotlib.image

    picture = tmp_path / "demo.png"
    assert main(["demo", "--output", str(picture)]) == 0
    text = capsys.readouterr().out
    assert printed_accuracy(text) >= 0.97
    assert "target 97%: reached" in text
    assert re.search(r"same bits +yes", text)
    assert re.search(r"optimizer step +[\d.]+ us, the same formula in plain NumPy [\d.]+ us", text)
    height, width, _ = matplotlib.image.imread(picture, format="png").shape
    assert width >= 1000
    assert height >= 400
    assert picture.stat().st_size > 20_000  # an empty canvas compresses to less


@pytest.mark.usefixtures("demo_packages")
def test_demo_that_misses_the_target_fails(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert main(["demo", "--epochs", "1", "--output", str(picture)]) == 1
    text = capsys.readouterr().out
    assert printed_accuracy(text) < 0.97
    assert "target 97%: MISSED" in text
    assert re.search(r"same bits +yes", text)  # so the status is the accuracy's
    assert picture.exists()


@pytest.mark.usefixtures("demo_packages")
@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "tqdm"])
def test_demo_names_what_to_install(package, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    monkeypatch.delitem(sys.modules, "adamax_ext.demo", raising=False)
    monkeypatch.delattr(adamax_ext, "demo", raising=False)
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert package in error
    assert 'pip install "adamax_ext[demo]"' in error


def test_info_says_the_version_and_one_key_a_line(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    info = adamax_ext.build_info()
    assert [line.split()[0] for line in lines] == list(info)
    assert lines[list(info).index("version")].split()[1] == adamax_ext.__version__


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["demo", "--epochs", "0"], "at least 1, received 0"),
        (["demo", "--seed", "-1"], "at least 0, received -1"),
        (["demo", "--output", str(Path("no", "such", "folder.png"))], "existing folder"),
    ],
)
def test_arguments_that_make_no_sense(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

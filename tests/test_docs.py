"""The site in docs: its code runs, prints what it says, and its commands and files are there."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from importlib.metadata import metadata

import pytest
from adamax_ext.__main__ import main
from support.building import REPOSITORY, cmake, configure, run, run_cpp

DOCS = REPOSITORY / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.M | re.S)
FRAMEWORK = re.compile(r"^(?:import|from) (?:adamax_ext\.)?(torch|keras|jax)\b", re.M)
BEGIN, END = "--- block", "--- end of block"


def blocks(page, language):
    return [text for found, text in FENCE.findall(PAGES[page]) if found == language]


def pages_with(language):
    pages = [page for page in PAGES if blocks(page, language)]
    assert pages
    return pages


def test_languages_of_blocks():
    """Each has a test below, and no fence is indented or in another form, which none would see."""
    for page, text in PAGES.items():
        found = {language for language, _ in FENCE.findall(text)}
        roles = {"{toctree}", "{eval-rst}", "{literalinclude}"}
        assert found <= {"python", "text", "cpp", "cmake", "console"} | roles, page
        assert len(re.findall(r"```|~~~", text)) == 2 * len(FENCE.findall(text)), page


def expected_outputs(page):
    """Return what each block of Python prints, or None where the page does not say it."""
    fences = [*FENCE.findall(PAGES[page]), ("", "")]
    for i, (language, _) in enumerate(fences):
        assert language != "text" or fences[i - 1][0] == "python", page
    return [
        after[1] if after[0] == "text" else None
        for (language, _), after in itertools.pairwise(fences)
        if language == "python"
    ]


def program(page):
    """Return all blocks of Python in the lines that they have on the page."""
    lines, inside = [], False
    for line in PAGES[page].splitlines():
        if line == "```python":
            inside, line = True, f"print({BEGIN!r})"
        elif inside and line == "```":
            inside, line = False, f"print({END!r})"
        elif not inside:
            line = ""
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page, tmp_path):
    """In one process, in the order of the page."""
    code = program(page)
    for name in FRAMEWORK.findall(code):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{page} needs {name}, which is not installed")
    source = tmp_path / "page.py"
    source.write_text(code)
    result = subprocess.run(
        [sys.executable, source],
        cwd=tmp_path,
        env={"KERAS_BACKEND": "torch", **os.environ},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    printed = re.findall(rf"^{BEGIN}\n(.*?)^{END}$", result.stdout, re.M | re.S)
    for expected, received in zip(expected_outputs(page), printed, strict=True):
        assert expected is None or received == expected


@pytest.mark.parametrize("page", pages_with("cpp"))
def test_cpp(page, cpp_library, tmp_path):
    for program in blocks(page, "cpp"):
        run_cpp(cpp_library, program, tmp_path)


@pytest.mark.parametrize("page", pages_with("cmake"))
def test_cmake(page, cpp_library, tmp_path):
    (project,), (source,) = blocks(page, "cmake"), blocks(page, "cpp")
    (tmp_path / "CMakeLists.txt").write_text(project)
    name, file = re.search(r"add_executable\((\w+) (\S+)\)", project).groups()
    (tmp_path / file).write_text(source)
    build = tmp_path / "build"
    configure(tmp_path, build, f"-DCMAKE_PREFIX_PATH={cpp_library.prefix}")
    cmake("--build", build)
    run(build / name)


@pytest.mark.parametrize("page", pages_with("console"))
def test_commands(page):
    extras = metadata("adamax_ext").get_all("Provides-Extra")
    for line in "".join(blocks(page, "console")).splitlines():
        if found := re.fullmatch(r'\$ pip install (?:\.|"\.\[([\w,]+)\]")(?: -C\S+)*', line):
            assert set(filter(None, (found[1] or "").split(","))) <= set(extras), line
        elif found := re.fullmatch(r"\$ python -m adamax_ext (\w+)", line):
            with pytest.raises(SystemExit, match=r"^0$"):
                main([found[1], "--help"])
        elif found := re.fullmatch(r"\$ python (\S+)(?: \S+)?", line):
            assert (REPOSITORY / found[1]).is_file(), line
        else:  # of which conftest's cpp_library does the same
            assert re.match(r"\$ cmake (-S|--build|--install) ", line), line
        for option in re.findall(r"(?:-D|cmake\.define\.)(\w+)=", line):
            assert f"{option} " in (REPOSITORY / "CMakeLists.txt").read_text(), option


def test_files_that_are_named_exist():
    names = {
        name for text in PAGES.values() for name in re.findall(r"`((?:tests/|test_)\S+\.py)`", text)
    }
    assert names
    for name in names:
        assert (REPOSITORY / "tests" / name.removeprefix("tests/")).is_file(), name

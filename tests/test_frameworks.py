"""What imports which framework, and what is said where one is missing."""

import subprocess
import sys

import pytest


def run(code):
    """Run in a new process; return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_package_imports_no_framework():
    code = """
import sys
import adamax_ext, numpy
adamax_ext.Adamax().build([numpy.zeros(3, numpy.float32)])
print([name for name in ("torch", "jax", "keras", "tensorflow") if name in sys.modules])
"""
    assert run(code) == "[]"


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {framework!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
import adamax_ext
try:
    import adamax_ext.{framework}
except ImportError as error:
    print(error)
    assert isinstance(error.__cause__, ModuleNotFoundError)
"""


@pytest.mark.parametrize("framework", ["torch", "jax", "keras"])
def test_a_missing_framework_is_named(framework):
    said = run(BLOCKED.format(framework=framework))
    assert said.startswith(f"adamax_ext.{framework} needs {framework}")
    assert said.endswith(f"pip install {framework}")


@pytest.mark.parametrize(
    ("framework", "old", "needed"), [("jax", (0, 5, 3), "0.6"), ("keras", (3, 14, 1), "3.15")]
)
def test_an_old_framework_is_named(framework, old, needed):
    version = ".".join(map(str, old))
    code = f"""
import sys, types
old = types.ModuleType("{framework}")
old.__version__, old.__version_info__ = "{version}", {old}
sys.modules["{framework}"] = old
import adamax_ext
try:
    import adamax_ext.{framework}
except ImportError as error:
    print(error)
"""
    said = run(code)
    expected = f"adamax_ext.{framework} needs {framework} {needed} or newer; received {framework} "
    assert said == expected + version

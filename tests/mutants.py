"""Whether the suite notices faults: `python tests/mutants.py` makes each of them, in a copy.

Prints which test killed which mutant, as Markdown; fails if one survives. Names given as arguments
choose mutants. Needs what builds the package (``build-system.requires``, ninja), its extra
``test``, torch, JAX and Keras in this environment.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from support.building import REPOSITORY, cmake, configure, run
from support.faults import MUTANTS

HANG_SECONDS = 600  # a mutant that makes a test wait for ever is killed, too

# What makes building the copy cheap, with the build type that does not optimize: no AVX-512.
CHEAPER = [
    ("CMakeLists.txt", r"add_isa\(avx512[^()]*\)\n", ""),
    ("tests/support/emulated.py", '"-O2"', '"-O0"'),
]


def copy_to(folder):
    """Copy what git does not ignore, and configure it so that the module gets into the package."""
    listed = run(
        "git", "-C", REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    )
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    for name, pattern, replacement in CHEAPER:
        text, count = re.subn(pattern, replacement, (folder / name).read_text())
        assert count == 1, f"{pattern} is {count} times in {name}"
        (folder / name).write_text(text)
    configure(
        folder,
        folder / "build",
        *("-DADAMAX_EXT_PYTHON=ON", "-DADAMAX_EXT_CUDA=OFF"),
        *("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG="),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={run(sys.executable, '-m', 'pybind11', '--cmakedir').strip()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'python/adamax_ext'}",
    )


def pytest(folder, *tests):
    """Return exit status (None: it waited for ever) and output of tests of a copy."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-xq", "--tb=line", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "python"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # to end its children with it
    )
    try:
        output, _ = process.communicate(timeout=HANG_SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def killer_of(mutant, folder):
    """Return what noticed a mutant that is made in a copy, or None."""
    path = folder / mutant.path
    path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
    cmake("--build", folder / "build", "--target", "_core", "--parallel", 1)
    status, output = pytest(folder, mutant.test)
    if status == 0:
        return None
    if status is None:
        return f"`{mutant.test}` waits for ever"
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    assert status == 1 and failed, f"{mutant.name}: no test failed, but pytest ended\n{output}"
    return f"`{failed[1].partition('[')[0]}`"


def main(names):
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    assert not unknown, f"there are no mutants {unknown}"
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory() as temporary:
        # Always in one folder, as its path is in the build; so only what a mutant touches is built.
        folder, unchanged = Path(temporary, "copy"), Path(temporary, "unchanged")
        copy_to(folder)
        cmake("--build", folder / "build", "--target", "_core", "--parallel", 1)
        status, output = pytest(folder, *dict.fromkeys(mutant.test for mutant in mutants))
        if status != 0 or " skipped" in output.splitlines()[-1]:
            raise SystemExit(f"{output}\nwithout a mutant, all these tests must run and pass")
        folder.rename(unchanged)
        print("| mutant | where | killed by |\n|---|---|---|")
        killed = 0
        for mutant in mutants:
            shutil.copytree(unchanged, folder)  # with the times, by which the build goes
            killer = killer_of(mutant, folder)
            shutil.rmtree(folder)
            killed += killer is not None
            print(f"| {mutant.name} | {mutant.place} | {killer or '**survived**'} |", flush=True)
    print(f"\n{killed} of {len(mutants)} mutants killed")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Machine code of a GPU as cuobjdump prints it, and whether its loads are waited for together."""

import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
# What ends a stretch of loads: a branch, a barrier, a store. BSSY only notes where threads meet.
ENDS = re.compile(
    r"(BRA|BRX|JMP|CALL|RET|EXIT|BSYNC|WARPSYNC|BREAK|BAR|DEPBAR|MEMBAR|ST|STG|STS|ATOM|RED)\b.*"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `BRA 0xb0` at address 0x60 with the guard `@!P0`."""

    address: int
    guard: str
    name: str
    operands: str

    def __str__(self):
        return f"{self.address:04x} {self.guard} {self.name} {self.operands}"

    @property
    def registers(self):
        """Numbers of the registers that it reads or writes, the guard's aside."""
        # Of a pair the first is named; of four only loads and stores have them.
        wide = re.match(r"D(ADD|MUL|FMA|SETP)\b|F2F\.F32\.F64", self.name)
        found = set()
        for register, is_pair in re.findall(r"\bR(\d+)(\.64)?", self.operands):
            found |= {*range(int(register), int(register) + (2 if wide or is_pair else 1))}
        return found | self.loaded

    @property
    def loaded(self):
        """Numbers of the registers that a load from global memory writes."""
        if not self.name.startswith("LDG."):
            return set()
        first = int(re.match(r"R(\d+)", self.operands)[1])
        size = re.search(r"\.(64|128)\b", self.name)
        return {*range(first, first + (int(size[1]) // 32 if size else 1))}


def tool():
    """Return the path of cuobjdump; skip if there is none."""
    found = shutil.which("cuobjdump")
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations if package and not found else ():
        found = next(map(str, Path(folder).rglob("bin/cuobjdump")), found)
    if found is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    return found


def disassembled(cubin):
    """Return the instructions of each function by its name."""
    path = {"PATH": f"{Path(tool()).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    command = [tool(), "-sass", cubin]
    return parsed(
        subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout
    )


def parsed(listing):
    functions = collections.defaultdict(list)
    for line in listing.splitlines():
        if (match := re.search(r"Function : (\S+)", line)) is not None:
            code = functions[match[1]]
        elif match := LINE.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
    assert functions, "cuobjdump printed no code"
    return functions


def count(code, pattern):
    return sum(re.fullmatch(pattern, instruction.name) is not None for instruction in code)


def stretches(code):
    """Cut the code where it branches, is branched to, waits at a barrier or stores."""
    targets = {
        int(t, 16)
        for i in code
        for t in re.findall(r"\b0x[0-9a-f]+$", i.operands)
        if re.match(r"BRA|CALL|BSSY", i.name)
    }
    stretch = []
    for instruction in code:
        ends = ENDS.fullmatch(instruction.name)
        if instruction.address in targets and stretch:
            yield stretch
            stretch = []
        if not ends:
            stretch.append(instruction)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def loads(stretch, pattern=r"LDG\..*"):
    """The loads from global memory that always take place."""
    return [i for i in stretch if re.fullmatch(pattern, i.name) and not i.guard]


def waits(stretch, pattern=r"LDG\..*"):
    """The instructions that wait for a load before the last of those that always take place."""
    last = loads(stretch, pattern)[-1]
    pending, waiting = set(), []
    for instruction in stretch[: stretch.index(last) + 1]:
        if instruction.registers & pending:
            waiting.append(str(instruction))
        pending |= instruction.loaded
    return waiting

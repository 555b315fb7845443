"""Whether a wheel is as small and as closed as it should be: ``wheel.py WHEEL``.

Prints what it found; AssertionError for a size, a library or an exported symbol too much.
pyelftools comes with auditwheel.
"""

import re
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

MOST_BYTES = 3_000_000  # a wheel for one processor family, without CUDA
# Of every Linux: the C library's, and the C++ runtime's, which PyPI's standard allows.
LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so\.\d+")

wheel = Path(sys.argv[1])
size = wheel.stat().st_size
print(f"{wheel.name}: {size:,} bytes")
assert size <= MOST_BYTES, f"expected at most {MOST_BYTES:,}"
with zipfile.ZipFile(wheel) as files:
    libraries = [name for name in files.namelist() if ".so" in name]
    assert libraries
    for name in libraries:
        elf = ELFFile(files.open(name))
        tags = elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        needed = [tag.needed for tag in tags]
        exported = [
            symbol.name
            for symbol in elf.get_section_by_name(".dynsym").iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
        ]
        print(f"{name}: needs {needed}, exports {exported}")
        assert all(LIBRARIES.fullmatch(library) for library in needed), needed
        assert exported and all(symbol.startswith("PyInit_") for symbol in exported), exported

"""Print the path of a dlpack.h that has the C exchange table, of a package that is installed."""

import importlib.util
import sys
from pathlib import Path

PLACES = {"tvm_ffi": "include/dlpack/dlpack.h", "torch": "include/ATen/dlpack.h"}

tried = []
for package, place in PLACES.items():
    spec = importlib.util.find_spec(package)  # without an import: torch's takes seconds
    if spec is None or spec.origin is None:
        tried.append(f"{package} is not installed")
        continue
    header = Path(spec.origin).parent / place
    if header.is_file() and "DLPackExchangeAPI;" in header.read_text():
        print(header.as_posix())
        break
    tried.append(f"{header} is missing, or older than DLPack 1.2")
else:
    sys.exit(
        f"No dlpack.h with the C exchange table for {sys.executable}: {'; '.join(tried)}; expected "
        "one of: pip install 'apache-tvm-ffi>=0.1.2', or torch 2.10 or newer"
    )

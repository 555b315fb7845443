"""What a run is measured on, and with."""

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "os": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the version of each contestant's packages; absent ones are left out."""
    imports = {name for kind in CONTESTANTS.values() for name in kind.packages}
    found = importlib.metadata.packages_distributions()
    names = sorted({distribution for name in imports for distribution in found.get(name, ())})
    return {name: importlib.metadata.version(name) for name in names}


def default_path(device: str) -> Path:
    kind = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    today = datetime.date.today().isoformat()
    name = f"{kind}-{len(os.sched_getaffinity(0))}-cores-{device}-{today}.json"
    return Path(__file__).parent / "results" / name

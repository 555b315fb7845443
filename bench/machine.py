"""What a run is measured on, and with."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
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


def machine_text(of: dict[str, Any]) -> str:
    """Return what `machine` found as words."""
    return (
        f"{of['cpu']}, {of['cores']} cores, {of['memory_bytes'] / 2**30:.0f} GiB, {of['os']}, "
        f"kernel {of['kernel']}, Python {of['python']}"
    )


def nvidia_smi(query: str) -> str:
    """Return what it says of the first GPU; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def gpu(cuda: Any) -> dict[str, Any]:
    """Return what torch.cuda and the driver say of the GPU."""
    about = cuda.get_device_properties(0)
    return {
        "name": about.name,
        "memory_bytes": about.total_memory,
        "l2_bytes": about.L2_cache_size,
        "driver_and_clocks": nvidia_smi("driver_version,clocks.max.sm,clocks.max.mem"),
    }


def versions() -> dict[str, str]:
    """Return the version of each contestant's packages; absent ones are left out."""
    imports = {name for kind in CONTESTANTS.values() for name in kind.packages}
    found = importlib.metadata.packages_distributions()
    names = sorted({distribution for name in imports for distribution in found.get(name, ())})
    return {name: importlib.metadata.version(name) for name in names}


def default_name(device: str) -> str:
    """Return a name for a run's file."""
    cpu = f"{cpu_model()} {len(os.sched_getaffinity(0))} cores"
    name = f"{cpu if device == 'cpu' else nvidia_smi('name')} {device}"
    kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{kind}-{datetime.date.today().isoformat()}.json"

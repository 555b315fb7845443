"""The step beside its physical limit and the NumPy formula, in one process and in turns.

Run as ``python bench/step.py`` with adamax_ext installed, a C++ compiler and CMake. Prints medians,
the spread between quartiles, and the ratios that the project promises.
"""

import argparse
import ctypes
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import adamax_ext
import numpy as np

HERE = Path(__file__).parent
VARIANTS = [(prefetch, chunked) for prefetch in (0, 1) for chunked in (0, 1)]


def load_traffic(folder: str) -> Callable[..., None]:
    """Build bench/cpp in `folder` and return its traffic loop."""
    source = str(HERE / "cpp")
    for command in (["cmake", "-S", source, "-B", folder], ["cmake", "--build", folder]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    loop = ctypes.CDLL(f"{folder}/libtraffic.so").traffic
    pointer = ctypes.c_void_p
    loop.argtypes = [pointer] * 4 + [ctypes.c_int64] + [ctypes.c_int] * 3
    loop.restype = None
    return loop


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each work once a round, in seconds, so that a noisy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times


def numpy_step(w, g, m, u, step, rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """The formula as the project's NumPy program has it."""
    corrected = np.float32(rate / -math.expm1(step * math.log(beta_1)))
    m[...] = m + (g - m) * np.float32(1 - beta_1)
    u[...] = np.maximum(u * np.float32(beta_2), np.abs(g))
    m[np.abs(m) < np.float32(2.0**-102)] = 0
    u[u < np.float32(2.0**-102)] = 0
    w[...] = w - (corrected * m) / (u + np.float32(epsilon))


def describe(times: list[float], unit: float) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle / unit:10.3f} ({low / unit:.3f} to {high / unit:.3f})"


def large(loop: Callable[..., None], exponent: int, rounds: int) -> None:
    """A plain float32 step on one array of 2**exponent elements."""
    n, threads = 2**exponent, adamax_ext.get_num_threads()
    rng = np.random.default_rng(exponent)
    w, g = (rng.standard_normal(n, dtype=np.float32) for _ in range(2))
    optimizer = adamax_ext.Adamax()
    optimizer.build([w])
    m, u = optimizer.variables[-2:]
    # All on the same memory: where the system put its pages matters.
    addresses = [array.ctypes.data for array in (w, g, m, u)]
    works: dict[str, Callable[[], object]] = {
        f"traffic{' prefetch' * prefetch}{' chunked' * chunked}": (
            lambda prefetch=prefetch, chunked=chunked: loop(
                *addresses, n, threads, prefetch, chunked
            )
        )
        for prefetch, chunked in VARIANTS
    }
    works["adamax_ext"] = lambda: optimizer.apply([g])
    times = in_turns(works, rounds)
    # By itself: its temporaries, 256 MiB each at 2^26, come from the system and go back at every
    # operation, and slow down what runs beside them.
    times |= in_turns({"NumPy": lambda: numpy_step(w, g, m, u, 5)}, max(5, rounds // 10))

    print(f"2^{exponent} elements, milliseconds: median (quartiles)")
    for name, values in times.items():
        print(f"  {name:26s} {describe(values, 1e-3)}")
    ours = statistics.median(times["adamax_ext"])
    bound = min(statistics.median(v) for name, v in times.items() if name.startswith("traffic"))
    print(f"  of the bound {bound / ours:.3f}, {28 * n / ours / 1e9:.1f} GB/s")
    print(f"  times as fast as NumPy {statistics.median(times['NumPy']) / ours:.1f}\n", flush=True)


def small(count: int, size: int, rounds: int) -> None:
    """The whole `apply` on many small arrays."""
    arrays = [np.ones(size, np.float32) for _ in range(count)]
    grads = [np.full(size, 0.01, np.float32) for _ in range(count)]
    optimizer = adamax_ext.Adamax()
    optimizer.build(arrays)
    times = in_turns({"apply": lambda: optimizer.apply(grads)}, rounds)["apply"]
    per_array = [t / count for t in times]
    print(f"{count} x {size} through apply, microseconds a call: {describe(times, 1e-6)}")
    print(f"  nanoseconds an array: {describe(per_array, 1e-9)}\n", flush=True)


def zero_gradients(steps: int = 1200, size: int = 2**18) -> None:
    """A gradient that is zero after the first step: later steps are no slower than the first."""
    w, g = np.ones(size, np.float32), np.full(size, 1e-3, np.float32)
    optimizer = adamax_ext.Adamax()
    optimizer.build([w])
    optimizer.apply([g])
    g[:] = 0
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.apply([g])
        times.append(time.perf_counter() - start)
    first, last = statistics.median(times[:100]), statistics.median(times[-100:])
    print(f"zero gradients for {steps} steps: last 100 against first 100: {last / first:.3f}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="rounds at 2^24 (fewer at 2^26)")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {adamax_ext.build_info()}")
    print(f"threads {adamax_ext.get_num_threads()}, NumPy {np.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        loop = load_traffic(folder)
        for exponent in (14, 20, 24, 26):
            large(
                loop, exponent, math.ceil(arguments.rounds * min(8.0, 2 ** ((24 - exponent) / 2)))
            )
    small(400, 256, 2000)
    small(1, 1000, 20000)
    zero_gradients()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is measured on each device: works, each with the contestants that take turns in it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from contestants import CONTESTANTS
from contestants.base import Work
from duels import Entry
from rows import FOREACH, FUSED, OURS, OURS_TORCH

OURS_FLAT = "adamax_ext, one flat array"
PEERS = [name for name in CONTESTANTS if not name.startswith(OURS)]

GPT2_BLOCK = (
    *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
    *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
)
GPT2_SMALL = Work("GPT-2 small", ((50257, 768), (1024, 768), *(GPT2_BLOCK * 12), (768,), (768,)))


def power(exponent: int, **options: Any) -> Work:
    """One array of 2^exponent elements."""
    kind = next((name for name in ("full", "norm") if options.get(name)), None)
    name = kind or options.get("dtype", "plain")
    return Work(f"{name} 2^{exponent}", ((2**exponent,),), **options)


def entries(work: Work, threads: int, *names: str) -> list[Entry]:
    return [Entry(work, name, threads) for name in names]


def cpu_plan(threads: int, quick: bool) -> Iterator[list[Entry]]:
    exponents = (10, 14, 20) if quick else range(10, 29)
    with_peers = (14,) if quick else (14, 20, 24, 26)
    one_thread = (14, 20) if quick else (14, 24)
    large, many = (20, 20) if quick else (24, 400)
    spare = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.5
    everyone = (OURS, OURS_TORCH, *PEERS)
    for exponent in exponents:
        if 16 * 2**exponent > spare:
            print(f"2^{exponent} elements are left out: they would take half of the memory")
            continue
        work = power(exponent)
        yield [
            *entries(work, threads, *(everyone if exponent in with_peers else (OURS,))),
            *entries(work, 1, *((OURS,) if exponent in one_thread and threads > 1 else ())),
        ]
    yield entries(power(large, full=True), threads, *everyone)
    yield entries(power(large, dtype="bfloat16"), threads, *everyone)
    for backward in (False, True):
        name = f"{many} x 256{' after backward' * backward}"
        work = Work(name, ((256,),) * many, after_backward=backward)
        yield entries(work, threads, *everyone)
    if not quick:
        yield entries(GPT2_SMALL, threads, OURS, OURS_FLAT, FUSED)


def cuda_plan(threads: int, quick: bool) -> Iterator[list[Entry]]:
    """What has goals comes first, and compilers last: a run may be cut."""
    exponents = (20, 16, 12) if quick else (28, 26, 22, 20, 16, 12)
    large, many, compiled = (20, 20, 14) if quick else (28, 400, 24)
    small, three = ((256,),) * many, (OURS_TORCH, FUSED, FOREACH)
    arrays = Work(f"{many} x 256", small)
    groups = Work(f"{many} groups of 256", small, groups=True)
    models = () if quick else (GPT2_SMALL,)
    by_dtype = [power(large - 1, dtype=dtype) for dtype in ("bfloat16", "float16", "float64")]
    for exponent in exponents:
        yield entries(power(exponent), threads, *three)
    yield entries(power(large, full=True), threads, *three)
    yield entries(power(large, norm=True), threads, OURS_TORCH)
    for work in (arrays, *models):
        yield entries(work, threads, *three)
    for work in (power(12), arrays, groups, *models):
        called = replace(work, name=f"host time, {work.name}", host=True)
        yield entries(called, threads, *(three if work is not groups else three[:2]))
    for work in (groups, *by_dtype):
        yield entries(work, threads, *three[:2])
    others = [n for n in PEERS if n not in three and "cuda" in CONTESTANTS[n].devices]
    yield entries(power(compiled), threads, *three, *others)


def plan(device: str, threads: int, quick: bool) -> list[list[Entry]]:
    """Return the works, each a list of entries whose first is ours."""
    return list((cpu_plan if device == "cpu" else cuda_plan)(threads, quick))

"""What is measured on each device: works, each with the contestants that take turns in it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from contestants import CONTESTANTS
from contestants.base import Work
from duels import Entry
from rows import (
    FOREACH,
    FUSED,
    LOOP,
    OURS,
    OURS_8,
    OURS_16,
    OURS_CLASS,
    OURS_CLASS_8,
    OURS_TORCH,
    PEER_OF,
    PEERS_8,
)

OURS_FLAT = "adamax_ext, one flat array"
LOW_MEMORY = (OURS_16, OURS_8, OURS_CLASS_8, *PEERS_8)
PEERS = [n for n in CONTESTANTS if not n.startswith(OURS) and n not in PEERS_8]
CLASSES = (OURS_CLASS, LOOP, FOREACH, FUSED)  # that are an import apart

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
    in_groups = (many,) if quick else (10, many)
    spare = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.5
    everyone = (OURS, OURS_TORCH, OURS_CLASS, *PEER_OF, *PEERS)
    for exponent in exponents:
        if 16 * 2**exponent > spare:
            print(f"2^{exponent} elements are left out: they would take half of the memory")
            continue
        work = power(exponent)
        yield [
            *entries(work, threads, *(everyone if exponent in with_peers else (OURS,))),
            *entries(work, threads, *(LOW_MEMORY if exponent in (14, large) else ())),
            *entries(work, 1, *((OURS,) if exponent in one_thread and threads > 1 else ())),
        ]
    yield entries(power(large, full=True), threads, *everyone)
    yield entries(power(large, dtype="bfloat16"), threads, *everyone, *LOW_MEMORY)
    for backward in (False, True):
        name = f"{many} x 256{' after backward' * backward}"
        work = Work(name, ((256,),) * many, after_backward=backward)
        grouped = [replace(work, name=f"{name}, {n} groups", groups=n) for n in in_groups]
        yield [
            *entries(work, threads, *everyone),
            *(entry for one in grouped for entry in entries(one, threads, *CLASSES)),
        ]
    work = replace(power(large), name=f"2^{large} after backward", after_backward=True)
    yield entries(work, threads, OURS, *CLASSES)
    if not quick:
        yield entries(GPT2_SMALL, threads, OURS, OURS_FLAT, *CLASSES, *PEER_OF, *PEER_OF.values())


def cuda_plan(threads: int, quick: bool) -> Iterator[list[Entry]]:
    """What has goals comes first, and compilers last: a run may be cut."""
    exponents = (20, 16, 12) if quick else (28, 26, 22, 20, 16, 12)
    large, many, compiled = (20, 20, 14) if quick else (28, 400, 24)
    small, four = ((256,),) * many, (OURS_TORCH, OURS_CLASS, FUSED, FOREACH)
    arrays = Work(f"{many} x 256", small)
    groups = Work(f"{many} groups of 256", small, groups=many)
    models = () if quick else (GPT2_SMALL,)
    by_dtype = [power(large - 1, dtype=dtype) for dtype in ("bfloat16", "float16", "float64")]
    for exponent in exponents:
        yield entries(power(exponent), threads, *four)
    yield entries(power(large, full=True), threads, *four)
    yield entries(power(large, norm=True), threads, OURS_TORCH)
    for work in (arrays, *models):
        yield entries(work, threads, *four)
    for work in (power(12), arrays, groups, *models):
        called = replace(work, name=f"host time, {work.name}", host=True)
        yield entries(called, threads, *(four if work is not groups else four[:3]))
    for work in (groups, *by_dtype):
        yield entries(work, threads, *four[:3])
    others = [n for n in PEERS if n not in four and "cuda" in CONTESTANTS[n].devices]
    yield entries(power(compiled), threads, *four, *PEER_OF, *others)


def plan(device: str, threads: int, quick: bool) -> list[list[Entry]]:
    """Return lists of entries: the first one is ours, and takes turns with each other one."""
    return list((cpu_plan if device == "cpu" else cuda_plan)(threads, quick))

"""Two ways to do one thing, timed in turns in one process, and a csv row of what came out."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.report import rows

HERE = Path(__file__).parent
TABLE = HERE / "results.csv"
UNITS = {"ms": 1e3, "mib": 1.0}  # of a row's numbers -> what seconds are times it; memory is measured in MiB
Way = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """What is done, by whom, and how much of it: flops of one call by the plain algorithm (0 for what has none)."""

    what: str
    setting: str
    peer: str
    flops: float = 0.0


def seconds(way: Way, calls: int) -> float:
    """Of one call, a GPU's work included."""
    done()
    start = time.perf_counter()
    for _ in range(calls):
        way()
    done()
    return (time.perf_counter() - start) / calls


def done() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(ours: Way, theirs: Way, pairs: int, at_least: float = 0.3) -> tuple[list[float], list[float]]:
    """Seconds a call of each, once a pair, whoever begins taking turns; a measurement lasts at_least so many seconds."""
    calls = [max(1, round(at_least / max(seconds(way, 1), 1e-6))) for way in (ours, theirs) if (way(), True)]
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs):
        gc.collect()
        for side in (0, 1) if turn % 2 else (1, 0):
            found[side].append(seconds((ours, theirs)[side], calls[side]))
    return found


def told(
    work: Work,
    threads: int,
    ours: list[float],
    theirs: list[float],
    equal: str,
    peak: float = 0.0,
    unit: str = "ms",
    **more: Any,
) -> dict[str, Any]:
    """A row: medians in one of UNITS, the median of the pairs' ratios theirs / ours with their range, FLOP/s as parts
    of the peak's.
    """
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    mine, other = statistics.median(ours), statistics.median(theirs)
    row: dict[str, Any] = {"what": work.what, "setting": work.setting, "peer": work.peer, "threads": threads}
    row |= {f"ours_{unit}": round(UNITS[unit] * mine, 3), f"theirs_{unit}": round(UNITS[unit] * other, 3)}
    row |= {
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "pairs": len(ratios),
    }
    row |= {"equal": equal, "gflop": round(work.flops / 1e9, 3)}
    shares = (
        {"ours_share": work.flops / mine / peak, "theirs_share": work.flops / other / peak}
        if peak and work.flops
        else {}
    )
    return row | {name: round(shares.get(name, 0.0), 3) for name in ("ours_share", "theirs_share")} | more


def keep(row: Mapping[str, Any]) -> None:
    """Say a row and write it, in the place of one of the same work."""
    same = ("what", "setting", "peer", "threads")
    kept = [one for one in rows.read(TABLE) if any(one[name] != str(row[name]) for name in same)]
    rows.write(TABLE, [*kept, dict(row)])
    print("  ".join(f"{name} {value}" for name, value in row.items() if value not in ("", 0.0)), flush=True)

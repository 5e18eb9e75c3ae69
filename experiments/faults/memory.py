"""Does a long training's memory stay flat? python experiments/faults/memory.py [steps]

A tiny diffusion training on synthetic data of 10,000 steps, which logs every 10, and draws and keeps a checkpoint every
250. Its resident
memory is read every 100 steps into memory.csv; the slope is that of the straight line through all from step 1,000 on.
Exits with 1 if it is
above 1 MiB per 1,000 steps.
"""

import csv
import shutil
import sys
from functools import partial
from pathlib import Path

from training_processes import run  # beside this file

HERE = Path(__file__).parent
WORK = Path("runs/memory").absolute()
WARM, LIMIT = 1000, 1024  # steps, KiB per 1,000 steps


def read(table: Path, rank: int, step: int) -> None:
    """Append this process's resident memory in KiB every 100 steps."""
    if step % 100 == 0:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        with table.open("a") as file:
            file.write(f"{step},{line.split()[1]}\n")


def slope(rows: list[tuple[float, float]]) -> float:
    """Of the straight line through (x, y), by least squares."""
    x, y = (sum(one) / len(rows) for one in zip(*rows, strict=True))
    return sum((a - x) * (b - y) for a, b in rows) / sum((a - x) ** 2 for a, _ in rows)


def main(steps: int = 10_000) -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    table = WORK / "memory.csv"
    table.write_text("step,resident_KiB\n")
    often = ("training.log_every=10", "training.sample_every=250", "training.save_every=250")
    typed = ("budget=smoke", "trainer=cpu", "metrics=none", f"training.steps={steps}", *often)
    codes = run(typed, WORK, after=partial(read, table), wait=3600)
    assert codes == [0], (WORK / "said-0.txt").read_text()[-2000:]
    rows = [
        (float(row["step"]), float(row["resident_KiB"]))
        for row in csv.DictReader(table.open())
        if int(row["step"]) >= WARM
    ]
    rise = 1000 * slope(rows)
    shutil.copy(table, HERE / "memory.csv")
    first, last = (rows[place][1] / 1024 for place in (0, -1))
    print(
        f"{rise:.0f} KiB per 1,000 steps from step {WARM} to {steps}; {first:.0f} MiB at first, {last:.0f} MiB at last"
    )
    return int(rise > LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 10_000))

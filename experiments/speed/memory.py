"""Peak memory of a training step above what the imports took: ours against diffusers', every measurement in a process
of its own.

A side alone: python experiments/speed/memory.py ours|recomputed|theirs NETWORK SIZE THREADS, which prints MiB.
"""

import gc
import re
import subprocess
import sys
from pathlib import Path

import torch
import training
from built import ours_unet, theirs_unet, told
from pairs import Work, keep
from pairs import told as row_of
from sampling import setting, versioned


def recomputed(name: str, size: int) -> torch.nn.Module:
    """Ours with net.gradient_checkpointing=true: each block is evaluated again on the way back."""
    net = ours_unet(name, size)
    net.checkpoint = True
    return net


SIDES = {
    "ours": (training.Ours, ours_unet),
    "recomputed": (training.Ours, recomputed),
    "theirs": (training.Theirs, theirs_unet),
}
STEPS = 3  # AdamW has its moments after the first, and the second's gradients come on top


def resident(name: str) -> float:
    """MiB of this process in memory: VmRSS now, VmHWM at most.

    Not getrusage's ru_maxrss, which a process on Linux inherits from the one that started it.
    """
    (found,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


def trained(side: str, name: str, size: int) -> None:
    step, network = SIDES[side]
    made = step(network(name, size), size, told(name, size, training.BATCH).context[: training.BATCH])
    for _ in range(STEPS):
        made.step(False)


def peak(side: str, name: str, size: int) -> float:
    """MiB that training takes at most, above what is there once all is imported; torch imports some of it at its first
    step.
    """
    trained(side, "tiny", 8)
    gc.collect()
    before = resident("VmRSS")
    trained(side, name, size)
    return resident("VmHWM") - before


def measure(name: str, size: int, pairs: int, threads: int) -> None:
    """Two rows, as it is and recomputing: float32, from latents that are there, AdamW and the average of weights
    included.
    """
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(pairs):
        for side in sorted(SIDES, reverse=bool(turn % 2)):
            line = [sys.executable, __file__, side, name, str(size), str(threads)]
            found[side].append(float(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout))
    for side, how in (("ours", ""), ("recomputed", ", net.gradient_checkpointing=true")):
        work = Work(
            f"peak memory of a training step{how}", setting(name, size, training.BATCH), versioned("diffusers, eager")
        )
        keep(row_of(work, threads, found[side], found["theirs"], "", unit="mib"))


if __name__ == "__main__":
    side, name, size, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(peak(side, name, int(size)))

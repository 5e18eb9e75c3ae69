"""Learning rate schedules: pure functions of the step that return a factor on the optimizer's configured rate."""

import math


def constant(step: int, total: int, warmup: int = 0) -> float:
    """Return the factor of a linear warm-up over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / (warmup + 1))


def cosine(step: int, total: int, warmup: int = 0, end: float = 0.0) -> float:
    """Return the factor of a linear warm-up times half a cosine from 1 to `end` at `total`.

    Loshchilov & Hutter 2017.
    """
    done = min(1.0, step / total)
    return min(1.0, (step + 1) / (warmup + 1)) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)))

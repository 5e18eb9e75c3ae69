"""Learning rate as a pure function of the step: the factor on the optimiser's own rate."""

import math


def constant(step: int, total: int, warmup: int = 0) -> float:
    """Linear warm-up over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / (warmup + 1))


def cosine(step: int, total: int, warmup: int = 0, end: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 down to `end` at `total` (Loshchilov & Hutter 2017)."""
    done = min(1.0, step / total)
    return min(1.0, (step + 1) / (warmup + 1)) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)))

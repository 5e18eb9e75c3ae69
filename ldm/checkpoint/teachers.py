"""Trained models as teachers and as weak models for autoguidance."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint.load import load_model
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.condition import Condition
    from ldm.diffusion.denoiser import Denoise, Denoiser
    from ldm.diffusion.distill import Teacher
    from ldm.model import LatentDiffusion


@lru_cache(maxsize=1)
def _load_cached(run: str) -> "LatentDiffusion":
    return load_model(run)


def autoguidance(
    denoiser: "Denoiser", cond: "Condition", uncond: "Condition | None", weak: str | None = None, scale: float = 1.0
) -> "Denoise":
    """Guide away from a weaker model under the same condition (autoguidance; Karras et al. 2024a).

    weak: a run, or a step folder in it. Raises UserError without one.
    """
    from ldm.diffusion import guidance

    if weak is None:
        raise UserError("guidance=autoguidance needs a weaker model: guidance.weak=RUN, a run or a step folder in it")
    return guidance.autoguidance(
        denoiser, cond, uncond, _load_cached(str(Path(weak).expanduser().absolute())).denoiser, scale
    )


def load_teacher(run: str | None = None, scale: float = 1.0, interval: Sequence[float] = (0.0, 1.0)) -> "Teacher":
    """Load the model of a run as a teacher for distillation, guided at `scale` within the interval of t.

    run: a run, or a step folder in it. Raises UserError without one.
    """
    from ldm.diffusion.distill import Teacher

    if run is None:
        raise UserError("distillation needs a teacher: objective.teacher.run=RUN, a run or a step folder in it")
    lo, hi = interval
    return Teacher(load_model(run), scale, (lo, hi))

"""Seconds an image, the guided teacher's 50 steps beside a student's 4.

python experiments/distillation/speed.py TEACHER STUDENT [images=50]

Both draw the same number of images in turns, in one process, and one thread; five pairs. Writes speed.csv.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))


def main(teacher: str, student: str, *words: str) -> None:
    from pairs import paired

    from ldm.diffusion.guidance import cfg
    from ldm.report import rows

    torch.set_num_threads(1)
    images = int(dict(word.split("=", 1) for word in words).get("images", 50))
    guided = partial(cfg, scale=5.0, interval=(0.2, 0.75))
    found = paired(drawing(student, 4, cfg, images), drawing(teacher, 50, guided, images), 5)
    ratios = [slow / fast for fast, slow in zip(*found, strict=True)]
    mine, other = (statistics.median(side) / images for side in found)
    row: dict[str, Any] = {
        "student_s": mine,
        "teacher_s": other,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }
    print(row)
    rows.write(HERE / "speed.csv", [{**row, "images": images, "pairs": len(ratios), "threads": 1}])


def drawing(run: str, steps: int, guidance: Any, images: int) -> Callable[[], None]:
    """What draws so many images of a run by DDIM."""
    from ldm.checkpoint.load import load_data_card, load_model
    from ldm.diffusion import grids, sampler
    from ldm.evaluation.evaluate import CaptionSource
    from ldm.runs.folder import find_run
    from ldm.sampling.generate import generate_samples

    model, card = load_model(run), load_data_card(find_run(run))
    told, ts = CaptionSource(card.classes, card.captions).batch, grids.uniform_grid(model.denoiser.schedule, steps)

    def draw() -> None:
        for _ in generate_samples(model, told, range(images), 0, images, ts, sampler.ddim, guidance, "32"):
            pass

    return draw


if __name__ == "__main__":
    main(*sys.argv[1:])

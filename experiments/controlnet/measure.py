"""How well drawings keep to the edges that they were told: python experiments/controlnet/measure.py RUN

RUN: a run of experiment=controlnet, or a step of one.  Writes results.csv, a row as soon as it is known, and figure.png
here; what was
drawn is kept in the run and not drawn again.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import plotting
from ldm.checkpoint.adapters import BaseModelRef
from ldm.checkpoint.load import load_model, load_run_config
from ldm.conditioner.edges import Canny
from ldm.config import build
from ldm.config.build import to_container
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.images import to_uint8
from ldm.metrics.interval import bootstrap
from ldm.report.rows import write
from ldm.runs.folder import find_run
from ldm.sampling.tasks import sample

HERE = Path(__file__).parent
NUM, STEPS, NEAR, SHOWN = 64, 12, 1, 12  # held-out pictures, of the sampler, pixels that an edge may be off, columns
WAYS: dict[
    str, dict[str, Any]
] = {  # scale: of guidance.  hold: what it does not lead away from.  words, hint: whether they are told
    "base, words": {"model": "base", "scale": 1.0},
    "hint and words": {"model": "own", "scale": 1.0, "hint": True},
    "hint and words, guided by both": {"model": "own", "scale": 2.0, "hint": True},
    "hint and words, guided by words": {"model": "own", "scale": 2.0, "hint": True, "hold": ("hint",)},
    "hint alone": {"model": "own", "scale": 1.0, "hint": True, "words": False},
}


def main(run: str) -> None:
    torch.set_num_threads(1)
    folder = find_run(run)
    config = load_run_config(folder)
    edges = Canny(
        **{name: value for name, value in to_container(config.adapter.hint.extractor).items() if name != "_target_"}
    )
    test = build.build_dataset(config, "test")
    rows = [2 * (place * (len(test) // 2) // NUM) + place % 2 for place in range(NUM)]  # either style by turns
    images = test.pixels(rows)
    hints, captions = edges(images), [test.texts[row][0] for row in rows]
    models = {"base": load_model(BaseModelRef.read(folder).path), "own": load_model(run)}
    work = folder / "measured" / Path(run).name
    results, shown = [], {"hint": 2 * hints - 1, "the picture it is of": images}

    def add(way: str, drawn: Tensor, against: Tensor = hints, beside: Tensor | None = None) -> Tensor:
        values = f1(edges(drawn)[:, :1], against[:, :1])
        low, high = bootstrap(values)
        found = {"way": way, "n": NUM, "f1": values.mean().item(), "f1_low": low, "f1_high": high}
        if beside is not None:
            less, more = bootstrap(values - beside)
            found |= {"gain": (values - beside).mean().item(), "gain_low": less, "gain_high": more}
        results.append({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()})
        write(HERE / "results.csv", results)
        print(results[-1], flush=True)
        return values

    with torch.no_grad():
        add("first stage alone", models["own"].decode(models["own"].encode(images)))
    plainly = None
    for way, how in WAYS.items():
        shown[way] = drawn(work / f"{way}.safetensors", models[how["model"]], hints, captions, how)
        values = add(way, shown[way], beside=plainly)
        plainly = values if plainly is None else plainly
    add("hint and words, against another's hint", shown["hint and words"], hints.roll(1, 0))
    plotting.stack_rows(shown, SHOWN).savefig(HERE / "figure.png", metadata={"Software": None})


def drawn(path: Path, model: Any, hints: Tensor, captions: list[str], how: dict[str, Any]) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], picture i with seed i; once."""
    if not path.is_file():
        parts = []
        for start in range(0, NUM, 32):
            part = list(range(start, min(start + 32, NUM)))
            batch: dict[str, Any] = {
                "index": part,
                "caption": [captions[i] if how.get("words", True) else "" for i in part],
            }
            batch |= {"hint": hints[part]} if how.get("hint") else {}
            ts = trailing(model.denoiser.schedule, STEPS)
            guidance = partial(cfg, scale=how["scale"])
            parts.append(sample(model, batch, part, ts, dpmpp_2m, guidance, keep_conditions=how.get("hold", ())))
        atomic.write_tensors(path, {"images": to_uint8(torch.cat(parts))})
    return atomic.read_tensors(path)["images"].float() / 127.5 - 1


def f1(found: Tensor, wanted: Tensor) -> Tensor:
    """The harmonic mean (N,) of the shares of edge pixels (N, 1, H, W) that lie within NEAR pixels of the other's, both
    ways.
    """
    around = [F.max_pool2d(one, 2 * NEAR + 1, 1, NEAR) for one in (wanted, found)]
    precision, recall = (
        (one * other).sum((1, 2, 3)) / one.sum((1, 2, 3)).clamp(min=1)
        for one, other in zip((found, wanted), around, strict=True)
    )
    return 2 * precision * recall / (precision + recall).clamp(min=1e-8)


if __name__ == "__main__":
    main(*sys.argv[1:])

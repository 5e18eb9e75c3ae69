"""Whether a model edits as it is instructed: python experiments/instruct_pix2pix/measure.py RUN

RUN: a run of experiment=instruct_pix2pix, or a step of one.  Writes results.csv, a row as soon as it is known, and
figure.png here; samples are stored in the run and not drawn again.
The judge is exact: an instruction is obeyed if the sample is closer to its edit of the source than to the source and
to all other edits, in mean square. Sources are held out.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import plotting
from ldm.checkpoint.load import load_model
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg_image_text
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.images import to_uint8
from ldm.metrics.interval import bootstrap
from ldm.report.rows import write
from ldm.runs.folder import find_run
from ldm.sampling.request import load_held_out
from ldm.sampling.tasks import sample

HERE = Path(__file__).parent
NUM, STEPS, BATCH, SHOWN = 100, 12, 50, 12  # sources; steps of the sampler; samples at a time; columns of the figure
SCALES = ((1.0, 1.0), (1.5, 1.0), (1.5, 4.0), (1.5, 7.5), (1.0, 4.0), (4.0, 4.0), (1.5, 0.0))  # of image and text
DRAWN = (1.5, 4.0)  # the scales of the figure


def main(run: str) -> None:
    torch.set_num_threads(1)
    folder = find_run(run) / "measured" / Path(run).name
    model, data = load_model(run), load_held_out(run)
    sources = data.dataset.pixels([i * len(data.dataset) // NUM for i in range(NUM)])
    edited = torch.stack([torch.stack([edit.change(x) for x in sources]) for edit in data.edits])  # (edits, NUM, ...)
    candidates, results = torch.cat([edited, sources[None]]), []

    def add(way: str, drawn: Tensor, image_scale: float | None = None, text_scale: float | None = None) -> None:
        """Add the rows of images (edits, NUM, C, H, W): of each edit, and of all with an interval over sources."""
        obeyed = torch.stack([(closest(x, candidates) == k).double() for k, x in enumerate(drawn)])
        error = (drawn - edited).square().flatten(2).mean(2).sqrt()
        groups = [*zip(data.classes, obeyed, error, strict=True), ("all", obeyed.mean(0), error.mean(0))]
        for name, hits, rmse in groups:
            low, high = bootstrap(hits)
            row = {"way": way, "image_scale": image_scale, "text_scale": text_scale, "edit": name, "n": NUM}
            results.append({**row, "obeyed": float(hits.mean()), "low": low, "high": high, "rmse": float(rmse.mean())})
        write(HERE / "results.csv", results)
        print(results[-1], flush=True)

    add("sources, not edited", sources.expand_as(edited))
    with torch.no_grad():
        add("edits through the first stage", torch.stack([model.decode(model.encode(x)) for x in edited]))
    for image_scale, text_scale in SCALES:
        file, shape = folder / f"{image_scale:g}-{text_scale:g}.safetensors", edited.shape
        if not file.is_file():
            guidance = partial(cfg_image_text, scale=text_scale, image_scale=image_scale)
            texts = [texts[i % len(texts)] for texts in data.captions for i in range(NUM)]
            atomic.write_tensors(file, {"images": draw(model, sources.repeat(len(edited), 1, 1, 1), texts, guidance)})
        drawn = (atomic.read_tensors(file)["images"].float() / 127.5 - 1).reshape(shape)
        add("samples", drawn, image_scale, text_scale)
        if (image_scale, text_scale) == DRAWN:
            shown = {"source": sources, **{data.classes[k]: images for k, images in enumerate(drawn)}}
            plotting.stack_rows(shown, SHOWN).savefig(HERE / "figure.png", metadata={"Software": None})


def closest(images: Tensor, candidates: Tensor) -> Tensor:
    """Return for each image (N, C, H, W) the number (N,) of the closest of its candidates (K, N, C, H, W)."""
    return (candidates - images).square().flatten(2).mean(2).argmin(0)


def draw(model: Any, sources: Tensor, texts: list[str], guidance: Any) -> Tensor:
    """Sample the edit of each source (N, C, H, W), with its row's seed: (N, C, H, W) uint8."""
    ts, parts = trailing(model.denoiser.schedule, STEPS), []
    for start in range(0, len(sources), BATCH):
        rows = list(range(start, min(start + BATCH, len(sources))))
        batch = {"index": rows, "caption": [texts[i] for i in rows], "source": sources[rows]}
        parts.append(to_uint8(sample(model, batch, rows, ts, dpmpp_2m, guidance)))
    return torch.cat(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])

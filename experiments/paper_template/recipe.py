"""The recipe: the training of a diffusion model, and the paper's figure at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.checkpoint.load import load_data_card, load_model
from ldm.devices import rank_and_world_size
from ldm.io.images import make_grid, save_png, to_uint8
from ldm.recipes.diffusion import DiffusionRecipe
from ldm.sampling.tasks import txt2img


@dataclass(frozen=True, kw_only=True)
class WithFigure(DiffusionRecipe):
    """Write figure.png to the run folder: a column for each class, a row for each guidance scale of `figure_scales`."""

    figure_scales: Sequence[float] = (1.0, 2.0, 4.0)

    def train(self, cfg: Any) -> float | None:
        """Train, sample and score as DiffusionRecipe does, and return what it returns."""
        value, folder = super().train(cfg), self.run_dir(cfg)
        if rank_and_world_size()[0] == 0 and not (folder / "figure.png").exists():
            model, prompts = load_model(folder), [captions[0] for captions in load_data_card(folder).captions]
            batch, labels = [], torch.arange(len(prompts))
            for scale in self.figure_scales:
                batch.append(txt2img(model, prompts, steps=self.score.steps, scale=scale, label=labels))
            save_png(folder / "figure.png", make_grid(to_uint8(torch.cat(batch).cpu()), len(prompts), zoom=2))
            print(f"figure   {folder / 'figure.png'}", flush=True)
        return value

"""A small CLIP trained on the captions of a data set, written in open_clip's file format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.conditioner.clip import init_towers
from ldm.conditioner.clip_image import preprocess
from ldm.config import build
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.images import COLOUR_CHANNELS, image_fault
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.tensors import derive_seed
from ldm.training.best import require_metric
from ldm.training.clip import LitCLIP
from ldm.training.parallel import destroy_process_group

Tokenize = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class CLIPRecipe:
    """The options of the training of a small CLIP.

    model: open_clip's description of both towers.  crop: least part of a side that a random square crop keeps, in (0,
    1].
    optimizer: parameters -> optimizer.  lr_schedule: (step, total steps) -> factor on its rate.
    num_candidates: captions among which a test image's own is to be ranked first.
    """

    steps: int
    batch_size: int
    model: Mapping[str, Any]
    crop: float
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., float]
    log_every: int
    save_every: int
    num_candidates: int = 100

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder of the run."""
        return cache.run_dir(cfg, "clip")

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return nothing: a CLIP depends on the data alone."""
        return []

    def train(self, cfg: Any) -> float:
        """Train open_clip's towers; return the part of test images whose own caption is the nearest of num_candidates.

        Writes model.json and weights.safetensors: `model` and `weights` of conditioner=clip.
        """
        build.reject_degradation(cfg)
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            print(f"this run is done: {folder}")
            return done["image_to_text"]
        require_metric(cfg.get("keep_best"), (), "this training writes no number val/...", cfg.get("callbacks"))
        data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
        if fault := image_fault(data.shape, COLOUR_CHANNELS) or "these data have no captions" * (not data.captions):
            raise UserError(f"training=clip: {fault}; it is trained on images with captions")
        with open_run(cfg, folder) as run:
            atomic.write_json(folder / "model.json", build.to_container(self.model))
            torch.manual_seed(derive_seed(cfg.seed, "weights"))
            net, tokenize = init_towers(str(folder / "model.json"))
            callbacks = run.callbacks(
                "clip",
                steps=self.steps,
                lr_schedule=self.lr_schedule,
                log_every=self.log_every,
                save_every=self.save_every,
            )
            lit = LitCLIP(net, tokenize, self.optimizer, self.crop, cfg.seed)
            instantiate(cfg.trainer)(
                lit, data, callbacks, batch_size=self.batch_size, steps=self.steps, start=run.start, seed=cfg.seed
            )
            destroy_process_group()
            if not run.is_main_process:
                return 0.0
            net.eval().to("cpu", torch.float32)
            atomic.write_tensors(folder / "weights.safetensors", net.state_dict())
            metrics = retrieval(net, tokenize, test, self.num_candidates)
            run.finish(metrics)
            run.print(f"clip        {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}\nin {folder}")
            return metrics["image_to_text"]


@torch.no_grad()
def retrieval(net: nn.Module, tokenize: Tokenize, test: Any, num_candidates: int) -> dict[str, float]:
    """Compute the top-1 accuracies of retrieval among `num_candidates` test pairs, in [0, 1], and that of chance.

    image_to_text: part of the images whose own caption is the nearest; text_to_image: of captions whose image is.
    """
    groups = split_groups(len(test), num_candidates)
    correct = {"image_to_text": 0, "text_to_image": 0}
    for rows in groups:
        batch = test.batch([(0, i) for i in rows])
        ids = tokenize(batch["caption"])
        image, text, _ = net(preprocess(net.visual, batch["image"]), ids)
        same = (ids[:, None] == ids).all(-1)
        for name, cosine in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
            correct[name] += int(same.gather(1, cosine.argmax(1, keepdim=True)).sum())
    total = sum(map(len, groups))
    accuracies = {name: count / total for name, count in correct.items()}
    return {**accuracies, "chance": 1 / len(groups[0]), "n": float(total)}


def split_groups(total: int, size: int) -> list[list[int]]:
    """Split `total` rows into as many groups of `size` as fit, each spread over all rows; one if `size` is larger."""
    stride = max(1, total // size)
    return [list(range(first, total, stride))[:size] for first in range(stride)]

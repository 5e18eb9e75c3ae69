"""A small CLIP trained on the data's own captions, kept as files that everything reads which reads open_clip's published ones."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.conditioner.clip import init_towers
from ldm.conditioner.clip_image import preprocess
from ldm.config import build
from ldm.io import atomic
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.tensors import derive_seed
from ldm.training.best import require_metric
from ldm.training.clip import LitCLIP
from ldm.training.parallel import destroy_process_group

Tokenize = Callable[[Sequence[str]], Tensor]


def train(
    cfg: Any,
    *,
    steps: int,
    batch_size: int,
    model: Mapping[str, Any],
    crop: float,
    optimizer,
    lr_schedule,
    log_every: int,
    save_every: int,
    num_candidates: int = 100,
) -> float:
    """Train open_clip's towers as `model` describes them; returns the part of held-out images whose caption is found among `among`.

    The run folder gets model.json and weights.safetensors, a `model` and `weights` for conditioner=clip.
    """
    build.reject_degradation(cfg)
    folder = run_dir(cfg)
    if done := final_metrics(cfg, folder):
        print(f"this run is done: {folder}")
        return done["image_to_text"]
    require_metric(cfg.get("keep_best"), (), "this training writes no number val/...")
    data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
    with open_run(cfg, folder) as run:
        atomic.write_json(folder / "model.json", build.to_container(model))
        torch.manual_seed(derive_seed(cfg.seed, "weights"))
        net, tokenize = init_towers(str(folder / "model.json"))
        callbacks = run.callbacks(
            "clip", steps=steps, lr_schedule=lr_schedule, log_every=log_every, save_every=save_every
        )
        lit = LitCLIP(net, tokenize, optimizer, crop, cfg.seed)
        instantiate(cfg.trainer)(
            lit, data, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=cfg.seed
        )
        destroy_process_group()
        if not run.is_main_process:
            return 0.0
        net.eval().to("cpu", torch.float32)
        atomic.write_tensors(folder / "weights.safetensors", net.state_dict())
        metrics = retrieval(net, tokenize, test, num_candidates)
        run.finish(metrics)
        run.print(f"clip        {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}\nin {folder}")
        return metrics["image_to_text"]


def run_dir(cfg: Any) -> Path:
    """The folder of the run."""
    return cache.run_dir(cfg, "clip")


def dependencies(cfg: Any) -> list[cache.CacheEntry]:
    """Nothing must be there before a CLIP."""
    return []


@torch.no_grad()
def retrieval(net: nn.Module, tokenize: Tokenize, test: Any, among: int) -> dict[str, float]:
    """Part of held-out images whose own caption is the nearest of `among`, of captions whose image is, and what chance would find."""
    rows = split_groups(len(test), among)
    found = {"image_to_text": 0, "text_to_image": 0}
    for part in rows:
        batch = test.batch([(0, i) for i in part])
        ids = tokenize(batch["caption"])
        image, text, _ = net(preprocess(net.visual, batch["image"]), ids)
        same = (ids[:, None] == ids).all(-1)
        for name, cosine in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
            found[name] += int(same.gather(1, cosine.argmax(1, keepdim=True)).sum())
    total = sum(map(len, rows))
    return {**{name: count / total for name, count in found.items()}, "chance": 1 / len(rows[0]), "n": float(total)}


def split_groups(total: int, among: int) -> list[list[int]]:
    """As many groups of `among` rows as `total` has room for, each spread over all of them; one of all where there are fewer."""
    apart = max(1, total // among)
    return [list(range(first, total, apart))[:among] for first in range(apart)]

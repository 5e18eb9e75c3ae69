"""A vocoder for the sounds of a data set, measured beside Griffin and Lim's iteration, which needs no training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.config import build
from ldm.errors import UserError
from ldm.io import atomic
from ldm.media.mel import griffin_lim
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.runs.data_card import DataCard
from ldm.tensors import derive_seed
from ldm.training.best import require_metric
from ldm.training.parallel import destroy_process_group
from ldm.training.vocoder import LitVocoder, mel_error, stft_loss


@dataclass(frozen=True, kw_only=True)
class VocoderRecipe:
    """The options of the training of a vocoder.

    net: builds the network.  optimizer: parameters -> optimizer.  lr_schedule: (step, total steps) -> factor on its
    rate.  mel_weight: weight of the log-mel error beside the multi-resolution spectral one.
    num: test sounds on which it is measured.
    """

    steps: int
    batch_size: int
    net: Callable[..., nn.Module]
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., float]
    mel_weight: float
    log_every: int
    save_every: int
    num: int = 200

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder of the run."""
        return cache.run_dir(cfg, "vocoder")

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return nothing: a vocoder depends on the data alone."""
        return []

    def train(self, cfg: Any) -> float:
        """Train on whole sounds and their own spectrograms; return the log-mel error in nats on test sounds.

        Writes weights.safetensors. Raises UserError for data without waves.
        """
        build.reject_degradation(cfg)
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            print(f"this run is done: {folder}")
            return done["mel"]
        require_metric(cfg.get("keep_best"), (), "this training writes no number val/...", cfg.get("callbacks"))
        data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
        if not hasattr(data, "waves"):
            raise UserError(
                "training=vocoder: these data are no sounds; expected data=notes, data=sounds, or data with `waves`"
            )
        with open_run(cfg, folder) as run:
            if run.is_main_process:
                DataCard.from_dataset(data).write(folder)
            torch.manual_seed(derive_seed(cfg.seed, "weights"))
            net = self.net()
            callbacks = run.callbacks(
                "vocoder",
                steps=self.steps,
                lr_schedule=self.lr_schedule,
                log_every=self.log_every,
                save_every=self.save_every,
            )
            lit = LitVocoder(net, self.optimizer, self.mel_weight)
            instantiate(cfg.trainer)(
                lit, data, callbacks, batch_size=self.batch_size, steps=self.steps, start=run.start, seed=cfg.seed
            )
            destroy_process_group()
            if not run.is_main_process:
                return 0.0
            net.eval().to("cpu", torch.float32)
            atomic.write_tensors(folder / "weights.safetensors", net.state_dict())
            ways: dict[str, Callable[[Tensor], Tensor]] = {"": net, "griffin_lim/": griffin_lim}
            errors = {name: spectral_errors(way, test, self.num) for name, way in ways.items()}
            metrics = {name + key: value for name, values in errors.items() for key, value in values.items()}
            run.finish(metrics)
            run.print(f"vocoder     {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}\nin {folder}")
            return metrics["mel"]


@torch.no_grad()
def spectral_errors(vocoder: Callable[[Tensor], Tensor], test: Any, num: int) -> dict[str, float]:
    """Compute the mean log-mel error, mel, in nats, and stft_loss, stft, over `num` test sounds spread over all."""
    count = min(num, len(test))
    rows = [i * len(test) // count for i in range(count)]
    sums = dict.fromkeys(("mel", "stft"), 0.0)
    for start in range(0, count, 50):
        batch = test.batch([(0, i) for i in rows[start : start + 50]])
        wave = vocoder(batch["image"])
        for name, error in (("mel", mel_error), ("stft", stft_loss)):
            sums[name] += float(error(wave, batch["wave"]).sum())
    return {name: total / count for name, total in sums.items()}

"""Stage one: an autoencoder trained against its discriminator, calibrated over the training set, and measured."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm.autoencoder.calibration import Calibration
from ldm.autoencoder.first_stage import FirstStage
from ldm.checkpoint.latent_space import LatentSpace
from ldm.checkpoint.load import load_first_stage
from ldm.config import build
from ldm.data.latents import batches
from ldm.devices import rank_and_world_size
from ldm.ema import PowerEMA
from ldm.errors import UserError
from ldm.evaluation import evaluator
from ldm.io import atomic, images
from ldm.metrics.distribution import MetricSuite
from ldm.metrics.features import to_uint8
from ldm.metrics.paired import Reconstruction
from ldm.recipes.evaluator import evaluator_dependency
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache, metrics_log
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.best import require_metric
from ldm.training.parallel import all_reduce_sum, destroy_process_group


def train(
    cfg: Any,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    optimizer,
    lr_schedule,
    loss: nn.Module,
    discriminator,
    discriminator_optimizer,
    discriminator_start: int,
    discriminator_ramp: int,
    discriminator_weight: float,
    calibration: Calibration,
    ema_sigma_rel: float,
    log_every: int,
    sample_every: int,
    save_every: int,
) -> float:
    """Train, average the weights, calibrate shift and scale, write weights.safetensors; returns the PSNR of test images in dB.

    Raises UserError for a first stage without weights, and where the network that is to measure it is also in its loss.
    """
    build.reject_degradation(cfg)
    folder = run_dir(cfg)
    if done := final_metrics(cfg, folder):
        return done["psnr"]
    pictured = {"val/psnr", "val/ssim"} if sample_every <= steps else set()
    require_metric(
        cfg.get("keep_best"), pictured, f"training.sample_every={sample_every} is more than training.steps={steps}"
    )
    make_score, _ = evaluator.make_scorer(cfg, cfg.metrics)
    score = make_score() if make_score else None
    if score and score.net.name == getattr(loss.perceptual, "name", None):
        raise UserError(
            f"{score.net.name} is in the training loss and cannot measure what it trained: choose another metrics= or loss"
        )
    with open_run(cfg, folder, cache.FIRST_STAGE) as run:
        data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
        torch.manual_seed(derive_seed(seed, "weights"))
        autoencoder = build.build_autoencoder(cfg.autoencoder, data.channels)
        if is_parameter_free(autoencoder):
            raise UserError(
                f"{type(autoencoder).__name__} has no weights to train: use it as it is, or choose another autoencoder="
            )
        lit = LitAutoencoder(
            autoencoder,
            loss,
            optimizer,
            discriminator(channels=data.channels),
            discriminator_optimizer,
            discriminator_start,
            discriminator_ramp,
            discriminator_weight,
            seed,
        )
        ema = PowerEMA(autoencoder, ema_sigma_rel)
        some = test.batch([(0, i) for i in range(min(64, len(test)))])["image"]

        @torch.no_grad()
        def draw(step: int) -> None:
            again = autoencoder.decode(autoencoder.encode(some.to(autoencoder.shift))).to(some)
            pairs = torch.cat([some[:16], again[:16]])
            run.save_image(
                step,
                f"grids/step-{step:06d}",
                images.make_grid(to_uint8(pairs.float()), columns=len(pairs) // 2, zoom=2),
            )
            scores = Reconstruction()
            scores.update(some, again)
            run.log_metrics(step, {f"val/{name}": value for name, value in scores.compute().items()})

        often: dict[str, Any] = {"log_every": log_every, "save_every": save_every, "grid_every": sample_every}
        callbacks = run.callbacks("autoencoder", steps=steps, lr_schedule=lr_schedule, ema=ema, draw=draw, **often)
        instantiate(cfg.trainer)(lit, data, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=seed)
        with ema.swapped_in():
            autoencoder.eval().requires_grad_(False).to("cpu", torch.float32)
            moments = (autoencoder.posterior(image).moments for image in batches(data, 500, *rank_and_world_size()))
            autoencoder.calibrate(moments, calibration, all_reduce_sum)
            destroy_process_group()
            if not run.is_main_process:
                return 0.0
            space = LatentSpace.from_autoencoder(autoencoder, build.to_container(cfg.autoencoder), data.fingerprint)
            metrics: dict[str, Any] = {
                **evaluate_reconstruction(autoencoder, test, score),
                "identity": space.identity,
            }
            atomic.write_tensors(folder / "weights.safetensors", autoencoder.state_dict(), space.metadata)
        run.finish(metrics)
        run.print(
            "autoencoder "
            + "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if isinstance(value, float))
        )
        return metrics["psnr"]


def run_dir(cfg: Any) -> Path:
    """Where the first stage that cfg trains is kept."""
    return cache.first_stage_dir(cfg)


def dependencies(cfg: Any) -> list[cache.CacheEntry]:
    """What must be there before a first stage: who measures it."""
    return evaluator_dependency(cfg)


def first_stage_dependency(cfg: Any) -> list[cache.CacheEntry]:
    """The first stage that a config names, unless it has no weights."""
    with torch.device("meta"):
        untrained = build.build_autoencoder(cfg.autoencoder, channels=3)
    return [] if is_parameter_free(untrained) else [cache.first_stage_entry(cfg)]


def load_or_train_first_stage(cfg: Any, channels: int) -> tuple[FirstStage, LatentSpace, dict[str, Any]]:
    """The config's first stage, trained now if it is not there, its latent space, and what was measured of it.

    Raises UserError naming both autoencoders when the weights in the cache are not those that were measured there.
    """
    untrained = build.build_autoencoder(cfg.autoencoder, channels)
    if is_parameter_free(untrained):
        space = LatentSpace.from_autoencoder(untrained, build.to_container(cfg.autoencoder))
        return untrained.eval(), space, {"identity": space.identity}
    folder = cache.ensure_first_stage(cfg)
    autoencoder, space = load_first_stage(cfg.autoencoder, folder / "weights.safetensors", channels)
    measured = metrics_log.read_final_metrics(folder) or {}
    trained = LatentSpace(str(measured.get("identity")), space.shape)
    if trained != LatentSpace(space.identity, space.shape):
        raise UserError(
            f"{folder / 'weights.safetensors'} is autoencoder {space.name}, the one trained there was {trained.name}; "
            f"put it back, or remove {folder} and the same command trains it again"
        )
    return autoencoder, space, measured


def is_parameter_free(autoencoder: FirstStage) -> bool:
    """Whether there is nothing to train and nothing to load, as in pixel space."""
    return next(autoencoder.parameters(), None) is None


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: FirstStage, test, score: MetricSuite | None, num: int = 5000
) -> dict[str, float]:
    """PSNR, SSIM and, with a feature network, rFD of test images from a posterior sample, as the second stage sees them."""
    scores = Reconstruction(score.net, score.reference) if score else Reconstruction()
    for start in range(0, min(num, len(test)), 500):
        rows = range(start, min(start + 500, num, len(test)))
        image = test.batch([(0, i) for i in rows])["image"]
        posterior = autoencoder.posterior(image)
        z = posterior.sample(KeyedNoise(0, list(rows)).normal("posterior", posterior.mean))
        scores.update(image, autoencoder.decode(autoencoder.normalise(z)))
    return scores.compute()

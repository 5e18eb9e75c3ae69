"""Stage one: an autoencoder trained against its discriminator, calibrated over the training set, and measured."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm import build, durable, picture, runs
from ldm.autoencoder.calibration import Calibration
from ldm.autoencoder.first_stage import FirstStage
from ldm.data.latents import batches
from ldm.ema import PowerEMA
from ldm.errors import UserError
from ldm.load import first_stage
from ldm.metrics.distribution import Score
from ldm.metrics.features import to_uint8
from ldm.metrics.paired import Reconstruction
from ldm.space import Space
from ldm.stage import cache, judge
from ldm.stage.resume import finished
from ldm.stage.run import opened
from ldm.tensors import Noise, key
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.best import require_metric
from ldm.training.fit import world
from ldm.training.parallel import disband, sum_over_ranks


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
    sigma_rel: float,
    log_every: int,
    grid_every: int,
    save_every: int,
) -> float:
    """Train, average the weights, calibrate shift and scale, write weights.safetensors; returns the PSNR of test images in dB.

    Raises UserError for a first stage without weights, and where the network that is to measure it is also in its loss.
    """
    build.undegraded(cfg)
    folder = place(cfg)
    if done := finished(cfg, folder):
        return done["psnr"]
    pictured = {"val/psnr", "val/ssim"} if grid_every <= steps else set()
    require_metric(cfg.get("keep_best"), pictured, f"training.grid_every={grid_every} is more than training.steps={steps}")
    make_score, _ = judge.scorer(cfg, cfg.metrics)
    score = make_score() if make_score else None
    if score and score.net.name == getattr(loss.perceptual, "name", None):
        raise UserError(f"{score.net.name} is in the training loss and cannot measure what it trained: choose another metrics= or loss")
    with opened(cfg, folder, cache.FIRST_STAGE) as run:
        data, test = build.dataset(cfg, "train"), build.dataset(cfg, "test")
        torch.manual_seed(key(seed, "weights"))
        autoencoder = build.autoencoder(cfg.autoencoder, data.channels)
        if weightless(autoencoder):
            raise UserError(f"{type(autoencoder).__name__} has no weights to train: use it as it is, or choose another autoencoder=")
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
        ema = PowerEMA(autoencoder, sigma_rel)
        some = test.batch([(0, i) for i in range(min(64, len(test)))])["image"]

        @torch.no_grad()
        def draw(step: int) -> None:
            again = autoencoder.decode(autoencoder.encode(some.to(autoencoder.shift))).to(some)
            pairs = torch.cat([some[:16], again[:16]])
            run.picture(step, f"grids/step-{step:06d}", picture.grid(to_uint8(pairs.float()), columns=len(pairs) // 2, zoom=2))
            scores = Reconstruction()
            scores.update(some, again)
            run.write(step, {f"val/{name}": value for name, value in scores.compute().items()})

        often: dict[str, Any] = {"log_every": log_every, "save_every": save_every, "grid_every": grid_every}
        callbacks = run.callbacks("autoencoder", steps=steps, lr_schedule=lr_schedule, ema=ema, draw=draw, **often)
        instantiate(cfg.trainer)(lit, data, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=seed)
        with ema.applied():
            autoencoder.eval().requires_grad_(False).to("cpu", torch.float32)
            moments = (autoencoder.posterior(image).moments for image in batches(data, 500, *world()))
            autoencoder.calibrate(moments, calibration, sum_over_ranks)
            disband()
            if not run.chief:
                return 0.0
            space = Space.of(autoencoder, build.plain(cfg.autoencoder), data.fingerprint)
            metrics: dict[str, Any] = {
                **reconstruct(autoencoder, test, score),
                "identity": space.identity,
            }
            durable.write_tensors(folder / "weights.safetensors", autoencoder.state_dict(), space.metadata)
        run.finish(metrics)
        run.say("autoencoder " + "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if isinstance(value, float)))
        return metrics["psnr"]


def place(cfg: Any) -> Path:
    """Where the first stage that cfg trains is kept."""
    return cache.first_stage_folder(cfg)


def needs(cfg: Any) -> list[cache.Kept]:
    """What must be there before a first stage: who measures it."""
    return judge.wanted(cfg)


def wanted(cfg: Any) -> list[cache.Kept]:
    """The first stage that a config names, unless it has no weights."""
    with torch.device("meta"):
        untrained = build.autoencoder(cfg.autoencoder, channels=3)
    return [] if weightless(untrained) else [cache.kept_first_stage(cfg)]


def load(cfg: Any, channels: int) -> tuple[FirstStage, Space, dict[str, Any]]:
    """The config's first stage, trained now if it is not there, its latent space, and what was measured of it.

    Raises UserError naming both autoencoders when the weights in the cache are not those that were measured there.
    """
    untrained = build.autoencoder(cfg.autoencoder, channels)
    if weightless(untrained):
        space = Space.of(untrained, build.plain(cfg.autoencoder))
        return untrained.eval(), space, {"identity": space.identity}
    folder = cache.first_stage(cfg)
    autoencoder, space = first_stage(cfg.autoencoder, folder / "weights.safetensors", channels)
    measured = runs.finished(folder) or {}
    trained = Space(str(measured.get("identity")), space.form)
    if trained != Space(space.identity, space.form):
        raise UserError(
            f"{folder / 'weights.safetensors'} is autoencoder {space.name}, the one trained there was {trained.name}; "
            f"put it back, or remove {folder} and the same command trains it again"
        )
    return autoencoder, space, measured


def weightless(autoencoder: FirstStage) -> bool:
    """Whether there is nothing to train and nothing to load, as in pixel space."""
    return next(autoencoder.parameters(), None) is None


@torch.no_grad()
def reconstruct(autoencoder: FirstStage, test, score: Score | None, num: int = 5000) -> dict[str, float]:
    """PSNR, SSIM and, with a feature network, rFD of test images from a posterior sample, as the second stage sees them."""
    scores = Reconstruction(score.net, score.reference) if score else Reconstruction()
    for start in range(0, min(num, len(test)), 500):
        rows = range(start, min(start + 500, num, len(test)))
        image = test.batch([(0, i) for i in rows])["image"]
        posterior = autoencoder.posterior(image)
        z = posterior.sample(Noise(0, list(rows)).normal("posterior", posterior.mean))
        scores.update(image, autoencoder.decode(autoencoder.normalise(z)))
    return scores.compute()

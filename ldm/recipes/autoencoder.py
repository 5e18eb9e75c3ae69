"""Stage one: an autoencoder trained against its discriminator, calibrated over the training set, and measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm.autoencoder.calibration import Calibration
from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.vq import AutoencoderVQ
from ldm.checkpoint.latent_space import LatentSpace
from ldm.checkpoint.load import load_first_stage
from ldm.config import build
from ldm.data.latents import batches
from ldm.data.stream import length_of
from ldm.devices import rank_and_world_size
from ldm.ema import WeightAverage
from ldm.errors import UserError
from ldm.evaluation import evaluator
from ldm.io import atomic
from ldm.media.medium import medium_of
from ldm.metrics.distribution import MetricSuite
from ldm.metrics.paired import Reconstruction
from ldm.metrics.spectrum import high_frequency_ratio
from ldm.recipes import checks
from ldm.recipes.evaluator import evaluator_dependency
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import TrainingRun, open_run
from ldm.runs import cache, metrics_log
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.best import require_metric
from ldm.training.health import HealthLimits
from ldm.training.parallel import all_reduce_sum, destroy_process_group


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """The options of a first stage's training.

    optimizer, discriminator_optimizer: parameters -> optimizer.  lr_schedule: (step, total steps) -> factor on their
    rates.
    discriminator: builds the discriminator from channels=.  discriminator_start: its first step.
    discriminator_ramp: steps over which its weight grows linearly.  calibration: statistics of the latents -> shift and
    scale.
    ema: module -> average of its weights.  health: limits beyond which a warning is printed; they change no step.
    """

    seed: int
    steps: int
    batch_size: int
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., float]
    loss: nn.Module
    discriminator: Callable[..., nn.Module]
    discriminator_optimizer: Callable[..., Any]
    discriminator_start: int
    discriminator_ramp: int
    discriminator_weight: float
    calibration: Calibration
    ema: Callable[[nn.Module], WeightAverage]
    log_every: int
    sample_every: int
    save_every: int
    health: HealthLimits = field(default_factory=HealthLimits)

    def __post_init__(self) -> None:
        self.ema(nn.Module())  # its options are checked before anything is trained

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder in the cache for the first stage that cfg trains."""
        return cache.first_stage_dir(cfg)

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return the evaluator, where cfg.metrics measure with it."""
        return evaluator_dependency(cfg)

    def train(self, cfg: Any) -> float:
        """Train, average the weights, calibrate shift and scale, write weights.safetensors.

        Returns the PSNR of test images in dB.  Raises UserError for a first stage without weights, and where the
        network that measures it is also in its loss.
        """
        build.reject_degradation(cfg)
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            return done["psnr"]
        checks.check_classes(cfg)
        checks.check_training(cfg.training)
        scores = {"val/psnr", "val/ssim", "val/high_frequency_ratio"} if self.sample_every <= self.steps else set()
        reason = f"training.sample_every={self.sample_every} is more than training.steps={self.steps}"
        require_metric(cfg.get("keep_best"), scores, reason, cfg.get("callbacks"))
        make_score, _ = evaluator.make_scorer(cfg, cfg.metrics)
        score = make_score() if make_score else None
        if score and score.net.name == getattr(self.loss.perceptual, "name", None):
            raise UserError(
                f"{score.net.name} is in the training loss and cannot measure what it trained: "
                "choose another metrics= or loss"
            )
        with open_run(cfg, folder, cache.FIRST_STAGE) as run:
            data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
            if length_of(data) is None:
                raise UserError(
                    "training=autoencoder: these data have no length, and the latents' mean and scale are those of all "
                    "images; train it on data with a length, and begin the diffusion model from init=RUN"
                )
            torch.manual_seed(derive_seed(self.seed, "weights"))
            if len(data.shape) != 3:
                raise UserError(
                    f"training=autoencoder: its losses are of images (C, H, W), these samples are of shape "
                    f"{tuple(data.shape)}; choose autoencoder=identity"
                )
            checks.check_data(cfg, data)
            autoencoder = build.build_autoencoder(cfg.autoencoder, data.shape[0])
            checks.check_first_stage(cfg, autoencoder, data)
            if is_parameter_free(autoencoder):
                name = type(autoencoder).__name__
                raise UserError(f"{name} has no weights to train: use it as it is, or choose another autoencoder=")
            lit = LitAutoencoder(
                autoencoder,
                self.loss,
                self.optimizer,
                self.discriminator(channels=data.shape[0]),
                self.discriminator_optimizer,
                self.discriminator_start,
                self.discriminator_ramp,
                self.discriminator_weight,
                self.seed,
            )
            ema = self.ema(autoencoder)
            num_codes = autoencoder.codebook.num_embeddings if isinstance(autoencoder, AutoencoderVQ) else None
            run.watch_health(self.health.conditions(self.discriminator_weight, num_codes), self.health.window)
            callbacks = run.callbacks(
                "autoencoder",
                steps=self.steps,
                lr_schedule=self.lr_schedule,
                ema=ema,
                draw=make_grid_writer(run, autoencoder, test),
                log_every=self.log_every,
                save_every=self.save_every,
                grid_every=self.sample_every,
            )
            instantiate(cfg.trainer)(
                lit, data, callbacks, batch_size=self.batch_size, steps=self.steps, start=run.start, seed=self.seed
            )
            with ema.swapped_in():
                autoencoder.eval().requires_grad_(False).to("cpu", torch.float32)
                moments = (autoencoder.posterior(image).moments for image in batches(data, 500, *rank_and_world_size()))
                autoencoder.calibrate(moments, self.calibration, all_reduce_sum)
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
            run.print("autoencoder " + format_numbers(metrics))
            return metrics["psnr"]


def make_grid_writer(run: TrainingRun, autoencoder: FirstStage, test) -> Callable[[int], None]:
    """Return draw(step), which writes test images above their reconstructions, and logs scores of 64 of them.

    These are PSNR, SSIM and the ratio of their powers at high frequencies.
    """
    images_in, medium = test.batch([(0, i) for i in range(min(64, len(test)))])["image"], medium_of(test)
    if fault := medium.fault(images_in.shape[1:]):
        run.print(f"grids       none: {fault}")

    @torch.no_grad()
    def draw(step: int) -> None:
        images_out = autoencoder.decode(autoencoder.encode(images_in.to(autoencoder.shift))).to(images_in)
        if not fault:
            pairs, columns = [*images_in[:16], *images_out[:16].float()], min(16, len(images_in))
            played = [0, columns, 1, columns + 1][: 2 * columns]  # two, each with its reconstruction
            rate = getattr(test, "rate", None)
            run.save_samples(step, f"grids/step-{step:06d}", medium, pairs, columns, rate, played)
        scores = Reconstruction()
        scores.update(images_in, images_out)
        values = {
            **scores.compute(),
            "high_frequency_ratio": float(high_frequency_ratio(images_out.clamp(-1, 1), images_in)),
        }
        run.log_metrics(step, {f"val/{name}": value for name, value in values.items()})

    return draw


def format_numbers(metrics: Mapping[str, Any]) -> str:
    """Format the metrics that are floats on one line."""
    return "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if isinstance(value, float))


def first_stage_dependency(cfg: Any) -> list[cache.CacheEntry]:
    """Return the first stage that a config names; nothing for one without weights."""
    with torch.device("meta"):
        untrained = build.build_autoencoder(cfg.autoencoder, channels=3)
    return [] if is_parameter_free(untrained) else [cache.first_stage_entry(cfg)]


def load_or_train_first_stage(cfg: Any, channels: int) -> tuple[FirstStage, LatentSpace, dict[str, Any]]:
    """Load the config's first stage, trained now if it is not in the cache; return it, its latent space and metrics.

    Raises UserError naming both autoencoders when the weights in the cache are not those that the metrics are of.
    """
    untrained = build.build_autoencoder(cfg.autoencoder, channels)
    if is_parameter_free(untrained):
        space = LatentSpace.from_autoencoder(untrained, build.to_container(cfg.autoencoder))
        return untrained.eval(), space, {"identity": space.identity}
    folder = cache.ensure_first_stage(cfg)
    autoencoder, space = load_first_stage(cfg.autoencoder, folder / "weights.safetensors", channels)
    metrics = metrics_log.read_final_metrics(folder) or {}
    trained = LatentSpace(str(metrics.get("identity")), space.shape)
    if trained != LatentSpace(space.identity, space.shape):
        raise UserError(
            f"{folder / 'weights.safetensors'} is autoencoder {space.name}, the one trained there was {trained.name}; "
            f"put it back, or remove {folder} and the same command trains it again"
        )
    return autoencoder, space, metrics


def is_parameter_free(autoencoder: FirstStage) -> bool:
    """Return whether there is nothing to train and nothing to load, as in pixel space."""
    return next(autoencoder.parameters(), None) is None


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: FirstStage, test, score: MetricSuite | None, num: int = 5000
) -> dict[str, float]:
    """Compute PSNR, SSIM and, with a feature network, rFD of up to `num` test images.

    Each is decoded from a sample of its posterior, on which the second stage is trained.
    """
    scores = Reconstruction(score.net, score.reference) if score else Reconstruction()
    num = min(num, length_of(test) or num)
    for start in range(0, num, 500):
        rows = range(start, min(start + 500, num))
        image = test.batch([(0, i) for i in rows])["image"]
        posterior = autoencoder.posterior(image)
        z = posterior.sample(KeyedNoise(0, list(rows)).normal("posterior", posterior.mean))
        scores.update(image, autoencoder.decode(autoencoder.normalise(z)))
    return scores.compute()

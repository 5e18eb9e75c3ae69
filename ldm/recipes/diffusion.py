"""Stage two: a denoiser trained in the latent space of the first stage, sampled and scored."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from torch import nn

from ldm.checkpoint import adapters
from ldm.checkpoint.latent_space import JOINT, LatentSpace
from ldm.config import build
from ldm.ema import SIGMA_RELS, PowerEMA, WeightAverage
from ldm.evaluation import evaluator, protocol
from ldm.evaluation.evaluate import CaptionSource, EvaluationConfig, evaluate, evaluate_during_training, format_count
from ldm.io import atomic
from ldm.media.medium import medium_of
from ldm.metrics.names import metric_names
from ldm.recipes import checks, init_weights
from ldm.recipes.autoencoder import first_stage_dependency, load_or_train_first_stage
from ldm.recipes.estimate import print_estimate
from ldm.recipes.evaluator import evaluator_dependency
from ldm.recipes.latents import check_latents, training_data, trains_first_stage
from ldm.recipes.resume import final_metrics
from ldm.recipes.retrieval import add_neighbours, check_retrieval, load_databases
from ldm.recipes.run import TrainingRun, open_run
from ldm.recipes.text_features import check_text_features, text_features_callbacks
from ldm.recipes.validation import held_out_subset, last_validation, validation_callback, validation_metrics
from ldm.runs import cache
from ldm.runs.data_card import DataCard
from ldm.sampling.generate import generate_samples
from ldm.training.best import require_metric
from ldm.training.callbacks import EvaluationCallback
from ldm.training.diffusion import LitDiffusion
from ldm.training.validation import ValidationConfig

GRID_COLUMNS = 10  # samples of a class in a grid


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """The options of a diffusion model's training.

    optimizer: parameters -> optimizer.  lr_schedule: (step, total steps) -> factor on the optimizer's rate.
    cond_drop_prob: probability with which a sample's condition is dropped, in [0, 1].
    ema: module -> average of its weights.
    score: sampling settings of the evaluation at the end and during training.
    latents: cached, all images are encoded before the first step; online, those of a batch are encoded in its step.
    text_features: where those of captions are: in memory, on disk, or computed online, in each step.
    validation: the loss on held-out images during training.
    snapshot_every: steps between two pairs of averages stored for a length chosen afterwards; None for none.
    """

    steps: int
    batch_size: int
    cond_drop_prob: float
    grad_clip_norm: float | None
    ema: Callable[[nn.Module], WeightAverage]
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., float]
    log_every: int
    sample_every: int
    save_every: int
    score: EvaluationConfig
    latents: Literal["cached", "online"] = "cached"
    text_features: Literal["memory", "disk", "online"] = "memory"
    snapshot_every: int | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        self.ema(nn.Module())  # its options are checked before anything is trained

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder of the run."""
        return cache.run_dir(cfg)

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return the evaluator, and the first stage unless the run starts from a model that has one."""
        return [*evaluator_dependency(cfg), *([] if cfg.get("init") else first_stage_dependency(cfg))]

    def train(self, cfg: Any) -> float | None:
        """Train, choose the guidance scale, sample and score with the averaged weights.

        Returns the metric named by cfg.optimized_metric, None if it was not measured.
        """
        cfg = init_weights.inherit_base_config(cfg)
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            print(f"this run is done: {folder}\n{format_summary(done)}")
            return done.get(cfg.optimized_metric)
        score = self.score
        validated = validation_metrics(cfg.get("keep_best"), self.validation, self.steps)
        names, reason = scored_metrics(cfg, score, self.steps)
        written = names if names is None else names | validated
        require_metric(cfg.get("keep_best"), written, reason, cfg.get("callbacks"))
        data = build.build_degraded_dataset(cfg, "train")
        check_latents(cfg, data)
        check_text_features(self.text_features, data)
        check_retrieval(cfg, data)
        subset = held_out_subset(cfg, self.validation)
        checks.check_parts(cfg, data, is_new=not (folder / "checkpoints").is_dir())
        card, medium = DataCard.from_dataset(data), medium_of(data)
        make_score, baselines = evaluator.make_scorer(cfg, cfg.metrics)
        print_estimate(cfg, data)
        source = init_weights.load_init_model(cfg)
        autoencoder, space, reconstruction = (
            load_or_train_first_stage(cfg, data.shape[0])
            if source is None
            else init_weights.adopt_first_stage(cfg, source, data.shape[0])
        )
        init_weights.check_teacher(cfg, space)
        joint, metadata = trains_first_stage(cfg), space.metadata
        if joint:
            metadata, reconstruction = metadata | JOINT, {}  # the metrics are of the first stage as it begins
        with open_run(cfg, folder) as run:
            check_resumed_latent_space(run, space)
            model, adapter = init_weights.build_training_model(cfg, run, autoencoder, data, source), cfg.get("adapter")
            if run.is_main_process:
                card.write(folder)
                if not adapter:  # an adapter's base has the first stage
                    atomic.write_tensors(folder / "first_stage.safetensors", autoencoder.state_dict(), space.metadata)
            load_databases(model.conditioner, data, folder if run.is_main_process and not adapter else None)
            objective = instantiate(cfg.objective)
            lit = LitDiffusion(model, objective, self.optimizer, self.cond_drop_prob, self.grad_clip_norm, cfg.seed)
            ema = self.ema(model)
            captions = CaptionSource(data.classes, data.captions)
            sampler, guidance, grid = (instantiate(cfg[name]) for name in ("sampler", "guidance", "timestep_spacing"))

            def draw(step: int, name: str | None = None, guidance: Any = guidance) -> None:
                if not fault:
                    ts = grid(model.denoiser.schedule, score.steps)
                    samples = grid_samples(model, captions, ts, sampler, guidance)
                    run.save_samples(step, name or f"grids/step-{step:06d}", medium, samples, GRID_COLUMNS, card.rate)

            if fault := medium.fault(data.shape):
                run.print(f"grids       none: {fault}")
            if shapes := getattr(data, "shapes", None):
                run.print(f"shapes      {', '.join(f'{height}x{width}' for height, width in shapes)} (height x width)")
            options: dict[str, Any] = {"ema": ema, "draw": draw, "metadata": metadata}
            if self.snapshot_every is not None:
                options["averages"] = {f"ema_{length:g}": PowerEMA(model, length) for length in SIGMA_RELS}
                options["snapshot_every"] = self.snapshot_every
            rows = (self.steps - run.start) * self.batch_size
            accelerator = cfg.trainer.get("accelerator", "auto")
            options["watch"] = text_features_callbacks(self.text_features, model.conditioner, data, rows, accelerator)
            if make_score and score.eval_every is not None:
                measure = partial(
                    evaluate_during_training, model, score, captions, make_score(), sampler, guidance, grid
                )
                options["watch"] += [EvaluationCallback(measure, run.log_metrics, score.eval_every, ema)]
            reads = getattr(model.conditioner, "reads", ())
            image = "image" in {*getattr(objective, "keys", ()), *model.conditioner.keys, *reads}
            if subset is not None:
                held_out = training_data(
                    self.latents, autoencoder, space, add_neighbours(model.conditioner, subset), image
                )
                callback = validation_callback(self.validation, run, lit, ema, subset, held_out, self.steps)
                options["watch"] += [callback]
            callbacks = run.callbacks(
                "diffusion",
                steps=self.steps,
                lr_schedule=self.lr_schedule,
                log_every=self.log_every,
                save_every=self.save_every,
                grid_every=self.sample_every,
                **options,
            )
            neighbours = add_neighbours(model.conditioner, data)
            latents = training_data(self.latents, autoencoder, space, neighbours, image)
            instantiate(cfg.trainer)(
                lit, latents, callbacks, batch_size=self.batch_size, steps=self.steps, start=run.start, seed=cfg.seed
            )

            with ema.swapped_in():
                values = (
                    evaluate(model, score, captions, make_score, sampler, guidance, grid, run.print)
                    if make_score
                    else {}
                )
                if run.is_main_process:
                    weights = (
                        {adapters.local_parameter_name(name): value for name, value in ema.shadow.items()}
                        if adapter
                        else ema.shadow
                    )
                    atomic.write_tensors(folder / "weights.safetensors", weights, metadata)
                    scaled = partial(guidance, scale=values["guidance"]) if make_score else guidance
                    draw(self.steps, "samples", scaled)
            if make_score:
                values |= protocol.with_protocol_hash(
                    evaluation_protocol(
                        run.config,
                        score,
                        values,
                        data.fingerprint,
                        space.trained_name(ema.shadow) if joint else space.name,
                    )
                )
            if subset is not None:
                values |= last_validation(run, self.steps)
            values |= {f"baseline/{name}": value for name, value in baselines.items() if "/" in name}
            metrics = run.finish(values | {f"first_stage/{name}": value for name, value in reconstruction.items()})
            prompt = f'prompt="{data.captions[-1][0]}" ' if data.captions else ""
            run.print(
                f"\n{format_summary(metrics)}\n\n"
                + (f"samples  {folder / 'samples.png'}\n" if not fault else "")
                + f"metrics  {folder / 'metrics.json'}\nnext     python sample.py run={folder} {prompt}num=16"
            )
            return metrics.get(cfg.optimized_metric)


def scored_metrics(cfg: Any, score: EvaluationConfig, steps: int) -> tuple[set[str] | None, str]:
    """Return the names val/... of the numbers that a training writes, None if unknown, and why there are none if so."""
    if "_target_" not in cfg.metrics:
        return set(), "metrics=none measures nothing"
    if score.eval_every is None:
        return set(), "nothing is scored before the end; choose training.score.eval_every=STEPS"
    if score.eval_every > steps:
        return set(), f"training.score.eval_every={score.eval_every} is more than training.steps={steps}"
    names = metric_names(cfg.metrics, cfg.evaluator.get("net"))
    return names and {f"val/{name}_{format_count(score.eval_num)}" for name in names}, ""


def evaluation_protocol(
    config: Any, score: EvaluationConfig, values: dict[str, Any], data: str, autoencoder: str
) -> dict[str, Any]:
    """Return the protocol of the numbers of `evaluate`: the network that measured them, the data and the samples."""
    network = {name.removeprefix("score/"): value for name, value in values.items() if name.startswith("score/")}
    scales = [f"{scale:g}" for scale in score.guidance_scales]
    scale = float(values["guidance"]) if len(scales) < 2 else f"best of {', '.join(scales)} on {score.guidance_num}"
    weights = protocol.describe_weights("ema", config["training"])
    sampling = protocol.sampling_settings(
        config, steps=score.steps, scale=scale, weights=weights, arithmetic=values["arithmetic"]
    )
    return {
        **network,
        "n": values["n"],
        "data": data,
        "labels": "balanced",
        "autoencoder": autoencoder,
        "task": "generate()",
        **sampling,
    }


def check_resumed_latent_space(run: TrainingRun, space: LatentSpace) -> None:
    """Check that a resumed run was trained in this latent space so far. Raises UserError naming both otherwise."""
    if run.resume is None:
        return
    remedy = "the first stage was replaced since this run began: put it back, or give the run another name="
    space.require_same(run.resume.metadata, run.checkpoints / f"step-{run.resume.step:08d}", remedy)
    weights = run.folder / "first_stage.safetensors"
    if run.is_main_process and weights.is_file():
        space.require_same_file(weights, "remove it, and the same command writes the run's own")


def grid_samples(model, captions: CaptionSource, ts, sampler, guidance) -> list[torch.Tensor]:
    """Sample GRID_COLUMNS samples (C, ...) in [-1, 1] for each of the first ten classes, class by class."""
    kinds = max(1, len(captions.classes))
    rows = [column * kinds + row for row in range(min(kinds, 10)) for column in range(GRID_COLUMNS)]
    batches = generate_samples(model, captions.batch, rows, 0, len(rows), ts, sampler, guidance)
    return [sample for samples, _ in batches for sample in samples.cpu()]


def format_summary(metrics: dict[str, Any]) -> str:
    """Format the table that a run ends with: the scores of its samples beside the baselines'."""
    columns = [
        ("", "samples"),
        ("baseline/test/", "real test"),
        ("baseline/noisy/", "noise 0.05"),
        ("baseline/pca/", "PCA-50 Gaussian"),
    ]
    names = [n for n in metrics if n in ("precision", "recall", "accuracy") or n.startswith(("fd_", "kid_"))]
    lines = [" " * 12 + "".join(f"{title:>18}" for _, title in columns)]
    for name in names:
        cells = (metrics.get(prefix + name) for prefix, _ in columns)
        lines.append(
            f"{name:<12}"
            + "".join(f"{format(value, '.4g') if isinstance(value, int | float) else '':>18}" for value in cells)
        )
    if not names:
        return f"not scored (metrics=none)  seconds {metrics.get('seconds')}"
    extra = {"guidance": metrics.get("guidance"), "n": metrics.get("n"), "seconds": metrics.get("seconds")}
    return "\n".join([*lines, "  ".join(f"{name} {value}" for name, value in extra.items())])

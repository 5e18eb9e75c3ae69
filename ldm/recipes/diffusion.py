"""Stage two: a denoiser trained in the latent space of the first stage, sampled and scored."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from ldm.checkpoint import adapters
from ldm.checkpoint.latent_space import LatentSpace
from ldm.config import build
from ldm.data.latents import LatentDataset
from ldm.ema import SIGMA_RELS, PowerEMA
from ldm.evaluation import evaluator, protocol
from ldm.evaluation.evaluate import CaptionSource, EvaluationConfig, evaluate, evaluate_during_training, format_count
from ldm.io import atomic
from ldm.io.images import make_grid
from ldm.metrics.features import to_uint8
from ldm.metrics.names import metric_names
from ldm.recipes import init_weights
from ldm.recipes.autoencoder import first_stage_dependency, load_or_train_first_stage
from ldm.recipes.estimate import print_estimate
from ldm.recipes.evaluator import evaluator_dependency
from ldm.recipes.latents import cached_moments
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import TrainingRun, open_run
from ldm.runs import cache
from ldm.runs.data_card import DataCard
from ldm.sampling.generate import generate_samples
from ldm.training.best import require_metric
from ldm.training.callbacks import EvaluationCallback
from ldm.training.diffusion import LitDiffusion


def train(
    cfg: Any,
    *,
    steps: int,
    batch_size: int,
    cond_drop_prob: float,
    grad_clip_norm: float | None,
    ema_sigma_rel: float,
    optimizer,
    lr_schedule,
    log_every: int,
    sample_every: int,
    save_every: int,
    score: EvaluationConfig,
    snapshot_every: int | None = None,
) -> float | None:
    """Train on cached latents, average the weights, choose the guidance, draw and score; returns the metric named by cfg.optimized_metric."""
    cfg = init_weights.inherit_base_config(cfg)
    folder = run_dir(cfg)
    if done := final_metrics(cfg, folder):
        print(f"this run is done: {folder}\n{format_summary(done)}")
        return done.get(cfg.optimized_metric)
    require_metric(cfg.get("keep_best"), *scored_metrics(cfg, score, steps))
    make_score, baselines = evaluator.make_scorer(cfg, cfg.metrics)
    data = build.build_degraded_dataset(cfg, "train")
    print_estimate(cfg, data)
    source = init_weights.load_init_model(cfg)
    autoencoder, space, reconstruction = (
        load_or_train_first_stage(cfg, data.channels)
        if source is None
        else init_weights.adopt_first_stage(cfg, source, data.channels)
    )
    init_weights.check_teacher(cfg, space)
    with open_run(cfg, folder) as run:
        check_resumed_latent_space(run, space)
        model, adapter = init_weights.build_training_model(cfg, run, autoencoder, data, source), cfg.get("adapter")
        if run.is_main_process:
            DataCard.from_dataset(data).write(folder)
            if not adapter:  # whose first stage is its base's
                atomic.write_tensors(folder / "first_stage.safetensors", autoencoder.state_dict(), space.metadata)
        objective = instantiate(cfg.objective)
        lit = LitDiffusion(model, objective, optimizer, cond_drop_prob, grad_clip_norm, cfg.seed)
        ema = PowerEMA(model, ema_sigma_rel)
        told = CaptionSource(data.classes, data.captions)
        sampler, guidance, grid = (instantiate(cfg[name]) for name in ("sampler", "guidance", "timestep_spacing"))

        def draw(step: int) -> None:
            sheet = sample_grid(model, told, grid(model.denoiser.schedule, score.steps), sampler, guidance)
            run.save_image(step, f"grids/step-{step:06d}", sheet)

        if shapes := getattr(data, "shapes", None):
            run.print(f"shapes      {', '.join(f'{height}x{width}' for height, width in shapes)} (height x width)")
        often: dict[str, Any] = {"log_every": log_every, "save_every": save_every, "grid_every": sample_every}
        beside: dict[str, Any] = {"ema": ema, "draw": draw, "metadata": space.metadata}
        if snapshot_every is not None:
            beside |= {
                "averages": {f"ema_{length:g}": PowerEMA(model, length) for length in SIGMA_RELS},
                "snapshot_every": snapshot_every,
            }
        if make_score and score.eval_every is not None:
            beside["watch"] = [
                EvaluationCallback(
                    partial(evaluate_during_training, model, score, told, make_score(), sampler, guidance, grid),
                    run.log_metrics,
                    score.eval_every,
                    ema,
                )
            ]
        callbacks = run.callbacks("diffusion", steps=steps, lr_schedule=lr_schedule, **beside, **often)
        reads = getattr(model.conditioner, "reads", ())
        image = "image" in {*getattr(objective, "keys", ()), *model.conditioner.keys, *reads}
        latents = LatentDataset(data, cached_moments(autoencoder, space, data), image)
        instantiate(cfg.trainer)(
            lit, latents, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=cfg.seed
        )

        with ema.swapped_in():
            values = evaluate(model, score, told, make_score, sampler, guidance, grid, run.print) if make_score else {}
            if run.is_main_process:
                found = (
                    {adapters.local_parameter_name(name): value for name, value in ema.shadow.items()}
                    if adapter
                    else ema.shadow
                )
                atomic.write_tensors(folder / "weights.safetensors", found, space.metadata)
                chosen = partial(guidance, scale=values["guidance"]) if make_score else guidance
                sheet = sample_grid(model, told, grid(model.denoiser.schedule, score.steps), sampler, chosen)
                run.save_image(steps, "samples", sheet)
        beside = {f"baseline/{name}": value for name, value in baselines.items() if "/" in name}
        if make_score:
            values |= protocol.with_protocol_hash(
                evaluation_protocol(run.config, score, values, data.fingerprint, space.name)
            )
        metrics = run.finish(values | beside | {f"first_stage/{name}": value for name, value in reconstruction.items()})
        run.print(f"\n{format_summary(metrics)}\n\nsamples  {folder / 'samples.png'}\nmetrics  {folder / 'metrics.json'}\n"
                f"next     python sample.py run={folder} prompt=\"{data.captions[-1][0]}\" num=16")  # fmt: skip
        return metrics.get(cfg.optimized_metric)


def scored_metrics(cfg: Any, score: EvaluationConfig, steps: int) -> tuple[set[str] | None, str]:
    """The numbers val/... that a training writes, None where that cannot be known, and why there are none."""
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
    """What the protocol of the numbers that `evaluate` gave says: of the network that measured, of the data and of the samples."""
    network = {name.removeprefix("score/"): value for name, value in values.items() if name.startswith("score/")}
    tried = [f"{one:g}" for one in score.guidance_scales]
    scale = float(values["guidance"]) if len(tried) < 2 else f"best of {', '.join(tried)} on {score.guidance_num}"
    sigma_rel = config["training"]["ema_sigma_rel"]
    drawn = protocol.sampling_settings(
        config, steps=score.steps, scale=scale, sigma_rel=sigma_rel, arithmetic=values["arithmetic"]
    )
    return {
        **network,
        "n": values["n"],
        "data": data,
        "labels": "balanced",
        "autoencoder": autoencoder,
        "task": "generate()",
        **drawn,
    }


def run_dir(cfg: Any) -> Path:
    """The folder of the run."""
    return cache.run_dir(cfg)


def dependencies(cfg: Any) -> list[cache.CacheEntry]:
    """What must be there before a diffusion model: who measures it, and the first stage, unless it begins from a model that has one."""
    return [*evaluator_dependency(cfg), *([] if cfg.get("init") else first_stage_dependency(cfg))]


def check_resumed_latent_space(run: TrainingRun, space: LatentSpace) -> None:
    """Raises UserError, naming both, if what the run has so far was made in the latent space of another autoencoder."""
    if run.resume is None:
        return
    remedy = "the first stage was replaced since this run began: put it back, or give the run another name="
    space.require_same(run.resume.metadata, run.checkpoints / f"step-{run.resume.step:08d}", remedy)
    kept = run.folder / "first_stage.safetensors"
    if run.is_main_process and kept.is_file():
        space.require_same_file(kept, "remove it, and the same command writes the run's own")


def sample_grid(model, told: CaptionSource, ts, sampler, guidance, each: int = 10) -> torch.Tensor:
    """A picture with a row of `each` samples for every class, for the first ten."""
    classes = min(len(told.classes), 10)
    rows = [column * len(told.classes) + row for row in range(classes) for column in range(each)]
    images = torch.cat(
        [image for image, _ in generate_samples(model, told.batch, rows, 0, len(rows), ts, sampler, guidance)]
    )
    return make_grid(to_uint8(images.cpu()), columns=each, zoom=2)


def format_summary(metrics: dict[str, Any]) -> str:
    """The table a run ends with: ours beside what is good and what is bad."""
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

"""Stage two: a denoiser trained in the latent space of the first stage, sampled and scored."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from ldm import adapted, build, durable, picture, protocol
from ldm.data.latents import Latents, read_all, write_all
from ldm.ema import LENGTHS, PowerEMA
from ldm.errors import UserError
from ldm.fetch import cache_dir
from ldm.load import DataCard
from ldm.metrics.features import to_uint8
from ldm.metrics.names import names_of
from ldm.score import Protocol, Told, evaluate, samples, short, watch
from ldm.space import Space
from ldm.stage import autoencoder as first_stage
from ldm.stage import begin, cache, judge
from ldm.stage.estimate import announce
from ldm.stage.resume import finished
from ldm.stage.run import Run, opened
from ldm.training.best import require_metric
from ldm.training.callbacks import Scores
from ldm.training.diffusion import LitDiffusion


def train(
    cfg: Any,
    *,
    steps: int,
    batch_size: int,
    drop: float,
    clip: float | None,
    sigma_rel: float,
    optimizer,
    lr_schedule,
    log_every: int,
    grid_every: int,
    save_every: int,
    score: Protocol,
    snapshot_every: int | None = None,
) -> float | None:
    """Train on cached latents, average the weights, choose the guidance, draw and score; returns the metric named by cfg.optimize."""
    cfg = adapted.settled(cfg)
    folder = place(cfg)
    if done := finished(cfg, folder):
        print(f"this run is done: {folder}\n{summary(done)}")
        return done.get(cfg.optimize)
    require_metric(cfg.get("keep_best"), *scored(cfg, score, steps))
    make_score, baselines = judge.scorer(cfg, cfg.metrics)
    data = build.degraded(cfg, "train")
    announce(cfg, data)
    source = begin.source(cfg)
    autoencoder, space, reconstruction = (
        first_stage.load(cfg, data.channels) if source is None else begin.first_stage(cfg, source, data.channels)
    )
    begin.taught(cfg, space)
    with opened(cfg, folder) as run:
        goes_on(run, space)
        model, adapter = begin.model(cfg, run, autoencoder, data, source), cfg.get("adapter")
        if run.chief:
            DataCard.of(data).write(folder)
            if not adapter:  # whose first stage is its base's
                durable.write_tensors(folder / "first_stage.safetensors", autoencoder.state_dict(), space.metadata)
        objective = instantiate(cfg.objective)
        lit = LitDiffusion(model, objective, optimizer, drop, clip, cfg.seed)
        ema = PowerEMA(model, sigma_rel)
        told = Told(data.classes, data.captions)
        sampler, guidance, grid = (instantiate(cfg[name]) for name in ("sampler", "guidance", "grid"))

        def draw(step: int) -> None:
            sheet = gallery(model, told, grid(model.denoiser.schedule, score.steps), sampler, guidance)
            run.picture(step, f"grids/step-{step:06d}", sheet)

        if shapes := getattr(data, "shapes", None):
            run.say(f"shapes      {', '.join(f'{height}x{width}' for height, width in shapes)} (height x width)")
        often: dict[str, Any] = {"log_every": log_every, "save_every": save_every, "grid_every": grid_every}
        beside: dict[str, Any] = {"ema": ema, "draw": draw, "metadata": space.metadata}
        if snapshot_every is not None:
            beside |= {"averages": {f"ema_{length:g}": PowerEMA(model, length) for length in LENGTHS}, "snapshot_every": snapshot_every}
        if make_score and score.every is not None:
            beside["watch"] = [
                Scores(partial(watch, model, score, told, make_score(), sampler, guidance, grid), run.write, score.every, ema)
            ]
        callbacks = run.callbacks("diffusion", steps=steps, lr_schedule=lr_schedule, **beside, **often)
        reads = getattr(model.conditioner, "reads", ())
        image = "image" in {*getattr(objective, "keys", ()), *model.conditioner.keys, *reads}
        latents = Latents(data, moments(autoencoder, space, data), image)
        instantiate(cfg.trainer)(lit, latents, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=cfg.seed)

        with ema.applied():
            values = evaluate(model, score, told, make_score, sampler, guidance, grid, run.say) if make_score else {}
            if run.chief:
                found = {adapted.own(name): value for name, value in ema.shadow.items()} if adapter else ema.shadow
                durable.write_tensors(folder / "weights.safetensors", found, space.metadata)
                chosen = partial(guidance, scale=values["guidance"]) if make_score else guidance
                sheet = gallery(model, told, grid(model.denoiser.schedule, score.steps), sampler, chosen)
                run.picture(steps, "samples", sheet)
        beside = {f"baseline/{name}": value for name, value in baselines.items() if "/" in name}
        if make_score:
            values |= protocol.stated(said(run.config, score, values, data.fingerprint, space.name))
        metrics = run.finish(values | beside | {f"first_stage/{name}": value for name, value in reconstruction.items()})
        run.say(f"\n{summary(metrics)}\n\nsamples  {folder / 'samples.png'}\nmetrics  {folder / 'metrics.json'}\n"
                f"next     python sample.py run={folder} prompt=\"{data.captions[-1][0]}\" num=16")  # fmt: skip
        return metrics.get(cfg.optimize)


def scored(cfg: Any, score: Protocol, steps: int) -> tuple[set[str] | None, str]:
    """The numbers val/... that a training writes, None where that cannot be known, and why there are none."""
    if "_target_" not in cfg.metrics:
        return set(), "metrics=none measures nothing"
    if score.every is None:
        return set(), "nothing is scored before the end; choose training.score.every=STEPS"
    if score.every > steps:
        return set(), f"training.score.every={score.every} is more than training.steps={steps}"
    names = names_of(cfg.metrics, cfg.judge.get("net"))
    return names and {f"val/{name}_{short(score.every_num)}" for name in names}, ""


def said(config: Any, score: Protocol, values: dict[str, Any], data: str, autoencoder: str) -> dict[str, Any]:
    """What the protocol of the numbers that `evaluate` gave says: of the network that measured, of the data and of the samples."""
    network = {name.removeprefix("score/"): value for name, value in values.items() if name.startswith("score/")}
    tried = [f"{one:g}" for one in score.guidances]
    scale = float(values["guidance"]) if len(tried) < 2 else f"best of {', '.join(tried)} on {score.guidance_num}"
    sigma_rel = config["training"]["sigma_rel"]
    drawn = protocol.drawn(config, steps=score.steps, scale=scale, sigma_rel=sigma_rel, arithmetic=values["arithmetic"])
    return {**network, "n": values["n"], "data": data, "labels": "balanced", "autoencoder": autoencoder, "task": "generate()", **drawn}


def place(cfg: Any) -> Path:
    """The folder of the run."""
    return cache.run_folder(cfg)


def needs(cfg: Any) -> list[cache.Kept]:
    """What must be there before a diffusion model: who measures it, and the first stage, unless it begins from a model that has one."""
    return [*judge.wanted(cfg), *([] if cfg.get("init") else first_stage.wanted(cfg))]


def goes_on(run: Run, space: Space) -> None:
    """Raises UserError, naming both, if what the run has so far was made in the latent space of another autoencoder."""
    if run.resume is None:
        return
    remedy = "the first stage was replaced since this run began: put it back, or give the run another name="
    space.admit(run.resume.metadata, run.checkpoints / f"step-{run.resume.step:08d}", remedy)
    kept = run.folder / "first_stage.safetensors"
    if run.chief and kept.is_file():
        space.admit_file(kept, "remove it, and the same command writes the run's own")


def moments(autoencoder, space: Space, data) -> Any:
    """The data set's cached moments (flips, N, 2C, h, w), computed now and kept if they are not there; of several shapes, joined.

    Raises UserError for a file that holds another autoencoder's latents, or another data set's.
    """
    from filelock import FileLock

    if hasattr(data, "joined"):
        return data.joined([moments(autoencoder, space, part) for part in data.parts])
    path = cache_dir() / "latents" / f"{data.fingerprint}-{space.identity[:16]}-{'both' if data.flip else 'plain'}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            autoencoder.to("cuda" if torch.cuda.is_available() else "cpu")
            write_all(path, autoencoder, data, {**space.metadata, "data": data.fingerprint})
            autoencoder.to("cpu")
    metadata, remedy = durable.read_metadata(path), "remove it, and the same command computes the right ones"
    space.admit(metadata, path, remedy)
    if metadata.get("data") != data.fingerprint:
        raise UserError(f"{path} holds latents of the data {metadata.get('data')}, not of {data.fingerprint}; {remedy}")
    return read_all(path)


def gallery(model, told: Told, ts, sampler, guidance, each: int = 10) -> torch.Tensor:
    """A picture with a row of `each` samples for every class, for the first ten."""
    classes = min(len(told.classes), 10)
    rows = [column * len(told.classes) + row for row in range(classes) for column in range(each)]
    images = torch.cat([image for image, _ in samples(model, told.batch, rows, 0, len(rows), ts, sampler, guidance)])
    return picture.grid(to_uint8(images.cpu()), columns=each, zoom=2)


def summary(metrics: dict[str, Any]) -> str:
    """The table a run ends with: ours beside what is good and what is bad."""
    columns = [("", "samples"), ("baseline/test/", "real test"), ("baseline/noisy/", "noise 0.05"), ("baseline/pca/", "PCA-50 Gaussian")]
    names = [n for n in metrics if n in ("precision", "recall", "accuracy") or n.startswith(("fd_", "kid_"))]
    lines = [" " * 12 + "".join(f"{title:>18}" for _, title in columns)]
    for name in names:
        cells = (metrics.get(prefix + name) for prefix, _ in columns)
        lines.append(f"{name:<12}" + "".join(f"{format(value, '.4g') if isinstance(value, int | float) else '':>18}" for value in cells))
    if not names:
        return f"not scored (metrics=none)  seconds {metrics.get('seconds')}"
    extra = {"guidance": metrics.get("guidance"), "n": metrics.get("n"), "seconds": metrics.get("seconds")}
    return "\n".join([*lines, "  ".join(f"{name} {value}" for name, value in extra.items())])

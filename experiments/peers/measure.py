"""Quality at equal CPU minutes: python experiments/peers/measure.py RUN [minutes=2,4,8] [seeds=0,1] [num=2000] [rates=1e-4,5e-4,2e-3] ...

RUN, a quickstart, lends its first stage, text encoder, data and judge; each side trains a U-Net in those latents for so many minutes of CPU
time of its training loop, one thread, in bfloat16 where the CPU multiplies it.  Theirs is diffusers' UNet2DConditionModel with our layers,
trained as train_text_to_image.py trains (epsilon, AdamW, constant rate, clipped, EMAModel): with the first seed at each of the rates, with
the others at those that were best; of these, and of raw and averaged weights, the best on other noise (tried.csv) is scored.  Both are
drawn alike.  A row of results.csv a model that was scored, and one of reconstructions; started again it goes on with what is missing.
"""

import copy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import told
import torch
from torch.nn import functional as F

from ldm import durable
from ldm.report import rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE, TRIED = HERE / "results.csv", HERE / "tried.csv"
KEYS = ("minutes", "seeds", "num", "rates")  # of this command; what else is typed goes to train.py
BATCH, WARMUP, DROP = 128, 100, 0.1
SCALES = (3.0, 5.0)  # of guidance in its interval; the better on other seeds is taken
DEV, DEV_SEED, SEED, STEPS = 500, 6_000_000, 5_000_000, 16


def main(run: str, *words: str) -> None:
    torch.set_num_threads(1)
    said = dict(word.split("=", 1) for word in words)
    more = [word for word in words if word.partition("=")[0] not in KEYS]
    minutes = [float(one) for one in said.get("minutes", "2,4,8").split(",")]
    rates = [float(one) for one in said.get("rates", "1e-4,5e-4,2e-3").split(",")]
    shared = Shared(Path(run).absolute(), int(said.get("num", 2000)), more)
    if not known({"who": "reconstructions"}, TABLE):
        keep({"who": "reconstructions", "fd_fashion": shared.reconstructed()})
    for seed in map(int, said.get("seeds", "0,1").split(",")):
        ours(shared, minutes, seed)
        rates = theirs(shared, minutes, seed, rates)
    told.write(rows.read(TABLE), HERE)


class Shared:
    """What both sides have: latents, captions, the encoder of these, the judge, and how a model is scored."""

    def __init__(self, run: Path, num: int, more: Sequence[str] = ()):
        from ldm import build
        from ldm.data.latents import Latents, encode_all
        from ldm.load import config_of, load
        from ldm.score import Told
        from ldm.stage import judge

        config = config_of(run)
        self.run, self.num, self.more, self.model = run, num, more, load(run)
        data = build.dataset(config)
        self.latents = Latents(data, encode_all(self.model.autoencoder, data))
        make, _ = judge.scorer(config, config.metrics)
        self.config, self.score, self.told = config, make(), Told(data.classes, data.captions)

    def scored(self, model: Any) -> dict[str, float]:
        """The numbers of a model without guidance and with it, the scale chosen on other seeds."""
        plain = self.measured(model, 1.0, self.num, SEED)
        tried = {scale: self.measured(model, scale, DEV, DEV_SEED)["fd_fashion"] for scale in SCALES}
        best = min(tried, key=tried.__getitem__)
        guided = self.measured(model, best, self.num, SEED)
        names = ("fd_fashion", "recall", "accuracy")
        return {**{n: plain[n] for n in names}, "scale": best, **{f"guided_{n}": guided[n] for n in names}}

    def net(self) -> Any:
        """Theirs, for these latents and this encoder."""
        return net(self.model.autoencoder.z_channels, self.model.conditioner.context_dim)

    def reconstructed(self) -> float:
        """The distance of as many held-out images, encoded and decoded: what nobody trained in these latents gets below."""
        from ldm import build
        from ldm.stage.autoencoder import reconstruct

        test = build.dataset(self.config, "test")
        return reconstruct(self.model.autoencoder, test, self.score, self.num)["rfd_fashion"]

    def measured(self, model: Any, scale: float, num: int, seed: int) -> dict[str, float]:
        from ldm.diffusion import sampler, times
        from ldm.diffusion.guidance import cfg
        from ldm.score import measure, samples

        guidance = partial(cfg, scale=scale, interval=(0.2, 0.75)) if scale != 1 else cfg
        ts = times.trailing(model.denoiser.schedule, STEPS)
        return measure(self.score, samples(model, self.told.batch, range(num), seed, 250, ts, sampler.dpmpp_2m, guidance, "auto"))


def known(row: Mapping[str, Any], table: Path) -> bool:
    """Whether the csv has a row that says this."""
    said = {name: rows.text(value) for name, value in row.items()}
    return any(said.items() <= one.items() for one in rows.read(table))


def keep(row: Mapping[str, Any]) -> None:
    print("  ".join(f"{name} {rows.text(value)}" for name, value in row.items()), flush=True)
    rows.add(TABLE, row)


def ours(shared: Shared, minutes: Sequence[float], seed: int) -> None:
    """`python train.py` of as many steps as fit in the minutes, which the CPU time between two short trainings tells."""
    from ldm.load import load

    wanted = [{"who": "ours", "minutes": one, "seed": seed} for one in minutes]
    if all(known(row, TABLE) for row in wanted):
        return
    shutil.rmtree(shared.run.parent / "peers" / "timed", ignore_errors=True)
    trained(shared, 10, seed, "timed")  # the first has more to read
    (few, short), (many, longer) = ((steps, trained(shared, steps, seed, "timed")[1]) for steps in (20, 220))
    each = (longer - short) / (many - few)
    for row in wanted:
        if not known(row, TABLE):
            steps = round(60 * row["minutes"] / each)
            run, _ = trained(shared, steps, seed, "ours")
            model = load(run)
            keep({**row, "weights": "ema", "steps": steps, "parameters": size(model.denoiser.net), **shared.scored(model)})


def trained(shared: Shared, steps: int, seed: int, name: str) -> tuple[Path, float]:
    """A run of the quickstart's recipe of so many steps, and the CPU seconds that its command took."""
    import resource

    place = shared.run.parent / "peers" / name / f"{steps}-s{seed}"
    words = (f"training.steps={steps}", f"seed={seed}", f"runs={place}", "metrics=none", "trainer=cpu", "trainer.precision=auto")
    often = (f"training.grid_every={steps}", f"training.save_every={steps}", f"training.lr_schedule.warmup={min(WARMUP, steps // 4)}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *shared.more, *words, *often], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (folder,) = (file.parent for file in place.glob("*/config.yaml"))
    return folder, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def theirs(shared: Shared, minutes: Sequence[float], seed: int, rates: Sequence[float]) -> list[float]:
    """diffusers' recipe at each rate, its weights kept at each of the minutes, raw and averaged, and the best scored; returns its rates."""
    place = shared.run.parent / "peers" / f"theirs-s{seed}"
    for rate in rates:
        wanted = [{"minutes": one, "seed": seed, "rate": rate} for one in minutes]
        if all(known({**row, "weights": "ema"}, TRIED) for row in wanted):
            continue
        for row, (steps, weights) in zip(wanted, recipe(shared, rate, [60 * one for one in minutes], seed), strict=True):
            for kind, state in weights.items():
                file = place / f"{rate:g}-{row['minutes']:g}-{kind}.safetensors"
                durable.write_tensors(file, state)
                found = shared.measured(ours_of(shared, state), 1.0, DEV, DEV_SEED)
                rows.add(TRIED, {**row, "weights": kind, "steps": steps, "fd_fashion": found["fd_fashion"], "file": file.name})
    won = []
    for one in minutes:
        row = {"who": "diffusers", "minutes": one, "seed": seed}
        tried = [some for some in rows.read(TRIED) if (float(some["minutes"]), some["seed"]) == (one, str(seed))]
        best = min(tried, key=lambda some: float(some["fd_fashion"]))
        won.append(float(best["rate"]))
        if not known(row, TABLE):
            model = ours_of(shared, durable.read_tensors(place / best["file"]))
            more = {name: best[name] for name in ("rate", "weights", "steps")}
            keep({**row, **more, "parameters": size(model.denoiser.net), **shared.scored(model)})
    return sorted(set(won))


def net(channels: int, dim: int) -> Any:
    """UNet2DConditionModel with the layers of ours (conf/net/quick.yaml), for latents of so many channels told contexts (B, L, dim)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{"sample_size": 8, "in_channels": channels, "out_channels": channels, "block_out_channels": (48, 96), "layers_per_block": 1},
        **{"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")},
        **{"cross_attention_dim": dim, "attention_head_dim": 3, "norm_num_groups": 3, "resnet_time_scale_shift": "scale_shift"},
        use_linear_projection=True,
    )


def recipe(shared: Shared, rate: float, marks: Sequence[float], seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train; at each mark, in seconds of CPU time, the step and the weights {"raw": ..., "ema": ...}. Scoring is not on the clock."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    unet = shared.net().train()
    scheduler, average = DDPMScheduler(), EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=1e-2)
    autoencoder, conditioner = shared.model.autoencoder, shared.model.conditioner
    low, spent, step = torch.cpu._is_amx_tile_supported(), 0.0, 0
    null = conditioner.null({"index": [0]})
    for mark in marks:
        since = time.process_time()
        while spent + time.process_time() - since < mark:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
            batch = shared.latents.batch([(0, int(i)) for i in torch.randint(len(shared.latents), (BATCH,))])
            with torch.no_grad():
                posterior = autoencoder.posterior_of(batch["moments"])
                z = autoencoder.normalise(posterior.sample(torch.randn_like(posterior.mean)))
                cond = conditioner(batch)
                cond = cond.where(torch.rand(BATCH) >= DROP, null.index([0] * BATCH))
            noise, t = torch.randn_like(z), torch.randint(0, 1000, (BATCH,))
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                out = unet(scheduler.add_noise(z, noise, t), t, cond.context, encoder_attention_mask=cond.mask).sample
            F.mse_loss(out.float(), noise).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(unet.parameters())
            step += 1
        spent += time.process_time() - since
        averaged = copy.deepcopy(unet)
        average.copy_to(averaged.parameters())
        yield step, {"raw": unet.state_dict(), "ema": averaged.state_dict()}


def ours_of(shared: Shared, state: Mapping[str, torch.Tensor]) -> Any:
    """Their weights in our network, so that both are drawn by one code."""
    from hydra.utils import instantiate

    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.prediction import Eps
    from ldm.diffusion.schedule import linear
    from ldm.interop import diffusers, diffusers_config
    from ldm.model import LatentDiffusion

    config = shared.net().config
    made = instantiate(diffusers_config.net(dict(config)), in_channels=config.in_channels, out_channels=config.in_channels,
                       context_dim=config.cross_attention_dim)  # fmt: skip
    made.load_state_dict(diffusers.import_unet(dict(state)))
    return LatentDiffusion(shared.model.autoencoder, shared.model.conditioner, Denoiser(made.eval(), linear(), Eps()), shared.model.size)


def size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])

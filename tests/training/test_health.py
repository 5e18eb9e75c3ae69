"""Warnings about a first stage's training: made-up sequences, faults by construction, and trainings that were sound."""

import csv
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from smoke import ROOT, command, composed, here
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.loss import ReconstructionLoss
from ldm.autoencoder.vq import AutoencoderVQ
from ldm.config.build import to_container
from ldm.errors import ConfigError
from ldm.recipes.autoencoder import make_grid_writer
from ldm.recipes.run import TrainingRun
from ldm.runs import cache, identity
from ldm.runs.metrics_log import MetricsLog, read_metrics_log
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.callbacks import MetricsRecorder
from ldm.training.fit import fit
from ldm.training.health import HealthCondition, HealthLimits, HealthMonitor, check, number
from ldm.training.loggers import NoLogger

ABOVE = HealthCondition("x", "train/x", number("train/x"), 1.0, True, "remedy")
BELOW = HealthCondition("x", "train/x", number("train/x"), 1.0, False, "remedy")


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [
        (ABOVE, [2, 2], None),  # 10 steps of records, the window has 20
        (ABOVE, [2, 2, 2], (20, 30, 2)),
        (ABOVE, [0, 0, 2], (30, 30, 1)),  # the median of 0 and 2, at the limit
        (ABOVE, [0, 0, 0, 2], (40, 40, 1)),
        (ABOVE, [0, 2, 0.9], (20, 30, 1.45)),
        (ABOVE, [3, 3, 3, 0, 0.5], None),  # past
        (ABOVE, [0.9, 0.9, 0.9, 0.9], None),
        (BELOW, [0.5, 0.5, 0.5], (20, 30, 0.5)),
        (BELOW, [2, 2, 2], None),
        (BELOW, [0, 3, 3], None),
        (ABOVE, [2], None),
    ],
)
def test_check_takes_median_of_window(condition, values, expected):
    """Records every 10 steps, a window of 20: two of them."""
    warning = check(condition, [(10 * (i + 1), value) for i, value in enumerate(values)], 20)
    assert expected == (warning and (warning.since, warning.step, warning.value))


@pytest.mark.parametrize(("values", "warns"), [([2], False), ([2, 2], True), ([2, 0.5], True), ([2, -0.5], False)])
def test_check_takes_two_records_where_window_is_shorter(values, warns):
    """Records every 500 steps, a window of 100: that of one record says nothing, the last two count."""
    series = [(500 * (i + 1), value) for i, value in enumerate(values)]
    assert (check(ABOVE, series, 100) is not None) == warns


def test_one_outlier_is_no_warning():
    series = [(10 * (i + 1), 50.0 if i == 7 else 0.0) for i in range(12)]
    assert all(check(ABOVE, series[: n + 1], 40) is None for n in range(12))


def test_monitor_warns_once_and_ignores_numbers_that_are_not_finite():
    monitor = HealthMonitor([ABOVE], 20)
    values = [2, 2, float("nan"), None, 2, 2, 0, 2, 2, 2, 2]
    warnings = [monitor.observe(10 * (i + 1), {"train/x": value, "other": 9}) for i, value in enumerate(values)]
    assert [len(new) for new in warnings] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    (warning,) = warnings[4]
    assert str(warning) == "train/x is 2 at step 50, above the limit 1 since step 20: remedy"


def names(limits: HealthLimits, rows, weight: float = 0.1, num_codes: int | None = None) -> list[str]:
    """The conditions about which rows (step, numbers) warn, in their order."""
    monitor = HealthMonitor(limits.conditions(weight, num_codes), limits.window)
    return [warning.condition.name for step, row in rows for warning in monitor.observe(step, row)]


@pytest.mark.parametrize(
    ("row", "warns", "sound"),
    [
        ({"train/discriminator_accuracy": 0.99}, "discriminator_accuracy", {"train/discriminator_accuracy": 0.97}),
        ({"train/logits_real": 15.0, "train/logits_fake": -6.0}, "logit_gap", {"train/logits_real": 15.0}),
        ({"train/logits_real": 1.0, "train/logits_fake": -30.0}, "logit_gap", {"train/logits_fake": -30.0}),
        ({"train/adversarial_weight": 600.0}, "adversarial_weight", {"train/adversarial_weight": 400.0}),
        ({"train/dead_channels": 1.0}, "dead_channels", {"train/dead_channels": 0.4}),
        ({"train/dead_codes": 1020.0}, "dead_codes", {"train/dead_codes": 1000.0}),
        ({"val/high_frequency_ratio": 0.02}, "blur", {"val/high_frequency_ratio": 0.1}),
        ({"val/high_frequency_ratio": 5.0}, "noise", {"val/high_frequency_ratio": 3.0}),
    ],
)
def test_each_condition_reads_its_number(row, warns, sound):
    """adversarial_weight: 0.1 of the discriminator's times 1e4 is the largest. dead_codes: of 1024."""
    steps = range(50, 501, 50)
    assert names(HealthLimits(), [(step, row) for step in steps], num_codes=1024) == [warns]
    assert names(HealthLimits(), [(step, sound) for step in steps], num_codes=1024) == []


def test_recorded_trainings_warn_only_where_discriminator_won():
    """experiments/first_stage: at the end its README finds the discriminator of one of four to have all but won."""
    runs = defaultdict(list)
    with (ROOT / "experiments/first_stage/curves.csv").open() as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if "/" in name and value}
            runs[row["data"], row["model"]].append((int(row["step"]), values))
    assert len(runs) == 4
    for run, rows in runs.items():
        expected = ["discriminator_accuracy"] if run == ("CIFAR10", "KL f = 8") else []
        assert names(HealthLimits(), rows) == expected, run


class Images:
    """Eight random images (1, 8, 8) with values in (-1, 1)."""

    image = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).tanh()

    def __len__(self):
        return 8

    def batch(self, at):
        epoch, index = zip(*at, strict=True)
        return {"image": self.image[list(index)], "epoch": list(epoch), "index": list(index)}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ConvTranspose2d(2, 1, 2, stride=2)

    @property
    def last_layer(self):
        return self.net.weight

    def forward(self, z):
        return self.net(z)


def stage(kind: str = "kl", lr: float = 0.0) -> LitAutoencoder:
    """Linear networks that keep their weights at the rate 0."""
    torch.manual_seed(0)
    if kind == "kl":
        autoencoder = AutoencoderKL(nn.Conv2d(1, 4, 2, stride=2), Decoder(), 2, 2)
    else:
        autoencoder = AutoencoderVQ(nn.Conv2d(1, 2, 2, stride=2), Decoder(), 2, 2, num_codes=200)
    sgd = partial(torch.optim.SGD, lr=lr)
    return LitAutoencoder(autoencoder, ReconstructionLoss(), sgd, nn.Conv2d(1, 1, 2, stride=2), sgd)


def warned(lit: LitAutoencoder, num_codes: int | None = None, steps: int = 12) -> list[str]:
    """Train, and return the names of all warnings: records every 2 steps, a window of 4."""
    limits, warnings = HealthLimits(window=4), []
    monitor = HealthMonitor(limits.conditions(lit.weight, num_codes), limits.window)
    record = MetricsRecorder(lambda step, values: warnings.extend(monitor.observe(step, values)), 2, steps)
    fit(lit, Images(), [record], batch_size=4, steps=steps, accelerator="cpu", precision="32")
    return [warning.condition.name for warning in warnings]


def test_sound_training_warns_of_nothing():
    assert warned(stage(lr=1e-3)) == []
    assert warned(stage("vq", lr=1e-3), num_codes=200) == []


@torch.no_grad()
def test_discriminator_that_wins_warns_once():
    """Reconstructions are darker than any image, and the logits are brightness."""
    lit = stage()
    lit.autoencoder.decoder.net.bias.fill_(-9)
    lit.discriminator.weight.fill_(0.25)
    lit.discriminator.bias.fill_(2)
    with torch.enable_grad():
        assert warned(lit) == ["discriminator_accuracy"]


@torch.no_grad()
def test_diverging_logits_and_clamped_weight_warn_once():
    """A discriminator of the sign of the brightness alone: large logits, and no gradient."""
    lit = stage()
    lit.autoencoder.decoder.net.bias.fill_(-9)
    lit.discriminator = nn.Sequential(nn.Conv2d(1, 1, 2, stride=2), nn.Hardtanh(-1, 1), Times(30.0))
    lit.discriminator[0].weight.fill_(10.0)
    lit.discriminator[0].bias.fill_(150.0)
    with torch.enable_grad():
        assert warned(lit) == ["discriminator_accuracy", "logit_gap", "adversarial_weight"]


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@torch.no_grad()
def test_dead_channel_warns_once():
    """The posterior of the second channel is N(0, 1) for every image."""
    lit = stage()
    for channel in (1, 3):
        lit.autoencoder.encoder.weight[channel] = 0
        lit.autoencoder.encoder.bias[channel] = 0
    with torch.enable_grad():
        assert warned(lit) == ["dead_channels"]


@torch.no_grad()
def test_collapsed_codebook_warns_once():
    """All codes but one are far from every latent."""
    lit = stage("vq")
    lit.autoencoder.codebook.weight[1:] += 100
    with torch.enable_grad():
        assert warned(lit, num_codes=200) == ["dead_codes"]


class Blur:
    """A first stage of averages over 4 x 4 pixels, or with `grid`, of a checkerboard added to the images."""

    shift = torch.zeros(1)

    def __init__(self, grid: float | None = None):
        self.grid = grid

    def encode(self, image):
        return avg_pool2d(image, 4) if self.grid is None else image

    def decode(self, z):
        if self.grid is None:
            return interpolate(z, scale_factor=4, mode="bicubic")
        return z + self.grid * (-1) ** (torch.arange(16)[:, None] + torch.arange(16)).float()


def open_run(folder: Path, window: int, resume: int = 0) -> TrainingRun:
    log = MetricsLog(folder / "metrics.jsonl", resume)
    run = TrainingRun(folder, {}, None, True, log, NoLogger(), 0.0)
    run.watch_health(HealthLimits().conditions(0.1), window)
    return run


class Fine(Images):
    image = 0.3 * torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("autoencoder", "expected"), [(Blur(), "blur"), (Blur(0.9), "noise"), (Blur(0.02), None), (Blur(0.0), None)]
)
def test_reconstructions_warn_once(autoencoder, expected, tmp_path, capsys):
    run = open_run(tmp_path, 100)
    draw = make_grid_writer(run, autoencoder, Fine())
    for step in (500, 1000, 1500):
        draw(step)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(" is ")[0] for line in lines] == ["warning: val/high_frequency_ratio"] * (expected is not None)
    rows = read_metrics_log(tmp_path / "metrics.jsonl")
    names = [(row["step"], name) for row in rows for name in row if name.startswith("health/")]
    assert names == ([(1000, f"health/{expected}")] if expected else [])
    assert all(row["val/high_frequency_ratio"] >= 0 for row in rows)


def test_resumed_run_repeats_no_warning(tmp_path, capsys):
    """What was recorded up to the checkpoint counts: as part of the window, and as a warning already given."""
    wins, dead = {"train/discriminator_accuracy": 1.0}, {"train/dead_channels": 2.0}
    run = open_run(tmp_path, 20)
    for step in (10, 20, 30):
        run.log_metrics(step, wins)
    run.log_metrics(40, wins | dead)
    run.log_metrics(50, wins | dead)
    assert capsys.readouterr().out.count("warning: train/discriminator_accuracy is 1 at step 30") == 1
    resumed = open_run(tmp_path, 20, resume=40)
    for step in (50, 60):
        resumed.log_metrics(step, wins | dead)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "warning: train/dead_channels is 2 at step 60, above the limit 0.5 since step 50: these channels of the latent "
        "carry nothing; lower loss.kl_weight or autoencoder.z_channels",
    ]


def test_window_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"training\.health\.window=0: expected 1 step or more"):
        HealthLimits(window=0)


def test_limits_change_no_folder():
    """Neither that of a first stage nor that of a diffusion model with it."""
    limit = "health.blur=0.2"
    first = [composed("training=autoencoder", *more) for more in ((), (f"training.{limit}",))]
    second = [composed(*more) for more in ((), (f"first_stage.{limit}",))]
    assert [float(cfg.training.health.blur) for cfg in first] == [0.05, 0.2]
    assert len({cache.first_stage_cache_key(cfg) for cfg in first}) == 1
    assert len({cache.first_stage_entry(cfg).folder for cfg in second}) == 1
    assert len({identity.run_id(to_container(cfg)) for cfg in second}) == 1


@pytest.mark.slow
def test_training_command_writes_warning(tmp_path, capfd):
    """The limit that every training exceeds; the cached folder is that of any other limit."""
    typed = ("train.py", "budget=smoke", "training=autoencoder", "~training.score", "metrics=none")
    with here(tmp_path):
        limits = ("training.health.window=1", "training.health.dead_channels=-1", "training.health.blur=-1")
        assert command(*typed, *limits) == 0
        (folder,) = (tmp_path / "cache" / "first_stage").iterdir()
        assert "\nwarning: train/dead_channels is" in capfd.readouterr().out
        assert (folder / "log.txt").read_text().count("warning: train/dead_channels is") == 1
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "health/dead_channels" in row] == [2]
        assert [row["step"] for row in rows if "val/high_frequency_ratio" in row] == [2]
        assert command(*typed) == 0
        assert len(list((tmp_path / "cache" / "first_stage").glob("[0-9a-f]*"))) == 1
        assert command(*typed, "training.health.window=0") == 2
        assert "training.health.window=0: expected 1 step or more" in capfd.readouterr().err

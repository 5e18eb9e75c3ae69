"""The health of a first stage's training: which of its recorded numbers are beyond a limit, and what helps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ldm.autoencoder.discriminator import MAX_ADAPTIVE_WEIGHT
from ldm.errors import ConfigError


@dataclass(frozen=True)
class HealthCondition:
    """A fault that shows in one number of the records.

    name: of the condition.  metric: what the number is, in words.  value: record -> the number, None without it.
    limit: the first number that is a fault, from below if `above`, else from above.  remedy: the fault, and what to do.
    """

    name: str
    metric: str
    value: Callable[[Mapping[str, Any]], float | None]
    limit: float
    above: bool
    remedy: str

    def is_beyond(self, value: float) -> bool:
        """Return whether a value is at the limit or beyond it; a NaN is not."""
        return value >= self.limit if self.above else value <= self.limit


@dataclass(frozen=True)
class HealthWarning:
    """A condition that was beyond its limit since one step, at another; value: the median between them."""

    condition: HealthCondition
    since: int
    step: int
    value: float

    def __str__(self) -> str:
        condition = self.condition
        side = "above" if condition.above else "below"
        return (
            f"{condition.metric} is {self.value:.4g} at step {self.step}, {side} the limit {condition.limit:g} "
            f"since step {self.since}: {condition.remedy}"
        )


@dataclass(frozen=True)
class HealthLimits:
    """The limits beyond which a training of a first stage is warned about.

    window: steps over whose records the median is taken, 1 or more.
    discriminator_accuracy: part of the patches it has right, real and fake, in [0, 1].  logit_gap: mean logit of real
    images minus that of fake ones.  adversarial_weight: as a part of its largest value.  dead_channels: their number.
    dead_codes: part of the codebook that a batch does not use.  blur, noise: least and largest power of the
    reconstructions at high frequencies, divided by that of the images.
    Raises ConfigError for a window below 1.
    """

    window: int = 100
    discriminator_accuracy: float = 0.98
    logit_gap: float = 20.0
    adversarial_weight: float = 0.5
    dead_channels: float = 0.5
    dead_codes: float = 0.99
    blur: float = 0.05
    noise: float = 4.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"training.health.window={self.window}: expected 1 step or more")

    def conditions(self, discriminator_weight: float, num_codes: int | None = None) -> list[HealthCondition]:
        """Return the conditions of a training.

        discriminator_weight: the factor of its adaptive weight.  num_codes: size of the codebook, None without one.
        """
        calm = "lower discriminator_weight or discriminator_optimizer.lr"
        largest = MAX_ADAPTIVE_WEIGHT * (discriminator_weight or 1.0)
        sharpness = number("val/high_frequency_ratio")
        conditions = [
            HealthCondition(
                "discriminator_accuracy",
                "train/discriminator_accuracy",
                number("train/discriminator_accuracy"),
                self.discriminator_accuracy,
                True,
                f"the discriminator wins and teaches little; {calm}, narrow it (discriminator.width), or start it "
                "later (discriminator_start)",
            ),
            HealthCondition(
                "logit_gap",
                "train/logits_real - train/logits_fake",
                lambda row: difference(row, "train/logits_real", "train/logits_fake"),
                self.logit_gap,
                True,
                "the discriminator's logits diverge; lower discriminator_optimizer.lr, or narrow it "
                "(discriminator.width)",
            ),
            HealthCondition(
                "adversarial_weight",
                f"train/adversarial_weight / {largest:g}",
                number("train/adversarial_weight", largest),
                self.adversarial_weight,
                True,
                "it is near its clamp, because the adversarial gradient has vanished at the decoder's last layer; "
                f"{calm}, or start it later (discriminator_start)",
            ),
            HealthCondition(
                "dead_channels",
                "train/dead_channels",
                number("train/dead_channels"),
                self.dead_channels,
                True,
                "these channels of the latent carry nothing; lower loss.kl_weight or autoencoder.z_channels",
            ),
            HealthCondition(
                "blur",
                "val/high_frequency_ratio",
                sharpness,
                self.blur,
                False,
                "the reconstructions are blurred; train longer, lower loss.kl_weight, raise loss.perceptual_weight or "
                "discriminator_weight, or choose an autoencoder= of a smaller downsample factor",
            ),
            HealthCondition(
                "noise",
                "val/high_frequency_ratio",
                sharpness,
                self.noise,
                True,
                f"the reconstructions have noise or a grid that the images do not have; {calm}",
            ),
        ]
        if num_codes is not None:
            collapse = (
                "the codebook collapses; lower autoencoder.num_codes or optimizer.lr, or raise loss.codebook_weight"
            )
            share, read = f"train/dead_codes / {num_codes}", number("train/dead_codes", num_codes)
            conditions.append(HealthCondition("dead_codes", share, read, self.dead_codes, True, collapse))
        return conditions


class HealthMonitor:
    """Warn once about each condition whose numbers are beyond its limit.

    records: what was recorded before, each with its "step"; a warning about them is not repeated.
    """

    def __init__(self, conditions: Sequence[HealthCondition], window: int, records: Iterable[Mapping[str, Any]] = ()):
        self.conditions, self.window = list(conditions), window
        self.series: dict[str, list[tuple[int, float]]] = {condition.name: [] for condition in conditions}
        for record in records:
            self.observe(record["step"], record)

    def observe(self, step: int, values: Mapping[str, Any]) -> list[HealthWarning]:
        """Add the numbers of the state after `step` steps; return the new warnings."""
        warnings = []
        for condition in list(self.conditions):
            value = condition.value(values)
            if value is None or not math.isfinite(value):
                continue
            series = self.series[condition.name]
            series.append((step, value))
            if (warning := check(condition, series, self.window)) is not None:
                warnings.append(warning)
                self.conditions.remove(condition)
        return warnings


def check(condition: HealthCondition, series: Sequence[tuple[int, float]], window: int) -> HealthWarning | None:
    """Return a warning if the median of the last `window` steps is beyond the condition's limit, else None.

    series: (step, value) in the order of the steps.  If the window has one record only, the last two count.  There is
    no warning before the series is as long as the window.
    """
    step = series[-1][0]
    if series[0][0] > step - window:
        return None
    inside = [(past, value) for past, value in series[-window:] if past > step - window]
    recent = inside if len(inside) > 1 else series[-2:]
    middle = median(value for _, value in recent)
    if not condition.is_beyond(middle):
        return None
    return HealthWarning(condition, min(past for past, value in recent if condition.is_beyond(value)), step, middle)


def number(name: str, unit: float = 1.0) -> Callable[[Mapping[str, Any]], float | None]:
    """Return a function that reads a number of a record, divided by unit; None where it is absent."""
    return lambda row: None if row.get(name) is None else row[name] / unit


def difference(row: Mapping[str, Any], first: str, second: str) -> float | None:
    """Return the difference of two numbers of a record; None where one of them is absent."""
    values = [row.get(name) for name in (first, second)]
    return None if None in values else values[0] - values[1]  # type: ignore[operator]

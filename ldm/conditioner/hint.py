"""Hints, the images that a ControlNet reads (Zhang et al. 2023): extract them and add them to a condition."""

from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioner.compose import condition_or_null, drop_condition
from ldm.conditioner.rows import num_rows
from ldm.errors import ConfigError


class HintConditioner(nn.Module):
    """The condition of another conditioner plus one hint (B, 3, H, W) in [0, 1].

    The hint is batch[name], else it is extracted from batch[extractor.reads].
    conditioner: gives all other fields of the condition.
    extractor: value -> hint; `reads` is the batch key of the value.
    text_drop_prob: probability with which, in training, a sample gets the hint alone (Zhang et al. 2023, section 3.4).
    name: "hint" for the first, then "hint2", "hint3", ...  The null hint, also of a batch without a hint, is black.
    Raises ValueError for a hint of another shape.
    """

    needs = ()  # no key is required: without a hint it gives the null hint
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, conditioner: Any, extractor: Callable[[Any], Tensor], text_drop_prob: float = 0.5):
        super().__init__()
        if not 0 <= text_drop_prob <= 1:
            raise ConfigError(f"text_drop_prob={text_drop_prob}: expected a probability, 0 to 1")
        # `told` is a state dict prefix
        self.told, self.make, self.text_drop_prob = conditioner, extractor, text_drop_prob
        number = getattr(conditioner, "number", 0) + 1
        self.number, self.name = number, "hint" if number == 1 else f"hint{number}"
        self.keys = (*conditioner.keys, self.name)
        self.reads = (*getattr(conditioner, "reads", ()), extractor.reads)  # type: ignore[attr-defined]
        self.context_dim, self.vector_dim, self.concat_channels = (
            conditioner.context_dim,
            conditioner.vector_dim,
            conditioner.concat_channels,
        )
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    @property
    def conditioners(self) -> Any:
        """The other conditioners, by name."""
        return getattr(self.told, "conditioners", {"told": self.told})

    def forward(self, batch: dict[str, Any]) -> Condition:
        cond = condition_or_null(self.told, batch)
        if self.training and self.text_drop_prob:
            null = self.told.null(batch)
            cond = drop_condition(cond, null, batch["noise"], f"untold/{self.name}", self.text_drop_prob)
        return replace(cond, hint=(*cond.hint, self.hint(batch)))

    def null(self, batch: dict[str, Any]) -> Condition:
        cond = self.told.null(batch)
        return replace(cond, hint=(*cond.hint, self.null_hint(batch)))

    def hint(self, batch: dict[str, Any]) -> Tensor:
        """Return the hint (B, 3, H, W) of a batch: its own, else the extracted one, else the null hint."""
        reads = self.make.reads  # type: ignore[attr-defined]
        if self.name not in batch and reads not in batch:
            return self.null_hint(batch)
        hint = batch[self.name] if self.name in batch else self.make(batch[reads])
        if hint.ndim != 4 or hint.shape[1] != 3:
            raise ValueError(f"{self.name} of {tuple(hint.shape)}: expected (B, 3, H, W)")
        return hint.to(self.device_anchor)

    def null_hint(self, batch: dict[str, Any]) -> Tensor:
        """Return the black hint (B, 3, 1, 1)."""
        return self.device_anchor.new_zeros(num_rows(batch), 3, 1, 1)


@dataclass(frozen=True)
class Segmentation:
    """Hint extractor: class maps (B, H, W) -> one colour per class, (B, 3, H, W) in [0, 1].

    Raises ConfigError for a class out of range.
    """

    classes: int = 9
    reads = "map"

    def __call__(self, map: Tensor) -> Tensor:
        if map.numel() and not 0 <= int(map.min()) <= int(map.max()) < self.classes:
            raise ConfigError(
                f"map with classes {int(map.min())} to {int(map.max())}: expected 0 to {self.classes - 1}"
            )
        return palette(self.classes).to(map.device)[map.long()].movedim(-1, 1)


@dataclass(frozen=True)
class Relief:
    """Hint extractor: relief or depth maps (B, 1, H, W) in [-1, 1] -> grey images (B, 3, H, W) in [0, 1]."""

    reads = "relief"

    def __call__(self, relief: Tensor) -> Tensor:
        return (relief / 2 + 0.5).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Keypoints:
    """Hint extractor: B lists of points -> coloured dots on black, (B, 3, H, W) in [0, 1].

    A point is (x, y) in [0, 1], or None if it is not visible.
    Point k of every list has the k-th colour.  size: height and width in pixels.  radius: of the dots, in pixels.
    Raises ConfigError for anything but lists of such points.
    """

    size: Sequence[int] = (64, 64)
    radius: float = 2.0
    reads = "points"

    def __call__(self, points: Sequence[Sequence[Sequence[float] | None]]) -> Tensor:
        return torch.stack([self.render(one) for one in points])

    def render(self, points: Sequence[Sequence[float] | None]) -> Tensor:
        """Draw one list of points, (3, H, W)."""
        height, width = self.size
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        image = torch.zeros(3, height, width)
        for point, colour in zip(points, palette(len(points) + 1)[1:], strict=True):
            if point is None:
                continue
            if len(point) != 2 or not all(0 <= one <= 1 for one in point):
                raise ConfigError(f"point {point}: expected [x, y] in [0, 1], or null")
            inside = torch.hypot(x - point[0] * width, y - point[1] * height) <= self.radius
            image = torch.where(inside, colour[:, None, None], image)
        return image


def palette(number: int) -> Tensor:
    """Return `number` well separated colours (number, 3) in [0, 1]; the first is black."""
    # hues in turns of the circle, a golden section apart
    ring = [hsv_to_rgb(i * 0.618034, (0.9, 0.5)[i % 2], (1.0, 1.0, 0.6)[i % 3]) for i in range(number - 1)]
    return torch.tensor([(0.0, 0.0, 0.0), *ring])

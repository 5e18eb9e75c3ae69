"""Small tensor operations, and the only source of randomness: noise keyed by sample and purpose, not by process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import ConfigError

T = TypeVar("T")

# by the number of sides of a sample: means and maxima over cells
POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Reshape t (B,) or () so that it broadcasts against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def one_for_each(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """Return `count` numbers, one for each side of a sample: the value itself, or one number repeated.

    name: of the value in the config.  Raises ConfigError for a list of another length.
    """
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise ConfigError(f"{name}={list(values)}: expected one number, or {count}, one for each side of a sample")
    return values


def divides(factor: int | Sequence[int], sides: Sequence[int]) -> bool:
    """Return whether every side is a multiple of the factor, or of its own one of a list of factors."""
    return not any(side % one for side, one in zip(sides, one_for_each(factor, len(sides), "factor"), strict=True))


def divide_sides(sides: Sequence[int], factor: int | Sequence[int]) -> tuple[int, ...]:
    """Return the sides divided by the factor, rounded down, or each by its own one of a list of factors."""
    return tuple(side // one for side, one in zip(sides, one_for_each(factor, len(sides), "factor"), strict=True))


def format_factor(factor: int | Sequence[int]) -> str:
    """Write a factor as text: 4, or 1x4x4 for a list of one for each side."""
    return str(factor) if isinstance(factor, int) else "x".join(map(str, factor))


def frames(x: Tensor) -> Tensor:
    """Return the frames (B F, C, H, W) of clips (B, C, F, H, W) as images; samples with one or two sides unchanged."""
    folded = max(x.ndim - 4, 0)
    return x.movedim(1, 1 + folded).flatten(0, folded)


def interpolation_weights(offset: Tensor, size: int, inside: int) -> Tensor:
    """Return the weights (..., size, inside) of linear interpolation that move `inside` pixels by offset (...)."""
    positions = torch.arange(size, device=offset.device)[:, None] - torch.arange(inside, device=offset.device)
    return (1 - (positions - offset[..., None, None]).abs()).clamp(min=0)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, but float32 for bfloat16 and float16."""
    return torch.promote_types(dtype, torch.float32)


def mean_per_sample(x: Tensor) -> Tensor:
    """Average x (B, ...) over all axes but the first: (B,)."""
    return x.flatten(1).mean(1)


def derive_seed(*parts: int | str | tuple[int, int]) -> int:
    """Compute a 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def choose(options: Sequence[T], *parts: int | str | tuple[int, int]) -> T:
    """Choose one of the options with equal probabilities, as a function of the parts only."""
    return options[derive_seed(*parts) % len(options)]


def hash_state_dict(state: Mapping[str, Tensor]) -> str:
    """Compute the sha256 (hex) of every name and the bytes of its tensor, in the order of the names.

    dtypes and shapes do not enter.
    """
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class KeyedNoise:
    """Random draws for a batch of rows, row i keyed by (seed, purpose, index[i]).

    seed: of the run.  index: identifies a row: an image's seed, or (epoch, sample index).
    position, global_batch_size: each row's position in the global batch and that batch's size, for draws stratified
    over the batch.
    The same row gets the same numbers at any batch size, worker count or rank.  Numbers are drawn on the CPU in float32
    and then moved.
    """

    seed: int
    index: Sequence[int | tuple[int, int]]
    position: Sequence[int] | None = None
    global_batch_size: int | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def normal(self, purpose: str, x: Tensor) -> Tensor:
        """Draw standard normal numbers with the shape, dtype and device of x (B, ...)."""
        return self._draw(torch.randn, purpose, x)

    def uniform(self, purpose: str, x: Tensor) -> Tensor:
        """Draw uniform numbers in [0, 1) with the shape, dtype and device of x (B, ...)."""
        # the largest number of x's dtype below 1: without the clamp, bfloat16 and float16 would round up to 1
        below = 1 - torch.finfo(x.dtype).eps / 2

        def draw(*shape: object, **options: object) -> Tensor:
            return torch.rand(*shape, **options).clamp_(max=below)  # type: ignore[call-overload]

        return self._draw(draw, purpose, x)

    def sampler_noise(self, purpose: str) -> Callable[[Tensor], Tensor]:
        """Return a sampler's `noise`: a function that draws a new standard normal shaped like its argument."""
        step = 0

        def draw(x: Tensor) -> Tensor:
            nonlocal step
            step += 1
            return self.normal(f"{purpose}/{step}", x)

        return draw

    def _draw(self, draw: Callable[..., Tensor], purpose: str, x: Tensor) -> Tensor:
        if len(self.index) != len(x):
            raise ValueError(f"noise is keyed for {len(self.index)} rows, the tensor has {len(x)}")
        # not of the default type, which Lightning changes within a step in float64: other numbers would be drawn
        out = torch.empty(x.shape, dtype=torch.float32)
        generator = torch.Generator()
        for row, index in zip(out, self.index, strict=True):
            generator.manual_seed(derive_seed(self.seed, purpose, index))
            draw(row.shape, generator=generator, out=row)
        return out.to(x)

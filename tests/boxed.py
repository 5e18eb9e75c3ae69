"""The synthetic data with where things are: a map of classes and a box around each shape."""

from collections.abc import Sequence

from torch import Tensor

from ldm.data.memory import flip_where
from ldm.data.synthetic import Synthetic


class Boxed(Synthetic):
    """Synthetic with map (B, H, W) int64, 1 on the shape, relief (B, 1, H, W), the image, and boxes.

    An image has one box (class, left, top, right, bottom).
    """

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        batch = super().batch_metadata(samples)
        batch["map"] = flip_where((self.pixels(batch["index"])[:, 0] > 0).long(), batch["flip"])
        batch["relief"] = flip_where(self.pixels(batch["index"]), batch["flip"])
        batch["boxes"] = [
            [(int(label), *bounding_box(where))] for label, where in zip(batch["label"], batch["map"], strict=True)
        ]
        return batch


def bounding_box(where: Tensor) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the pixels that are not zero, (H, W), as fractions of the sides."""
    rows, columns = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
    edges = columns.min() / where.shape[1], rows.min() / where.shape[0]
    return tuple(float(x) for x in (*edges, (columns.max() + 1) / where.shape[1], (rows.max() + 1) / where.shape[0]))

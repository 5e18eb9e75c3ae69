"""Placeholders for the inputs of a conditioner, so that a model runs without data, text or pretrained weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ldm.conditioner.features import replace_caches, text_caches

if TYPE_CHECKING:
    import torch

    from ldm.plan.data_info import DataInfo


def stub_text_encoders(conditioner: "torch.nn.Module") -> list["torch.nn.Module"]:
    """Replace the cached text encoders in a conditioner by stubs, in place; return the encoders."""
    encoders: list[Any] = [features.encoder for features in text_caches(conditioner)]
    replace_caches(conditioner, cast(Any, StubTextEncoder))
    return encoders


class StubTextEncoder:
    """Stub of a frozen text encoder's feature cache: features of the maximum length, without values."""

    def __init__(self, features: Any):
        self.encoder, self.length = None, features.length
        self.context_dim, self.vector_dim = features.encoder.context_dim, features.encoder.vector_dim

    def condition(self, captions: Sequence[str], device: Any) -> Any:
        import torch

        from ldm.condition import Condition

        n = len(captions)
        mask = torch.empty(n, self.length, dtype=torch.bool)
        return Condition(
            context=torch.empty(n, self.length, self.context_dim), mask=mask, vector=torch.empty(n, self.vector_dim)
        )


def use_random_weights(node: Any) -> None:
    """Set `random` in a conditioner's config nodes, in place: planning needs no pretrained weights."""
    for name, child in list(node.items()):
        if name == "random":
            node.random, node.weights = True, None
        elif hasattr(child, "items"):
            use_random_weights(child)


def placeholder_batch(rows: int, card: "DataInfo", conditioner: "torch.nn.Module") -> dict[str, Any]:
    """Return a batch without content that has every key a conditioner may read.

    rows: batch size.  card: metadata of the data set.
    """
    import torch

    from ldm.conditioner.size import uncropped

    channels, *size = card.shape
    batch: dict[str, Any] = {
        "image": torch.empty(rows, channels, *size),
        "mask": torch.empty(rows, 1, *size),
        "caption": [""] * rows,
        "label": torch.zeros(rows, dtype=torch.long, device="cpu"),
        "boxes": [[]] * rows,
        "source": torch.empty(rows, channels, *size),
        **(uncropped(rows, *size) if len(size) == 2 else {}),
    }
    part: Any
    for part in conditioner.modules():
        keys = getattr(part, "keys", None)
        if not isinstance(keys, tuple):  # not a conditioner: `keys` of a container is a method
            continue
        if "map" in keys:
            batch["map"] = torch.empty(rows, part.classes, *size)
        if "low_res" in keys:
            batch["low_res"] = torch.empty(rows, channels, *(side // part.scale for side in size))
        if "relief" in keys:
            batch["relief"] = torch.empty(rows, part.concat_channels - 1, *size)
    return batch

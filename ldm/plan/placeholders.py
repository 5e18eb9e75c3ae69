"""Stand-ins for what a model is told, so that it runs without data, text or published weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ldm.plan.data_info import DataInfo


def stub_text_encoders(conditioner: "torch.nn.Module") -> list["torch.nn.Module"]:
    """Let no text be read; returns the encoders that would have read them."""
    told: Any
    encoders = []
    for told in conditioner.modules():
        if hasattr(told, "cache"):
            encoders.append(told.cache.encoder)
            told.cache = StubTextEncoder(told.cache)
    return encoders


class StubTextEncoder:
    """Stands for a frozen text encoder's table of features: as long as texts can be, of no value."""

    def __init__(self, kept: Any):
        self.encoder, self.length = None, kept.length
        self.context_dim, self.vector_dim = kept.encoder.context_dim, kept.encoder.vector_dim

    def condition(self, captions: Sequence[str], device: Any) -> Any:
        import torch

        from ldm.condition import Condition

        n = len(captions)
        mask = torch.empty(n, self.length, dtype=torch.bool)
        return Condition(
            context=torch.empty(n, self.length, self.context_dim), mask=mask, vector=torch.empty(n, self.vector_dim)
        )


def use_random_weights(node: Any) -> None:
    """Let what can be drawn at random be so: a plan wants no published weights."""
    for name, child in list(node.items()):
        if name == "random":
            node.random, node.weights = True, None
        elif hasattr(child, "items"):
            use_random_weights(child)


def placeholder_batch(rows: int, card: "DataInfo", conditioner: "torch.nn.Module") -> dict[str, Any]:
    """A batch without content that holds all a conditioner may ask for."""
    import torch

    size = (card.size, card.size)
    batch: dict[str, Any] = {
        "image": torch.empty(rows, card.channels, *size),
        "mask": torch.empty(rows, 1, *size),
        "caption": [""] * rows,
        "label": torch.zeros(rows, dtype=torch.long, device="cpu"),
        "boxes": [[]] * rows,
    }
    part: Any
    for part in conditioner.modules():
        keys = getattr(part, "keys", None)
        if not isinstance(keys, tuple):  # no conditioner: a container's keys are a method
            continue
        if "map" in keys:
            batch["map"] = torch.empty(rows, part.classes, *size)
        if "low_res" in keys:
            batch["low_res"] = torch.empty(rows, card.channels, card.size // part.scale, card.size // part.scale)
        if "relief" in keys:
            batch["relief"] = torch.empty(rows, part.concat_channels - 1, *size)
    return batch

"""The hints of a request: which ControlNets draw along, and the files that tell them what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm import adapted, source
from ldm.data.decode import composite_alpha
from ldm.errors import UserError
from ldm.load import config_of
from ldm.source import Source, Wanted

READERS: Mapping[str, Callable[[Wanted, str], Source]] = {  # what a hint is made of -> what reads it
    "image": lambda wanted, path: source.image(wanted, path, "hints"),
    "map": lambda wanted, path: source.label_map(wanted, path, "hints"),
    "relief": lambda wanted, path: source.image(replace(wanted, channels=1), path, "hints"),
    "points": lambda wanted, path: source.points(path, "hints"),
}


def sources(cfg: Any, wanted: Wanted) -> dict[str, Source]:
    """hint, hint2, ... -> what reads its file, of the ControlNets of cfg.run and of cfg.adapters in this order.

    Raises UserError for another number of files than of ControlNets, and for none where nothing else says what they are to be told.
    """
    every, files = controls(cfg), given(cfg)
    if files and len(files) != len(every):
        raise UserError(f"hints={cfg.hints}: expected {len(every)} files, one for each ControlNet of run= and adapters=")
    made = {}
    for (name, make), file in zip(every.items(), files or [None] * len(every), strict=True):
        if file is not None:
            made[name] = extracted(make, wanted, file) if cfg.extract else ready(wanted, file)
        elif not cfg.held_out and make.reads not in cfg.inputs:
            kind = type(make).__name__.lower()
            raise UserError(f"hints=FILE must be given for the ControlNet of {kind}, or extract=true hints=FILE of its {make.reads}")
    return made


def makers(cfg: Any, read: Mapping[str, Source]) -> dict[str, Any]:
    """hint, hint2, ... -> what makes it of the rest of a batch, of those that no file is read for."""
    return {name: make for name, make in controls(cfg).items() if name not in read}


def controls(cfg: Any) -> dict[str, Any]:
    """hint, hint2, ... -> what makes the hint of each ControlNet that draws along."""
    from hydra.utils import instantiate

    runs = [folder for run in (cfg.run, *(one.run for one in adapted.asked(cfg))) for folder in adapted.layers(run)]
    nodes = [config.adapter.hint.make for config in map(config_of, runs) if config.adapter.get("hint")]
    return {"hint" if number == 1 else f"hint{number}": instantiate(node) for number, node in enumerate(nodes, 1)}


def given(cfg: Any) -> list[str | None]:
    """The files of hints=, which is one or a list of them."""
    from ldm.build import plain

    hint = plain(cfg)["hints"]
    return [] if hint is None else list(hint) if isinstance(hint, Sequence) and not isinstance(hint, str) else [str(hint)]


def ready(wanted: Wanted, path: str) -> Source:
    """Hints as they are, (3, H, W) in [0, 1]. Raises UserError for one of another size than the images."""

    def read(file: Path) -> Tensor:
        picture = composite_alpha(source.opened("hints", file), "black").convert("RGB")
        height, width = wanted.size
        if picture.size != (width, height):
            said = (
                f"hints={file} is {picture.size[0]}x{picture.size[1]} (width x height): expected {width}x{height}, the size of the images"
            )
            raise UserError(f"{said}; size= says another, extract=true takes a picture of any size")
        return source.pixels(picture) / 255

    return source.checked("hints", path, read)


def extracted(make: Callable[[Any], Tensor], wanted: Wanted, path: str) -> Source:
    """Hints (3, H, W) in [0, 1] made of what the file holds."""
    inner = READERS[make.reads](wanted, path)  # type: ignore[attr-defined]
    return Source(inner.files, lambda file: make(inner.join([inner.read(file)]))[0], source.stacked)

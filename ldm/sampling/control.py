"""The hints of a request: which ControlNets draw along, and the files that tell them what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import load
from ldm.checkpoint.load import load_run_config
from ldm.data.decode import composite_alpha
from ldm.errors import UserError
from ldm.sampling import adapters, inputs
from ldm.sampling.inputs import InputFiles, InputSpec

READERS: Mapping[str, Callable[[InputSpec, str], InputFiles]] = {  # what a hint is made of -> what reads it
    "image": lambda wanted, path: inputs.image_input(wanted, path, "hints"),
    "map": lambda wanted, path: inputs.label_map(wanted, path, "hints"),
    "relief": lambda wanted, path: inputs.image_input(replace(wanted, channels=1), path, "hints"),
    "points": lambda wanted, path: inputs.keypoints_input(path, "hints"),
}


def hint_sources(cfg: Any, wanted: InputSpec) -> dict[str, InputFiles]:
    """hint, hint2, ... -> what reads its file, of the ControlNets of cfg.run and of cfg.adapters in this order.

    Raises UserError for another number of files than of ControlNets, and for none where nothing else says what they are to be told.
    """
    every, files = control_hints(cfg), hint_files(cfg)
    if files and len(files) != len(every):
        raise UserError(
            f"hints={cfg.hints}: expected {len(every)} files, one for each ControlNet of run= and adapters="
        )
    made = {}
    for (name, make), file in zip(every.items(), files or [None] * len(every), strict=True):
        if file is not None:
            made[name] = extract_hint(make, wanted, file) if cfg.preprocess_hints else read_hint(wanted, file)
        elif not cfg.held_out and make.reads not in cfg.inputs:
            kind = type(make).__name__.lower()
            raise UserError(
                f"hints=FILE must be given for the ControlNet of {kind}, or preprocess_hints=true hints=FILE of its {make.reads}"
            )
    return made


def hint_makers(cfg: Any, read: Mapping[str, InputFiles]) -> dict[str, Any]:
    """hint, hint2, ... -> what makes it of the rest of a batch, of those that no file is read for."""
    return {name: make for name, make in control_hints(cfg).items() if name not in read}


def control_hints(cfg: Any) -> dict[str, Any]:
    """hint, hint2, ... -> what makes the hint of each ControlNet that draws along."""
    from hydra.utils import instantiate

    runs = [
        folder
        for run in (cfg.run, *(one.run for one in adapters.parse_adapter_specs(cfg)))
        for folder in load.adapter_chain(run)
    ]
    nodes = [config.adapter.hint.extractor for config in map(load_run_config, runs) if config.adapter.get("hint")]
    return {"hint" if number == 1 else f"hint{number}": instantiate(node) for number, node in enumerate(nodes, 1)}


def hint_files(cfg: Any) -> list[str | None]:
    """The files of hints=, which is one or a list of them."""
    from ldm.config.build import to_container

    hint = to_container(cfg)["hints"]
    return (
        [] if hint is None else list(hint) if isinstance(hint, Sequence) and not isinstance(hint, str) else [str(hint)]
    )


def read_hint(wanted: InputSpec, path: str) -> InputFiles:
    """Hints as they are, (3, H, W) in [0, 1]. Raises UserError for one of another size than the images."""

    def read(file: Path) -> Tensor:
        picture = composite_alpha(inputs.open_image("hints", file), "black").convert("RGB")
        height, width = wanted.size
        if picture.size != (width, height):
            said = f"hints={file} is {picture.size[0]}x{picture.size[1]} (width x height): expected {width}x{height}, the size of the images"
            raise UserError(f"{said}; size= says another, preprocess_hints=true takes a picture of any size")
        return inputs.to_tensor(picture) / 255

    return inputs.open_input("hints", path, read)


def extract_hint(make: Callable[[Any], Tensor], wanted: InputSpec, path: str) -> InputFiles:
    """Hints (3, H, W) in [0, 1] made of what the file holds."""
    inner = READERS[make.reads](wanted, path)  # type: ignore[attr-defined]
    return InputFiles(inner.files, lambda file: make(inner.join([inner.read(file)]))[0], inputs.stacked)

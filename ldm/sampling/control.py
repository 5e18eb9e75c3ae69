"""The hints of a sampling request: the ControlNets of its model, and the images or files that condition them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.load import ModelSource
from ldm.data.decode import composite_alpha
from ldm.errors import UserError
from ldm.sampling import inputs
from ldm.sampling.adapters import AdapterSpec
from ldm.sampling.inputs import InputFiles, InputSpec

READERS: Mapping[str, Callable[[InputSpec, str], InputFiles]] = {  # an extractor's `reads` -> the reader of its files
    "image": lambda spec, path: inputs.image_input(spec, path, "hints"),
    "map": lambda spec, path: inputs.label_map(spec, path, "hints"),
    "relief": lambda spec, path: inputs.image_input(replace(spec, channels=1), path, "hints"),
    "points": lambda spec, path: inputs.keypoints_input(path, "hints"),
}


def hint_extractors(model: ModelSource, adapters: Sequence[AdapterSpec]) -> dict[str, Any]:
    """Return the hint extractor of each ControlNet, as hint, hint2, ...: those of the model first, then those of
    adapters=.
    """
    from hydra.utils import instantiate

    runs = [*model.adapters, *(run for spec in adapters if spec.source is not None for run in spec.source.adapters)]
    nodes = [run.config.adapter.hint.extractor for run in runs if run.config.adapter.get("hint")]
    return {"hint" if number == 1 else f"hint{number}": instantiate(node) for number, node in enumerate(nodes, 1)}


def hint_files(hints: Any) -> list[str | None]:
    """Return the files of hints=, a path or a list of paths, None for a hint that is not read from a file."""
    if hints is None:
        return []
    return list(hints) if isinstance(hints, Sequence) and not isinstance(hints, str) else [str(hints)]


def hint_sources(
    extractors: Mapping[str, Any],
    hints: Any,
    spec: InputSpec,
    *,
    preprocess: bool,
    available: Collection[str] | None,
) -> dict[str, InputFiles]:
    """Return the reader of each hint, as hint, hint2, ..., that is given by a file.

    hints: the value of hints=, one file for each ControlNet in the order of `extractors`.
    preprocess: whether the files are what hints are extracted from, instead of hints.
    available: the inputs of a batch that a hint without a file may be extracted from; None if any may.
    Raises UserError for another number of files than of ControlNets, and for a hint that has no file and nothing to be
    extracted from.
    """
    files = hint_files(hints)
    if files and len(files) != len(extractors):
        raise UserError(
            f"hints={hints}: expected {len(extractors)} files, one for each ControlNet of run= and adapters="
        )
    sources = {}
    for (name, extractor), file in zip(extractors.items(), files or [None] * len(extractors), strict=True):
        if file is not None:
            sources[name] = extract_hint(extractor, spec, file) if preprocess else read_hint(spec, file)
        elif available is not None and extractor.reads not in available:
            kind = type(extractor).__name__.lower()
            raise UserError(
                f"hints=FILE must be given for the ControlNet of {kind}, "
                f"or preprocess_hints=true hints=FILE of its {extractor.reads}"
            )
    return sources


def read_hint(spec: InputSpec, path: str) -> InputFiles:
    """Return a reader of hints (3, H, W) in [0, 1]. Raises UserError for a hint of another size than the images."""

    def read(file: Path) -> Tensor:
        image = composite_alpha(inputs.open_image("hints", file), "black").convert("RGB")
        height, width = spec.size
        if image.size != (width, height):
            raise UserError(
                f"hints={file} is {image.size[0]}x{image.size[1]} (width x height): expected {width}x{height}, "
                "the size of the images; size= sets another, preprocess_hints=true takes a picture of any size"
            )
        return inputs.to_tensor(image) / 255

    return inputs.open_input("hints", path, read)


def extract_hint(extractor: Callable[[Any], Tensor], spec: InputSpec, path: str) -> InputFiles:
    """Return a reader of hints (3, H, W) in [0, 1], extracted from the contents of the files."""
    source = READERS[extractor.reads](spec, path)  # type: ignore[attr-defined]
    return InputFiles(source.files, lambda file: extractor(source.join([source.read(file)]))[0], inputs.stacked)

"""Our own single file: a whole model in one safetensors file, the composed config in its header."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.errors import UserError
from ldm.interop.keymap import reject_unknown, strip_prefix
from ldm.interop.pipeline import Pipeline
from ldm.io import atomic
from ldm.io.parse import parse_json

KEY = "ldm"  # in the header
PARTS = ("net", "autoencoder", "text", "conditioner")


def save(pipeline: Pipeline, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a pipeline; metadata: more words for the header."""
    state: dict[str, Tensor] = {}
    for part in PARTS:
        state |= {f"{part}.{name}": value for name, value in getattr(pipeline, part).items()}
    header = json.dumps({"config": pipeline.config, "data": pipeline.data})
    atomic.write_tensors(path, state, {**(metadata or {}), KEY: header, "format": "pt"})


def load(state: Mapping[str, Tensor], header: str, path: Path) -> Pipeline:
    """The pipeline of a file's tensors and its header. Raises CorruptFileError for a header that is not ours, UserError for unknown names."""
    try:
        said = parse_json(header)
        config, data = dict(said["config"]), dict(said["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise atomic.CorruptFileError(f"{path}: its header is damaged ({error}); export it again") from None
    reject_unknown([name for name in state if not name.startswith(tuple(f"{part}." for part in PARTS))], str(path))
    parts = {part: strip_prefix(f"{part}.", state) for part in PARTS}
    if not parts["net"] or not parts["autoencoder"]:
        raise UserError(f"{path} holds no net or no autoencoder; expected a whole model")
    return Pipeline(config, data=data, **parts)

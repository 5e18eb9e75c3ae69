"""This project's single-file format: a complete model in one safetensors file, the config in its header."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.errors import UserError
from ldm.interop.keymap import reject_unknown, strip_prefix
from ldm.interop.pipeline import Pipeline
from ldm.io import atomic
from ldm.io.parse import parse_json

KEY = "ldm"  # of the header's metadata
PARTS = ("net", "autoencoder", "text", "conditioner")


def save(pipeline: Pipeline, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a pipeline; metadata: additional entries of the header."""
    state: dict[str, Tensor] = {}
    for part in PARTS:
        state |= {f"{part}.{name}": value for name, value in getattr(pipeline, part).items()}
    header = json.dumps({"config": pipeline.config, "data": pipeline.data})
    atomic.write_tensors(path, state, {**(metadata or {}), KEY: header, "format": "pt"})


def load(state: Mapping[str, Tensor], header: str, path: Path) -> Pipeline:
    """Build the pipeline from a file's tensors and header.

    Raises CorruptFileError for a header of another format, UserError for unknown names.
    """
    try:
        content = parse_json(header)
        config, data = dict(content["config"]), dict(content["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise atomic.CorruptFileError(f"{path}: its header is damaged ({error}); export it again") from None
    reject_unknown([name for name in state if not name.startswith(tuple(f"{part}." for part in PARTS))], str(path))
    parts = {part: strip_prefix(f"{part}.", state) for part in PARTS}
    if not parts["net"] or not parts["autoencoder"]:
        raise UserError(f"{path} has no net or no autoencoder; expected a complete model")
    return Pipeline(config, data=data, **parts)

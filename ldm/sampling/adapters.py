"""Adapters of a sampling request: parsed from `adapters=` and applied to a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.adapters import apply_lora_file
from ldm.checkpoint.latent_space import require_same_latent_space
from ldm.checkpoint.load import AdapterSource, ModelSource, open_adapter
from ldm.errors import UserError
from ldm.runs.folder import is_external

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


@dataclass(frozen=True)
class AdapterSpec:
    """One entry of sample.py's adapters=: an adapter run or a LoRA file of diffusers, and the factor on its effect.

    source: the adapter run; None for a LoRA file.
    """

    run: str
    scale: float
    source: AdapterSource | None = None


def parse_adapter_specs(entries: Sequence[Any], run: str, model: ModelSource) -> list[AdapterSpec]:
    """Check the entries of adapters= before a model is loaded, and open their runs.

    run, model: the model that they will be applied to, as named by the user, and its source.
    Raises UserError for an entry of another form, and for an adapter of another latent space than the model's.
    """
    specs = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("run"), str) or entry.keys() - {"run", "scale"}:
            raise UserError(
                f"adapters: {entry}: expected {{run: RUN, scale: 1.0}}, of an adapter run or a LoRA file of diffusers"
            )
        path, scale = entry["run"], entry.get("scale", 1.0)
        if not isinstance(scale, int | float) or isinstance(scale, bool):
            raise UserError(f"adapters: scale={scale} of {path}: expected a number")
        if is_external(path):
            specs.append(AdapterSpec(path, float(scale)))
            continue
        source = open_adapter(path)
        require_same_latent_space(
            (f"adapters: {path}", source.latent_space),
            (f"run={run}", model.latent_space),
            "choose one of its latents",
        )
        specs.append(AdapterSpec(path, float(scale), source))
    return specs


def apply_adapters(model: "LatentDiffusion", specs: Sequence[AdapterSpec], weights: str) -> "LatentDiffusion":
    """Apply the adapters of a request to `model` in place and return it; weights: ema, raw or ema:0.15.

    Raises UserError.
    """
    for spec in specs:
        if spec.source is None:
            apply_lora_file(model, Path(spec.run).expanduser(), spec.scale)
        else:
            spec.source.apply_to(model, spec.scale, weights)
    return model.eval().to(model.device)

"""Adapters of a sampling request: parsed from `adapters=` and applied to a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.latent_space import require_same_latent_space
from ldm.checkpoint.load import adapter_folder, apply_adapter, latent_space_of
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


@dataclass(frozen=True)
class AdapterSpec:
    """One of sample.py's adapters=: an adapter run or a LoRA file of diffusers, and how strong it is to be."""

    run: str
    scale: float


def parse_adapter_specs(cfg: Any) -> list[AdapterSpec]:
    """The adapters of a request, each of the latent space of cfg.run. Raises UserError, before a model is loaded."""
    from ldm.config.build import to_container
    from ldm.runs.folder import is_external

    found = []
    for one in to_container(cfg)["adapters"]:
        if not isinstance(one, dict) or not isinstance(one.get("run"), str) or one.keys() - {"run", "scale"}:
            raise UserError(
                f"adapters: {one}: expected {{run: RUN, scale: 1.0}}, of an adapter run or a LoRA file of diffusers"
            )
        if not isinstance(scale := one.get("scale", 1.0), int | float) or isinstance(scale, bool):
            raise UserError(f"adapters: scale={scale} of {one['run']}: expected a number")
        found.append(AdapterSpec(one["run"], float(scale)))
        if not is_external(one["run"]):
            adapter_folder(one["run"])
            adapter, model = (
                (f"adapters: {one['run']}", latent_space_of(one["run"])),
                (f"run={cfg.run}", latent_space_of(cfg.run)),
            )
            require_same_latent_space(adapter, model, "choose one of its latents")
    return found


def apply_adapters(model: "LatentDiffusion", cfg: Any) -> "LatentDiffusion":
    """The model with the adapters of a request put on. Raises UserError."""
    for one in parse_adapter_specs(cfg):
        apply_adapter(model, one.run, one.scale, cfg.weights)
    return model.eval().to(model.device)

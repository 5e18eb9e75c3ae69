"""A trained model from a run folder, with nothing else needed than the folder (and the text encoder's published weights)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ldm.checkpoint.adapters import (
    BaseModelRef,
    adapter_parameters,
    apply_lora_file,
    copy_parameters,
    local_parameter_name,
)
from ldm.checkpoint.latent_space import LatentSpace
from ldm.checkpoint.weights import load_weights
from ldm.config import serialize, trust
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_json
from ldm.runs.data_card import DataCard
from ldm.runs.folder import find_run

if TYPE_CHECKING:
    from ldm.autoencoder.first_stage import FirstStage
    from ldm.model import LatentDiffusion


def load_data_card(folder: Path) -> "DataCard":
    """The card of a run folder, or of what is foreign. Raises CorruptFileError naming the file."""
    from ldm.checkpoint import external
    from ldm.runs.folder import is_external

    if is_external(folder):
        return external.pipeline_info(folder).card
    path = folder / "data.json"
    try:
        return DataCard.from_dict(parse_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise atomic.CorruptFileError(
            f"{path} is damaged ({error}); the same train.py command writes it again"
        ) from None


def load_run_config(folder: Path) -> Any:
    """A run's config, with no target but what a config that came with a file may name. Raises UserError."""
    from ldm.checkpoint import external
    from ldm.config import trust
    from ldm.runs.folder import is_external

    if is_external(folder):
        return trust.sanitize_config(external.pipeline_info(folder).config, folder)
    return trust.sanitize_config(serialize.load_config(folder / "config.yaml"), folder / "config.yaml")


def load_first_stage(node: Any, path: Path, channels: int) -> "tuple[FirstStage, LatentSpace]":
    """The autoencoder of a config's node with the weights of a file, frozen, and the latent space that is its.

    Raises CorruptFileError, or UserError if the file's weights, under this config, are not the autoencoder that it says it is.
    """
    from ldm.config import build

    state, metadata = atomic.read_tensors(path), atomic.read_metadata(path)
    said = LatentSpace.from_metadata(metadata, path)
    autoencoder = build.build_autoencoder(node, channels)
    try:
        autoencoder.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} holds autoencoder {said.name}, which is not of the config's architecture ({what})"
        ) from None
    space = LatentSpace.from_autoencoder(autoencoder, build.to_container(node), said.data)
    space.require_same(
        metadata, path, "the file or its config was changed since it was written: put the right one back"
    )
    return autoencoder.eval().requires_grad_(False), space


def latent_space_of(run: str | Path) -> str:
    """The name of the latent space of what `run` names. Raises UserError for a file that does not say its own."""
    from ldm.checkpoint import adapters, external
    from ldm.runs.folder import is_external

    if is_external(run):
        return external.pipeline_info(run).space
    if load_run_config(find_run(run)).get("adapter"):
        return latent_space_of(adapters.BaseModelRef.read(find_run(run)).path)
    path = find_run(run) / "first_stage.safetensors"
    return LatentSpace.from_metadata(atomic.read_metadata(path), path).name


def load_model(run: str | Path, weights: str = "ema") -> "LatentDiffusion":
    """The model of a run folder, ready to draw, on the GPU if there is one; of a diffusers folder or a checkpoint as well (ldm.checkpoint.external).

    run: the folder, or a step or weights file in it.  weights: ema or raw.  Raises UserError or CorruptFileError naming the file, also for
    weights that were trained with another first stage than the one beside them.
    """
    import torch

    from ldm.checkpoint import external
    from ldm.checkpoint.state import load_trainable
    from ldm.config import build, trust
    from ldm.runs.folder import is_external

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_external(run):
        return external.build_from_pipeline(external.open_pipeline(run, weights)).to(device)
    folder = find_run(run)
    cfg, card = load_run_config(folder), load_data_card(folder)
    if cfg.get("adapter"):
        return load_adapter_model(run, weights).eval().to(device)
    found = load_weights(run, weights)
    with trust.construction_errors(folder):
        autoencoder, space = load_first_stage(cfg.autoencoder, folder / "first_stage.safetensors", card.channels)
        model = build.build_model(cfg, autoencoder, card)
    space.require_same(
        found.metadata, found.path, "each was trained for its own: draw from the run that the weights come from"
    )
    load_trainable(model, found.tensors)
    return model.eval().to(device)


class Adapter(Protocol):
    """What conf/adapter makes: adds parameters of its own to a model, whose other parameters are frozen; at first they change nothing."""

    def apply_to(self, model: Any, scale: float = 1.0) -> None: ...


def load_adapter_model(run: str | Path, weights: str = "ema") -> "LatentDiffusion":
    """The model of an adapter run: its base, proven the one that it was trained on, with the adapter put on. Raises UserError."""
    from ldm.checkpoint.weights import hash_model

    folder = find_run(run)
    base, card = BaseModelRef.read(folder), load_data_card(folder)
    model = load_model(base.path)
    base.check_weights(hash_model(model), folder)
    apply_adapter(model, run, 1.0, weights)
    model.size = (card.size, card.size)
    return model


def apply_adapter(model: "LatentDiffusion", run: str | Path, scale: float = 1.0, weights: str = "ema") -> None:
    """Put what an adapter run, or a LoRA file of diffusers, holds on a model, `scale` times as strong. Raises UserError naming the run."""
    from hydra.utils import instantiate

    from ldm.runs.folder import is_external

    model.requires_grad_(False)
    if is_external(run):
        return apply_lora_file(model, Path(run).expanduser(), scale)
    folder = adapter_folder(run)
    found = load_weights(run, weights)
    with trust.construction_errors(folder):
        adapter: Adapter = instantiate(load_run_config(folder).adapter)
    try:
        adapter.apply_to(model, scale)
        copy_parameters(
            adapter_parameters(model), {local_parameter_name(name): value for name, value in found.tensors.items()}
        )
    except ValueError as error:
        raise UserError(f"{run} is an adapter of another network: {error}") from None
    model.requires_grad_(False)


def adapter_chain(run: str | Path) -> list[Path]:
    """The adapter runs that `run` is made of, the innermost first; none for a run that is whole by itself."""
    from ldm.runs.folder import is_external

    if is_external(run) or not load_run_config(folder := find_run(run)).get("adapter"):
        return []
    return [*adapter_chain(BaseModelRef.read(folder).path), folder]


def adapter_folder(run: str | Path) -> Path:
    """The folder of an adapter run. Raises UserError for another kind of run."""
    folder = find_run(run)
    if not load_run_config(folder).get("adapter"):
        raise UserError(f"{run} is no adapter: expected a run of train.py adapter=..., or a LoRA file of diffusers")
    return folder

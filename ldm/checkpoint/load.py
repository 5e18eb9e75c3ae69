"""Open what `run=` names (a run, an adapter run or an external model) and load its model.

Nothing is needed but the run folder or the file itself (and the published weights of the text encoder).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ldm.checkpoint.adapters import (
    BaseModelRef,
    adapter_parameters,
    apply_lora_file,
    copy_parameters,
    local_parameter_name,
)
from ldm.checkpoint.latent_space import JOINT, LatentSpace
from ldm.checkpoint.weights import LoadedWeights, hash_model, load_weights
from ldm.config import serialize, trust
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_json
from ldm.runs.data_card import DataCard
from ldm.runs.folder import find_run, is_external

if TYPE_CHECKING:
    from ldm.autoencoder.first_stage import FirstStage
    from ldm.checkpoint.external import PipelineInfo
    from ldm.model import LatentDiffusion


class Adapter(Protocol):
    """An option of conf/adapter: adds trainable parameters to a model whose other parameters are frozen.

    Before training, the added parameters do not change the model's output.
    """

    def apply_to(self, model: Any, scale: float = 1.0) -> None: ...


class ModelSource(Protocol):
    """A trained model on disk. `open_model` decides once which kind it is; its config is read and validated once."""

    @property
    def folder(self) -> Path:
        """The run folder; for an external model, its folder or file."""

    @property
    def config(self) -> Any:
        """The validated config, without its logger. Raises UserError."""

    @property
    def data_card(self) -> DataCard:
        """The description of the training data. Raises CorruptFileError or UserError naming the file."""

    @property
    def latent_space(self) -> str:
        """The name of the latent space. Raises UserError for a first stage that does not name its own."""

    @property
    def adapters(self) -> "Sequence[AdapterSource]":
        """The adapter runs that the model consists of besides its base, innermost first; empty for a complete model."""

    @property
    def has_dataset(self) -> bool:
        """Whether the config names the data set that the model was trained on."""

    def load(self, weights: str = "ema") -> "LatentDiffusion":
        """Load the model in evaluation mode, on the GPU if there is one; weights: ema, raw, or ema:0.15 (post-hoc EMA).

        Raises UserError or CorruptFileError naming the file.
        """


@dataclass(frozen=True, eq=False)
class RunSource:
    """A run of train.py.  path: the run folder, a step folder or a weights file in it, as the user named it."""

    path: Path
    folder: Path
    config: Any
    adapters: "Sequence[AdapterSource]" = ()
    has_dataset: bool = True

    @cached_property
    def data_card(self) -> DataCard:
        return read_data_card(self.folder)

    @cached_property
    def latent_space(self) -> str:
        path, weights = self.folder / "first_stage.safetensors", self.folder / "weights.safetensors"
        space = LatentSpace.from_metadata(atomic.read_metadata(path), path)
        if weights.is_file() and JOINT.items() <= atomic.read_metadata(weights).items():
            return space.trained_name(atomic.read_tensors(weights))
        return space.name

    def load(self, weights: str = "ema") -> "LatentDiffusion":
        """Load the model. Raises UserError also for weights trained with another first stage than the run folder's."""
        from ldm.checkpoint.state import load_trainable
        from ldm.config import build

        card, trained = self.data_card, self.load_weights(weights)
        with trust.construction_errors(self.folder):
            path = self.folder / "first_stage.safetensors"
            autoencoder, space = load_first_stage(self.config.autoencoder, path, card.shape[0])
            model = build.build_model(self.config, autoencoder, card)
        space.require_same(
            trained.metadata,
            trained.path,
            "weights work only with the first stage they were trained with: sample from the run they come from",
        )
        if JOINT.items() <= trained.metadata.items():
            model.unfreeze_first_stage()
        load_trainable(model, trained.tensors)
        for part in model.conditioner.modules():
            if hasattr(part, "load_files"):
                part.load_files(self.folder)
        model.autoencoder.requires_grad_(False)
        return model.eval().to(_default_device())

    def load_weights(self, weights: str = "ema") -> LoadedWeights:
        """Read the trained weights. Raises UserError if there are none, CorruptFileError for a broken file."""
        return load_weights(self.path, self.folder, weights)


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """An adapter run of train.py: its folder holds only the adapter's parameters and a reference to its base model."""

    path: Path
    folder: Path
    config: Any
    has_dataset: bool = True

    @cached_property
    def base_ref(self) -> BaseModelRef:
        """The path and the hash of the base model, as recorded when the adapter was trained."""
        return BaseModelRef.read(self.folder)

    @cached_property
    def base(self) -> ModelSource:
        """The model that the adapter was trained on. Raises UserError if it is missing."""
        return open_model(self.base_ref.path)

    @cached_property
    def data_card(self) -> DataCard:
        return read_data_card(self.folder)

    @property
    def latent_space(self) -> str:
        return self.base.latent_space

    @property
    def adapters(self) -> "Sequence[AdapterSource]":
        return [*self.base.adapters, self]

    def load(self, weights: str = "ema") -> "LatentDiffusion":
        """Load the base model, check that its weights are those the adapter was trained on, and apply the adapter."""
        card, model = self.data_card, self.base.load()
        self.base_ref.check_weights(hash_model(model), self.folder)
        self.apply_to(model, 1.0, weights)
        model.size = tuple(card.shape[1:])
        return model.eval().to(_default_device())

    def apply_to(self, model: "LatentDiffusion", scale: float = 1.0, weights: str = "ema") -> None:
        """Add the adapter to `model` in place, see `apply_adapter`."""
        from hydra.utils import instantiate

        model.requires_grad_(False)
        trained = load_weights(self.path, self.folder, weights)
        with trust.construction_errors(self.folder):
            adapter: Adapter = instantiate(self.config.adapter)
        try:
            adapter.apply_to(model, scale)
            state = {local_parameter_name(name): value for name, value in trained.tensors.items()}
            copy_parameters(adapter_parameters(model), state)
        except ValueError as error:
            raise UserError(f"{self.path} is an adapter of another network: {error}") from None
        model.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class ExternalSource:
    """A pipeline folder of diffusers or a checkpoint that train.py did not write (see ldm.checkpoint.external)."""

    folder: Path
    adapters: Sequence[AdapterSource] = ()
    has_dataset: bool = False

    @cached_property
    def _info(self) -> "PipelineInfo":
        from ldm.checkpoint import external

        return external.pipeline_info(self.folder)

    @cached_property
    def config(self) -> Any:
        return trust.sanitize_config(self._info.config, self.folder)

    @property
    def data_card(self) -> DataCard:
        return self._info.card

    @property
    def latent_space(self) -> str:
        return self._info.space

    def load(self, weights: str = "ema") -> "LatentDiffusion":
        from ldm.checkpoint import external

        return external.build_from_pipeline(external.open_pipeline(self.folder, weights)).to(_default_device())


def open_model(run: str | Path) -> ModelSource:
    """Open the model that `run` names, without loading its weights.

    run: a run folder, a step folder or weights file in it, a folder of runs (the newest is taken), a pipeline folder of
    diffusers, or a checkpoint file.
    Raises UserError if there is none, or if its config names anything but the parts of a model.
    """
    path = Path(run).expanduser()
    if is_external(path):
        return ExternalSource(path)
    folder = find_run(run)
    file = folder / "config.yaml"
    config = trust.sanitize_config(serialize.load_config(file), file)
    return AdapterSource(path, folder, config) if config.get("adapter") else RunSource(path, folder, config)


def open_adapter(run: str | Path) -> AdapterSource:
    """Open an adapter run. Raises UserError for a run that trained no adapter."""
    source = open_model(run)
    if not isinstance(source, AdapterSource):
        raise UserError(f"{run} is no adapter: expected a run of train.py adapter=..., or a LoRA file of diffusers")
    return source


def load_model(run: str | Path, weights: str = "ema") -> "LatentDiffusion":
    """Load the model that `run` names (see `open_model`) in evaluation mode, on the GPU if there is one.

    weights: ema, raw, or ema:0.15, a post-hoc EMA of that length.
    Raises UserError or CorruptFileError naming the file.
    """
    return open_model(run).load(weights)


def load_run_config(run: str | Path) -> Any:
    """Return the validated config of what `run` names.

    Raises UserError if it names anything but the parts of a model.
    """
    return open_model(run).config


def load_data_card(run: str | Path) -> DataCard:
    """Return the data card of what `run` names. Raises CorruptFileError naming the file."""
    return open_model(run).data_card


def latent_space_of(run: str | Path) -> str:
    """Return the name of the latent space of what `run` names.

    Raises UserError for a file that does not name its own.
    """
    return open_model(run).latent_space


def apply_adapter(model: "LatentDiffusion", run: str | Path, scale: float = 1.0, weights: str = "ema") -> None:
    """Add a trained adapter to `model` in place and freeze all parameters.

    run: an adapter run, or a LoRA file in diffusers' format.
    scale: factor on the adapter's contribution; 0 leaves the model's output unchanged.
    weights: ema, raw, or ema:0.15 (post-hoc EMA).
    Raises UserError, naming `run`, if the adapter does not match the network.
    """
    if is_external(run):
        return apply_lora_file(model, Path(run).expanduser(), scale)
    open_adapter(run).apply_to(model, scale, weights)


def load_first_stage(node: Any, path: Path, channels: int) -> "tuple[FirstStage, LatentSpace]":
    """Load an autoencoder, frozen, from a weights file and return it with its latent space.

    node: the `autoencoder` node of a config.  channels: of the images.
    Raises CorruptFileError, or UserError if the weights under this config do not have the identity recorded in the
    file.
    """
    from ldm.config import build

    state, metadata = atomic.read_tensors(path), atomic.read_metadata(path)
    recorded = LatentSpace.from_metadata(metadata, path)
    autoencoder = build.build_autoencoder(node, channels)
    try:
        autoencoder.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} holds autoencoder {recorded.name}, which is not of the config's architecture ({reason})"
        ) from None
    space = LatentSpace.from_autoencoder(autoencoder, build.to_container(node), recorded.data)
    space.require_same(
        metadata, path, "the file or its config was changed since it was written: put the right one back"
    )
    return autoencoder.eval().requires_grad_(False), space


def read_data_card(folder: Path) -> DataCard:
    """Read data.json of a run folder. Raises CorruptFileError naming the file."""
    path = folder / "data.json"
    try:
        return DataCard.from_dict(parse_json(path.read_text(encoding="utf-8")))
    except UserError as error:  # a medium that it may not name
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise atomic.CorruptFileError(
            f"{path} is damaged ({error}); the same train.py command writes it again"
        ) from None


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

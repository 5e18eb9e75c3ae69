"""Initial weights from another model: fine-tuning, domain adaptation, new classes, more conditions, adapters."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.checkpoint import adapters
from ldm.checkpoint.adapters import BaseModelRef, adapter_parameters
from ldm.checkpoint.latent_space import LatentSpace, require_same_latent_space
from ldm.checkpoint.load import load_data_card, load_model, load_run_config, open_model
from ldm.checkpoint.state import trainable_parameters
from ldm.config import build
from ldm.diffusion.schedule import schedules_equal
from ldm.errors import UserError
from ldm.recipes.run import TrainingRun

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


# parameters that the other model need not have: new ones have no effect at first, or are learned from scratch
OPTIONAL = re.compile(r"conditioner\.|denoiser\.net\.(scale|(\w+\.)*temporal)\.")

# parts of the config that an adapter takes from its base
INHERITED_KEYS = ("autoencoder", "conditioner", "net", "schedule", "prediction", "learned_variance")


def load_init_model(cfg: Any) -> Any:
    """Load the model that cfg.init names (run, checkpoint, weights file or pipeline) on the CPU; None without one."""
    return load_model(cfg.init).cpu() if cfg.get("init") else None


def adopt_first_stage(cfg: Any, model: Any, channels: int) -> tuple[nn.Module, LatentSpace, dict[str, Any]]:
    """Return the model's first stage, in whose latent space it was trained, its latent space, and no metrics.

    Raises UserError if the config names a first stage of another architecture.
    """
    autoencoder = build.build_autoencoder(cfg.autoencoder, channels)
    try:
        autoencoder.load_state_dict(model.autoencoder.state_dict())
    except RuntimeError:
        raise UserError(
            f"init={cfg.init} has a first stage of another architecture, or for images of other channels, than this "
            "config; choose autoencoder=... as it was trained with"
        ) from None
    space = LatentSpace.from_autoencoder(autoencoder, build.to_container(cfg.autoencoder))
    return autoencoder.eval().requires_grad_(False), space, {}


def build_training_model(cfg: Any, run: TrainingRun, autoencoder: Any, data: Any, source: Any) -> Any:
    """Build the model that a run trains: with random weights, with those of `source`, or `source` with an adapter.

    Raises UserError if the run is resumed from an adapter of another base.
    """
    if not cfg.get("adapter"):
        model = build.build_model(cfg, autoencoder, data)
        if source is not None:
            run.print(copy_weights(model, source, cfg.init))
        return model
    base, message = create_adapter(cfg, source, data)
    run.print(message)
    if run.resume is not None:
        adapters.BaseModelRef.read(run.folder).check_weights(base.weights, run.folder)
    elif run.is_main_process:
        base.write(run.folder)
    return source


def check_teacher(cfg: Any, space: LatentSpace) -> None:
    """Check that the objective's teacher, if it has one, shares the latent space and the noise schedule of the model.

    Raises UserError otherwise.
    """
    node = cfg.objective.get("teacher")
    if not node or node.run is None:  # building the objective reports a missing run
        return
    source = open_model(node.run)
    teacher, student = (f"objective.teacher.run={node.run}", source.latent_space), ("this model", space.name)
    remedy = "a teacher and its student share their first stage; begin from init= of a model that has the teacher's"
    require_same_latent_space(teacher, student, remedy)
    if not schedules_equal(instantiate(source.config.schedule), instantiate(cfg.schedule)):
        raise UserError(
            f"objective.teacher.run={node.run} was trained on another noise schedule; choose schedule=... as it was"
        )


@torch.no_grad()
def copy_weights(model: nn.Module, other: nn.Module, init: str) -> str:
    """Copy other's trained weights into model; return a message that names what has no counterpart there.

    The weights of additional input channels, as of a new condition, are zero at first.  Parts of a conditioner that are
    new or of another size stay as initialised.  Raises UserError if the denoiser is of another architecture.
    """
    old = {strip_wrappers(name): value for name, value in trainable_parameters(other).items()}
    new: list[str] = []
    wrong: list[str] = []
    for name, p in ((strip_wrappers(name), p) for name, p in trainable_parameters(model).items()):
        if name not in old or not shapes_compatible(old[name], p):
            (new if OPTIONAL.match(name) else wrong).append(name)
        else:
            p.zero_()
            p[:, : old[name].shape[1]].copy_(old[name]) if p.ndim > 1 else p.copy_(old[name])
    if wrong:
        names = ", ".join(wrong[:3])
        raise UserError(
            f"init={init} is of another architecture: {names} differ; choose net=... as it was trained with"
        )
    return f"weights     from {init}" + (f"; new: {', '.join(new)}" if new else "")


def strip_wrappers(name: str) -> str:
    """Return a parameter's name without wrappers of the denoiser's network: denoiser.net.net.x -> denoiser.net.x."""
    return re.sub(r"^denoiser\.(net\.)+", "denoiser.net.", name)


def shapes_compatible(old: Tensor, new: Tensor) -> bool:
    """Return whether old can be copied into new: the same shape, or more input channels of a convolution."""
    return old.shape == new.shape or (
        old.ndim == new.ndim == 4
        and old.shape[1] < new.shape[1]
        and old.shape[:1] + old.shape[2:] == new.shape[:1] + new.shape[2:]
    )


def inherit_base_config(cfg: Any) -> Any:
    """Set the INHERITED_KEYS of a config with an adapter to those of its base; return the config.

    Raises UserError for an adapter without init=.
    """
    if not cfg.get("adapter"):
        return cfg
    if not cfg.get("init"):
        raise UserError("adapter= is trained on top of a trained model: choose it by init=RUN")
    base = load_run_config(cfg.init)
    for name in INHERITED_KEYS:
        cfg[name] = base.get(name, False)  # the config of an imported pipeline has no learned_variance
    return cfg


def create_adapter(cfg: Any, model: "LatentDiffusion", data: Any) -> tuple[BaseModelRef, str]:
    """Freeze the model of cfg.init and add the config's adapter to it, initialised from the seed.

    Returns the reference to the base, and a message with the number of trained parameters.  Raises UserError for data
    of other channels or, where the model is conditioned on labels, of another number of classes.
    """
    from ldm.checkpoint.weights import hash_model
    from ldm.tensors import derive_seed

    card = load_data_card(cfg.init)
    if data.shape[0] != card.shape[0] or ("label" in model.conditioner.keys and len(data.classes) != len(card.classes)):
        former = f"{card.shape[0]} channels and {len(card.classes)} classes"
        raise UserError(
            f"init={cfg.init} was trained on images of {former}, these have {data.shape[0]} and {len(data.classes)}: "
            "choose data= alike"
        )
    base = BaseModelRef(str(Path(cfg.init).expanduser().absolute()), hash_model(model))
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    model.requires_grad_(False)
    instantiate(cfg.adapter).apply_to(model)
    model.size = tuple(data.shape[1:])
    trained = sum(p.numel() for p in adapter_parameters(model).values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    share = f"{100 * trained / frozen:.2f}%"
    return base, f"adapter     {trained:,} parameters on {frozen:,} frozen ones of {cfg.init}: {share}"

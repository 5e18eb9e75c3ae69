"""A training that begins with the weights of another model: fine-tuning, domain adaptation, new classes, more conditions."""

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
    from torch import Tensor, nn

    from ldm.model import LatentDiffusion


OPTIONAL_PREFIXES = (
    "conditioner.",
    "denoiser.net.scale.",
)  # what another model need not have: these begin without effect, or are to be learned


def load_init_model(cfg: Any) -> Any:
    """The model that cfg.init names, on the CPU: a run, a step, a weights file or a whole pipeline; None without one."""
    return load_model(cfg.init).cpu() if cfg.get("init") else None


def adopt_first_stage(cfg: Any, model: Any, channels: int) -> tuple[nn.Module, LatentSpace, dict[str, Any]]:
    """The model's own first stage, in whose latent space alone its weights mean something; nothing was measured of it.

    Raises UserError if the config names one of another architecture.
    """
    autoencoder = build.build_autoencoder(cfg.autoencoder, channels)
    try:
        autoencoder.load_state_dict(model.autoencoder.state_dict())
    except RuntimeError:
        said = f"init={cfg.init} has a first stage of another architecture, or for images of other channels, than this config"
        raise UserError(f"{said}; choose autoencoder=... as it was trained with") from None
    return (
        autoencoder.eval().requires_grad_(False),
        LatentSpace.from_autoencoder(autoencoder, build.to_container(cfg.autoencoder)),
        {},
    )


def build_training_model(cfg: Any, run: TrainingRun, autoencoder: Any, data: Any, source: Any) -> Any:
    """The model that a run trains: with fresh weights, with those of `source`, or `source` itself, frozen, with an adapter on it.

    Raises UserError if the run goes on from an adapter of another base.
    """
    if not cfg.get("adapter"):
        made = build.build_model(cfg, autoencoder, data)
        if source is not None:
            run.print(copy_weights(made, source, cfg.init))
        return made
    base, said = create_adapter(cfg, source, data)
    run.print(said)
    if run.resume is not None:
        adapters.BaseModelRef.read(run.folder).check_weights(base.weights, run.folder)
    elif run.is_main_process:
        base.write(run.folder)
    return source


def check_teacher(cfg: Any, space: LatentSpace) -> None:
    """Raises UserError if the objective has a teacher that belongs to another latent space, or looks at noise by another schedule."""
    node = cfg.objective.get("teacher")
    if not node or node.run is None:  # which load.teacher says
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
    """Copy other's trained weights into model; returns what was not taken, in words.

    A layer that reads more channels than before, as of a new condition, reads nothing of them at first.  A conditioner's parts that are new
    or of another size stay fresh.  Raises UserError if the denoiser is of another architecture.
    """
    old = {strip_wrappers(name): value for name, value in trainable_parameters(other).items()}
    fresh: list[str] = []
    wrong: list[str] = []
    for name, p in ((strip_wrappers(name), p) for name, p in trainable_parameters(model).items()):
        if name not in old or not shapes_compatible(old[name], p):
            (fresh if name.startswith(OPTIONAL_PREFIXES) else wrong).append(name)
        else:
            p.zero_()
            p[:, : old[name].shape[1]].copy_(old[name]) if p.ndim > 1 else p.copy_(old[name])
    if wrong:
        raise UserError(
            f"init={init} is of another architecture: {', '.join(wrong[:3])} differ; choose net=... as it was trained with"
        )
    return f"begun from {init}" + (f"; new: {', '.join(fresh)}" if fresh else "")


def strip_wrappers(name: str) -> str:
    """A parameter's name as it is where no other network is around its own."""
    return re.sub(r"^denoiser\.(net\.)+", "denoiser.net.", name)


def shapes_compatible(old: Tensor, new: Tensor) -> bool:
    """Whether old's numbers have a place in new: the same shape, or more input channels of a convolution."""
    return old.shape == new.shape or (
        old.ndim == new.ndim == 4
        and old.shape[1] < new.shape[1]
        and old.shape[:1] + old.shape[2:] == new.shape[:1] + new.shape[2:]
    )


INHERITED_KEYS = (
    "autoencoder",
    "conditioner",
    "net",
    "schedule",
    "prediction",
    "learned_variance",
)  # what the base decides


def inherit_base_config(cfg: Any) -> Any:
    """The config with the parts that its base decides, where it has an adapter, so that a person need not name them again.

    Raises UserError without init=.
    """
    if not cfg.get("adapter"):
        return cfg
    if not cfg.get("init"):
        raise UserError("adapter= is trained on top of a trained model: init=RUN says which")
    base = load_run_config(cfg.init)
    for name in INHERITED_KEYS:
        cfg[name] = base.get(name, False)  # a pipeline of another project does not say that its variance is not learned
    return cfg


def create_adapter(cfg: Any, model: "LatentDiffusion", data: Any) -> tuple[BaseModelRef, str]:
    """Put a fresh adapter of the config on the model of cfg.init, all else frozen; the base, and in words how much is trained.

    Raises UserError for data that the model cannot be told.
    """
    import torch
    from hydra.utils import instantiate

    from ldm.checkpoint.weights import hash_model
    from ldm.tensors import derive_seed

    card = load_data_card(cfg.init)
    if data.channels != card.channels or ("label" in model.conditioner.keys and len(data.classes) != len(card.classes)):
        was = f"{card.channels} channels and {len(card.classes)} classes"
        raise UserError(
            f"init={cfg.init} was trained on images of {was}, these have {data.channels} and {len(data.classes)}: choose data= alike"
        )
    base = BaseModelRef(str(Path(cfg.init).expanduser().absolute()), hash_model(model))
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    model.requires_grad_(False)
    instantiate(cfg.adapter).apply_to(model)
    model.size = (data.size, data.size)
    trained, every = (sum(p.numel() for p in some) for some in (adapter_parameters(model).values(), model.parameters()))
    frozen = every - trained
    return (
        base,
        f"adapter     {trained:,} parameters on {frozen:,} frozen ones of {cfg.init}: {100 * trained / frozen:.2f}%",
    )

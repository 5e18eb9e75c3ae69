"""A training that begins with the weights of another model: fine-tuning, domain adaptation, new classes, more conditions."""

import re
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm import adapted, build
from ldm.diffusion.schedule import alike
from ldm.errors import UserError
from ldm.load import config_of, load, run_folder, space_of
from ldm.space import Space, require_same_latent_space
from ldm.stage.run import Run
from ldm.training.callbacks import trained

NEW = ("conditioner.", "denoiser.net.scale.")  # what another model need not have: these begin without effect, or are to be learned


def source(cfg: Any) -> Any:
    """The model that cfg.init names, on the CPU: a run, a step, a weights file or a whole pipeline; None without one."""
    return load(cfg.init).cpu() if cfg.get("init") else None


def first_stage(cfg: Any, model: Any, channels: int) -> tuple[nn.Module, Space, dict[str, Any]]:
    """The model's own first stage, in whose latent space alone its weights mean something; nothing was measured of it.

    Raises UserError if the config names one of another architecture.
    """
    autoencoder = build.autoencoder(cfg.autoencoder, channels)
    try:
        autoencoder.load_state_dict(model.autoencoder.state_dict())
    except RuntimeError:
        said = f"init={cfg.init} has a first stage of another architecture, or for images of other channels, than this config"
        raise UserError(f"{said}; choose autoencoder=... as it was trained with") from None
    return autoencoder.eval().requires_grad_(False), Space.of(autoencoder, build.plain(cfg.autoencoder)), {}


def model(cfg: Any, run: Run, autoencoder: Any, data: Any, source: Any) -> Any:
    """The model that a run trains: with fresh weights, with those of `source`, or `source` itself, frozen, with an adapter on it.

    Raises UserError if the run goes on from an adapter of another base.
    """
    if not cfg.get("adapter"):
        made = build.model(cfg, autoencoder, data)
        if source is not None:
            run.say(take(made, source, cfg.init))
        return made
    base, said = adapted.begun(cfg, source, data)
    run.say(said)
    if run.resume is not None:
        adapted.Base.read(run.folder).admit(base.weights, run.folder)
    elif run.chief:
        base.write(run.folder)
    return source


def taught(cfg: Any, space: Space) -> None:
    """Raises UserError if the objective has a teacher that belongs to another latent space, or looks at noise by another schedule."""
    node = cfg.objective.get("teacher")
    if not node or node.run is None:  # which load.teacher says
        return
    teacher, student = (f"objective.teacher.run={node.run}", space_of(node.run)), ("this model", space.name)
    remedy = "a teacher and its student share their first stage; begin from init= of a model that has the teacher's"
    require_same_latent_space(teacher, student, remedy)
    if not alike(instantiate(config_of(run_folder(node.run)).schedule), instantiate(cfg.schedule)):
        raise UserError(f"objective.teacher.run={node.run} was trained on another noise schedule; choose schedule=... as it was")


@torch.no_grad()
def take(model: nn.Module, other: nn.Module, init: str) -> str:
    """Copy other's trained weights into model; returns what was not taken, in words.

    A layer that reads more channels than before, as of a new condition, reads nothing of them at first.  A conditioner's parts that are new
    or of another size stay fresh.  Raises UserError if the denoiser is of another architecture.
    """
    old = {unwrapped(name): value for name, value in trained(other).items()}
    fresh: list[str] = []
    wrong: list[str] = []
    for name, p in ((unwrapped(name), p) for name, p in trained(model).items()):
        if name not in old or not fits(old[name], p):
            (fresh if name.startswith(NEW) else wrong).append(name)
        else:
            p.zero_()
            p[:, : old[name].shape[1]].copy_(old[name]) if p.ndim > 1 else p.copy_(old[name])
    if wrong:
        raise UserError(f"init={init} is of another architecture: {', '.join(wrong[:3])} differ; choose net=... as it was trained with")
    return f"begun from {init}" + (f"; new: {', '.join(fresh)}" if fresh else "")


def unwrapped(name: str) -> str:
    """A parameter's name as it is where no other network is around its own."""
    return re.sub(r"^denoiser\.(net\.)+", "denoiser.net.", name)


def fits(old: Tensor, new: Tensor) -> bool:
    """Whether old's numbers have a place in new: the same shape, or more input channels of a convolution."""
    return old.shape == new.shape or (
        old.ndim == new.ndim == 4 and old.shape[1] < new.shape[1] and old.shape[:1] + old.shape[2:] == new.shape[:1] + new.shape[2:]
    )

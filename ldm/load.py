"""A trained model from a run folder, with nothing else needed than the folder (and the text encoder's published weights)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import durable, runs
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


@dataclass(frozen=True)
class DataCard:
    """What a model must know of the data it was trained on, kept in the run folder as data.json."""

    fingerprint: str
    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    channels: int
    size: int

    @staticmethod
    def of(data) -> "DataCard":
        return DataCard(data.fingerprint, data.classes, data.captions, data.channels, data.size)

    def write(self, folder: Path) -> None:
        durable.write_json(folder / "data.json", asdict(self))

    @staticmethod
    def read(folder: Path) -> "DataCard":
        """The card of a run folder. Raises DamagedError naming the file."""
        path = folder / "data.json"
        try:
            return DataCard(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise durable.DamagedError(f"{path} is damaged ({error}); the same train.py command writes it again") from None


def run_folder(run: str | Path) -> Path:
    """The run folder that `run` names: itself, by a file or step in it, or as the newest in it. Raises UserError with what was expected."""
    path = Path(run).expanduser()
    if not path.exists():
        near = sorted(str(p.parent) for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        raise UserError(f"run={run}: no such folder{'; there are ' + ', '.join(near[:5]) if near else ''}; expected one that train.py made")
    for folder in (path, *path.parents):
        if (folder / "config.yaml").is_file() and (folder / "data.json").is_file():
            return folder
    raise UserError(
        f"run={run}: not a run folder (no config.yaml and data.json in it); expected one that train.py made for a diffusion model"
    )


def weights_of(run: str | Path, kind: str = "ema") -> dict[str, Any]:
    """The trained weights that `run` names: a weights file, a step folder, or the run's final or newest ones; kind: ema or raw.

    Raises UserError if there are none, DamagedError for a broken file.
    """
    if kind not in ("ema", "raw"):
        raise UserError(f"weights={kind}: expected ema or raw")
    path, folder = Path(run).expanduser(), run_folder(run)
    if path.is_file() and path.suffix == ".safetensors":
        return durable.read_tensors(path)
    if path.name.startswith("step-"):
        return of_step(path, kind)
    if kind == "ema" and (folder / "weights.safetensors").is_file():
        return durable.read_tensors(folder / "weights.safetensors")
    step, skipped = durable.latest_valid(folder / "checkpoints")
    if step is None:
        why = f"; {skipped[0][1]}" if skipped else ""
        raise UserError(f"run={run}: no weights in it yet{why}; run train.py with its config to the first checkpoint")
    return of_step(step, kind)


def of_step(step: Path, kind: str) -> dict[str, Any]:
    """The weights of a LatentDiffusion in a step folder, whose `model` is the whole Lightning module: the model and its objective."""
    kept = durable.load_step(step).tensors
    if kind == "ema":
        return kept["ema"]
    return {name.removeprefix("model."): value for name, value in kept["model"].items() if name.startswith("model.")}


def config_of(folder: Path) -> Any:
    """A run's config, checked as one from the command line is: only targets that a config may name."""
    from omegaconf import OmegaConf

    from ldm.build import SUPPLIED
    from ldm.validate import validate

    plain = runs.load_config(folder / "config.yaml")
    validate(plain, None, SUPPLIED)
    return OmegaConf.create(plain)


def load(run: str | Path, weights: str = "ema") -> "LatentDiffusion":
    """The model of a run folder, ready to draw, on the GPU if there is one.

    run: the folder, or a step or weights file in it.  weights: ema or raw.  Raises UserError or DamagedError naming the file.
    """
    import torch

    from ldm import build
    from ldm.training.callbacks import load_trained

    folder = run_folder(run)
    cfg, card = config_of(folder), DataCard.read(folder)
    state = weights_of(run, weights)
    autoencoder = build.autoencoder(cfg.autoencoder, card.channels)
    autoencoder.load_state_dict(durable.read_tensors(folder / "first_stage.safetensors"))
    model = build.model(cfg, autoencoder, card)
    load_trained(model, state)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

"""A trained model from a run folder, with nothing else needed than the folder (and the text encoder's published weights)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm import durable, runs
from ldm.errors import UserError
from ldm.parse import json_of
from ldm.space import Space

if TYPE_CHECKING:
    from ldm.autoencoder.first_stage import FirstStage
    from ldm.condition import Condition
    from ldm.diffusion.denoiser import Denoise, Denoiser
    from ldm.diffusion.distill import Teacher
    from ldm.model import LatentDiffusion


LARGEST = 1 << 16  # pixels on a side of anybody's images


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

    @staticmethod
    def described(said: Any) -> "DataCard":
        """The card that plain data describe. Raises ValueError for what is none."""
        names = {"fingerprint", "classes", "captions", "channels", "size"}
        if not isinstance(said, dict) or said.keys() != names:
            raise ValueError(f"expected {', '.join(sorted(names))}")
        classes, captions = said["classes"], said["captions"]
        told = isinstance(captions, list) and all(
            isinstance(one, list) and one and all(isinstance(x, str) for x in one) for one in captions
        )
        if not isinstance(said["fingerprint"], str) or not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
            raise ValueError("expected a fingerprint and the names of classes")
        if not told or not classes or len(captions) != len(classes):
            raise ValueError("expected captions of each class")
        if said["channels"] not in (1, 3) or type(said["size"]) is not int or not 1 <= said["size"] <= LARGEST:
            raise ValueError(f"expected 1 or 3 channels and a size of 1 to {LARGEST} pixels")
        return DataCard(**said)

    def write(self, folder: Path) -> None:
        durable.write_json(folder / "data.json", asdict(self))


def load_data_card(folder: Path) -> "DataCard":
    """The card of a run folder, or of what is foreign. Raises DamagedError naming the file."""
    from ldm import foreign

    if foreign.is_foreign(folder):
        return foreign.described(folder).card
    path = folder / "data.json"
    try:
        return DataCard.described(json_of(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise durable.DamagedError(f"{path} is damaged ({error}); the same train.py command writes it again") from None


def run_folder(run: str | Path) -> Path:
    """The run folder that `run` names: itself, by a file or step in it, or as the newest in it; what is foreign (ldm.foreign) is its own.

    Raises UserError with what was expected.
    """
    from ldm import foreign

    path = Path(run).expanduser()
    if foreign.is_foreign(path):
        return path
    if not path.exists():
        near = sorted(str(p.parent) for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        raise UserError(f"run={run}: no such folder{'; there are ' + ', '.join(near[:5]) if near else ''}; expected one that train.py made")
    for folder in (path, *path.parents):
        if is_run(folder):
            return folder
    if inside := list_runs(path):
        return inside[0]
    raise UserError(
        f"run={run}: not a run folder (no config.yaml and data.json in it), nor a folder of such; "
        "expected one that train.py made for a diffusion model"
    )


def list_runs(folder: Path) -> list[Path]:
    """List the run folders of diffusion models directly in a folder, the newest first."""
    return sorted(filter(is_run, folder.glob("*")), key=lambda one: -(one / "config.yaml").stat().st_mtime)


def is_run(folder: Path) -> bool:
    """Whether train.py made this folder, for a diffusion model."""
    return (folder / "config.yaml").is_file() and (folder / "data.json").is_file()


class Kept(NamedTuple):
    """Trained weights, where they were found, and what the file says of them."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str]


def weights_of(run: str | Path, kind: str = "ema") -> dict[str, Any]:
    """The tensors of `kept`."""
    return kept(run, kind).tensors


def kept(run: str | Path, kind: str = "ema") -> Kept:
    """The trained weights that `run` names: a weights file, a step folder, or the run's final or newest ones; kind: ema, raw, or ema:0.15.

    Raises UserError if there are none, DamagedError for a broken file.
    """
    path, folder = Path(run).expanduser(), run_folder(run)
    if kind not in ("ema", "raw"):
        return of_averages(folder / "averages", length_of(kind))
    if path.is_file() and path.suffix == ".safetensors":
        return of_file(path)
    if path.name.startswith("step-"):
        return of_step(path, kind)
    if kind == "ema" and (folder / "weights.safetensors").is_file():
        return of_file(folder / "weights.safetensors")
    step, skipped = durable.latest_valid(folder / "checkpoints")
    if step is None:
        why = f"; {skipped[0][1]}" if skipped else ""
        raise UserError(f"run={run}: no weights in it yet{why}; run train.py with its config to the first checkpoint")
    return of_step(step, kind)


def of_file(path: Path) -> Kept:
    return Kept(path, durable.read_tensors(path), durable.read_metadata(path))


def of_step(path: Path, kind: str) -> Kept:
    """The weights of a LatentDiffusion in a step folder, whose `model` is the whole Lightning module: the model and its objective."""
    step = durable.load_step(path)
    if kind == "ema":
        return Kept(path, step.tensors["ema"], step.metadata)
    model = {name.removeprefix("model."): value for name, value in step.tensors["model"].items() if name.startswith("model.")}
    return Kept(path, model, step.metadata)


def length_of(kind: str) -> float:
    """The length in `ema:0.15`, a part of the training. Raises UserError for anything else."""
    from ldm.ema import power_of

    try:
        name, _, length = kind.partition(":")
        if name == "ema":
            power_of(float(length))
            return float(length)
    except ValueError:
        pass
    raise UserError(f"weights={kind}: expected ema, raw, or ema:0.15, an average of any length below 0.28 made of a run's snapshots")


def of_averages(folder: Path, sigma_rel: float) -> Kept:
    """The average of any length at the end of a run that kept averages of two (post-hoc EMA: EDM2, section 3.2).

    Raises UserError where there are none, or too few for this length.
    """
    from ldm.ema import mixture

    named = {path: path.stem.removeprefix("ema_").split("-") for path in sorted(folder.glob("ema_*-*.safetensors"))}
    if not named:
        raise UserError(
            f"weights=ema:{sigma_rel:g}: {folder.parent} holds no snapshots; train with training.snapshot_every=N, or choose ema"
        )
    kept = [(float(length), int(step)) for length, step in named.values()]
    last = max(step for _, step in kept)
    parts, off = mixture(kept, sigma_rel, last)
    if off > 0.1:
        said = f"the nearest that its {len(kept)} snapshots make is {off:.0%} off"
        raise UserError(f"weights=ema:{sigma_rel:g}: {said}, expected 10% or less; choose a length nearer to 0.05..0.1, or train with more")
    found: dict[str, Any] = {}
    for part, path in zip(parts, named, strict=True):
        if abs(part) > 1e-9:  # a length that was kept is that file and no other
            for name, value in durable.read_tensors(path).items():
                found[name] = found[name].add_(value, alpha=part) if name in found else value * part
    return Kept(path, found, durable.read_metadata(path))


def config_of(folder: Path) -> Any:
    """A run's config, with no target but what a config that came with a file may name. Raises UserError."""
    from ldm import admit, foreign

    if foreign.is_foreign(folder):
        return admit.config(foreign.described(folder).config, folder)
    return admit.config(runs.load_config(folder / "config.yaml"), folder / "config.yaml")


def first_stage(node: Any, path: Path, channels: int) -> "tuple[FirstStage, Space]":
    """The autoencoder of a config's node with the weights of a file, frozen, and the latent space that is its.

    Raises DamagedError, or UserError if the file's weights, under this config, are not the autoencoder that it says it is.
    """
    from ldm import build

    state, metadata = durable.read_tensors(path), durable.read_metadata(path)
    said = Space.carried(metadata, path)
    autoencoder = build.autoencoder(node, channels)
    try:
        autoencoder.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds autoencoder {said.name}, which is not of the config's architecture ({what})") from None
    space = Space.of(autoencoder, build.plain(node), said.data)
    space.admit(metadata, path, "the file or its config was changed since it was written: put the right one back")
    return autoencoder.eval().requires_grad_(False), space


def space_of(run: str | Path) -> str:
    """The name of the latent space of what `run` names. Raises UserError for a file that does not say its own."""
    from ldm import adapted, foreign

    if foreign.is_foreign(run):
        return foreign.described(run).space
    if config_of(run_folder(run)).get("adapter"):
        return space_of(adapted.Base.read(run_folder(run)).path)
    path = run_folder(run) / "first_stage.safetensors"
    return Space.carried(durable.read_metadata(path), path).name


def load(run: str | Path, weights: str = "ema") -> "LatentDiffusion":
    """The model of a run folder, ready to draw, on the GPU if there is one; of a diffusers folder or a checkpoint as well (ldm.foreign).

    run: the folder, or a step or weights file in it.  weights: ema or raw.  Raises UserError or DamagedError naming the file, also for
    weights that were trained with another first stage than the one beside them.
    """
    import torch

    from ldm import adapted, admit, build, foreign
    from ldm.training.callbacks import load_trained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if foreign.is_foreign(run):
        return foreign.model_of(foreign.opened(run, weights)).to(device)
    folder = run_folder(run)
    cfg, card = config_of(folder), load_data_card(folder)
    if cfg.get("adapter"):
        return adapted.load_adapted(run, weights).eval().to(device)
    found = kept(run, weights)
    with admit.building(folder):
        autoencoder, space = first_stage(cfg.autoencoder, folder / "first_stage.safetensors", card.channels)
        model = build.model(cfg, autoencoder, card)
    space.admit(found.metadata, found.path, "each was trained for its own: draw from the run that the weights come from")
    load_trained(model, found.tensors)
    return model.eval().to(device)


@lru_cache(maxsize=1)
def _weak(run: str) -> "LatentDiffusion":
    return load(run)


def autoguidance(
    denoiser: "Denoiser", cond: "Condition", uncond: "Condition | None", weak: str | None = None, scale: float = 1.0
) -> "Denoise":
    """Away from the model of the run, or the step of a run, that `weak` names (Karras et al. 2024a); it is told the same Condition.

    Raises UserError without one.
    """
    from ldm.diffusion import guidance

    if weak is None:
        raise UserError("guidance=autoguidance needs a weaker model: guidance.weak=RUN, a run or a step folder in it")
    return guidance.autoguidance(denoiser, cond, uncond, _weak(str(Path(weak).expanduser().absolute())).denoiser, scale)


def teacher(run: str | None = None, scale: float = 1.0, interval: Sequence[float] = (0.0, 1.0)) -> "Teacher":
    """The model of a run as a teacher, guided at `scale` within the interval of t. Raises UserError without one."""
    from ldm.diffusion.distill import Teacher

    if run is None:
        raise UserError("distillation needs a teacher: objective.teacher.run=RUN, a run or a step folder in it")
    lo, hi = interval
    return Teacher(load(run), scale, (lo, hi))

"""Trained weights of a run: raw, averaged, or of a post-hoc EMA length."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.checkpoint.step import latest_valid_checkpoint, load_checkpoint
from ldm.errors import UserError
from ldm.io import atomic
from ldm.runs.folder import find_run

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


def hash_model(model: "LatentDiffusion") -> str:
    """sha256 (hex) of everything in a model that a file of weights may change."""
    from ldm.tensors import hash_state_dict

    return hash_state_dict(model.state_dict())


class LoadedWeights(NamedTuple):
    """Trained weights, where they were found, and what the file says of them."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str]


def load_weights_dict(run: str | Path, kind: str = "ema") -> dict[str, Any]:
    """The tensors of `kept`."""
    return load_weights(run, kind).tensors


def load_weights(run: str | Path, kind: str = "ema") -> LoadedWeights:
    """The trained weights that `run` names: a weights file, a step folder, or the run's final or newest ones; kind: ema, raw, or ema:0.15.

    Raises UserError if there are none, CorruptFileError for a broken file.
    """
    path, folder = Path(run).expanduser(), find_run(run)
    if kind not in ("ema", "raw"):
        return posthoc_ema(folder / "averages", parse_ema_length(kind))
    if path.is_file() and path.suffix == ".safetensors":
        return weights_from_file(path)
    if path.name.startswith("step-"):
        return weights_from_checkpoint(path, kind)
    if kind == "ema" and (folder / "weights.safetensors").is_file():
        return weights_from_file(folder / "weights.safetensors")
    step, skipped = latest_valid_checkpoint(folder / "checkpoints")
    if step is None:
        why = f"; {skipped[0][1]}" if skipped else ""
        raise UserError(f"run={run}: no weights in it yet{why}; run train.py with its config to the first checkpoint")
    return weights_from_checkpoint(step, kind)


def weights_from_file(path: Path) -> LoadedWeights:
    return LoadedWeights(path, atomic.read_tensors(path), atomic.read_metadata(path))


def weights_from_checkpoint(path: Path, kind: str) -> LoadedWeights:
    """The weights of a LatentDiffusion in a step folder, whose `model` is the whole Lightning module: the model and its objective."""
    step = load_checkpoint(path)
    if kind == "ema":
        return LoadedWeights(path, step.tensors["ema"], step.metadata)
    model = {
        name.removeprefix("model."): value for name, value in step.tensors["model"].items() if name.startswith("model.")
    }
    return LoadedWeights(path, model, step.metadata)


def parse_ema_length(kind: str) -> float:
    """The length in `ema:0.15`, a part of the training. Raises UserError for anything else."""
    from ldm.ema import std_to_exponent

    try:
        name, _, length = kind.partition(":")
        if name == "ema":
            std_to_exponent(float(length))
            return float(length)
    except ValueError:
        pass
    raise UserError(
        f"weights={kind}: expected ema, raw, or ema:0.15, an average of any length below 0.28 made of a run's snapshots"
    )


def posthoc_ema(folder: Path, sigma_rel: float) -> LoadedWeights:
    """The average of any length at the end of a run that kept averages of two (post-hoc EMA: EDM2, section 3.2).

    Raises UserError where there are none, or too few for this length.
    """
    from ldm.ema import posthoc_coefficients

    named = {path: path.stem.removeprefix("ema_").split("-") for path in sorted(folder.glob("ema_*-*.safetensors"))}
    if not named:
        raise UserError(
            f"weights=ema:{sigma_rel:g}: {folder.parent} holds no snapshots; train with training.snapshot_every=N, or choose ema"
        )
    kept = [(float(length), int(step)) for length, step in named.values()]
    last = max(step for _, step in kept)
    parts, off = posthoc_coefficients(kept, sigma_rel, last)
    if off > 0.1:
        said = f"the nearest that its {len(kept)} snapshots make is {off:.0%} off"
        raise UserError(
            f"weights=ema:{sigma_rel:g}: {said}, expected 10% or less; choose a length nearer to 0.05..0.1, or train with more"
        )
    found: dict[str, Any] = {}
    for part, path in zip(parts, named, strict=True):
        if abs(part) > 1e-9:  # a length that was kept is that file and no other
            for name, value in atomic.read_tensors(path).items():
                found[name] = found[name].add_(value, alpha=part) if name in found else value * part
    return LoadedWeights(path, found, atomic.read_metadata(path))

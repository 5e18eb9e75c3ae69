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
    """Return the sha256 (hex) of a model's state dict, that is of everything that a weights file may change."""
    from ldm.tensors import hash_state_dict

    return hash_state_dict(model.state_dict())


class LoadedWeights(NamedTuple):
    """Trained weights, the file they were read from, and that file's metadata."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str]


def load_weights_dict(run: str | Path, kind: str = "ema") -> dict[str, Any]:
    """Load the trained weights that `run` names, as a dict of tensors. Raises as `load_weights` does."""
    return load_weights(Path(run).expanduser(), find_run(run), kind).tensors


def load_weights(path: Path, folder: Path, kind: str = "ema") -> LoadedWeights:
    """Load trained weights of a run, to the CPU.

    path: a weights file or a step folder in the run, or the run folder for its final weights (its newest ones before it
    has ended).
    folder: the run folder.
    kind: ema, raw, or ema:0.15, a post-hoc EMA of that length.
    Raises UserError if there are none, CorruptFileError for a broken file.
    """
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
        reason = f"; {skipped[0][1]}" if skipped else ""
        remedy = "run train.py with its config to the first checkpoint"
        raise UserError(f"run={path}: no weights in it yet{reason}; {remedy}")
    return weights_from_checkpoint(step, kind)


def weights_from_file(path: Path) -> LoadedWeights:
    """Read a weights file. Raises CorruptFileError."""
    return LoadedWeights(path, atomic.read_tensors(path), atomic.read_metadata(path))


def weights_from_checkpoint(path: Path, kind: str) -> LoadedWeights:
    """Read the weights of a LatentDiffusion from a step folder. Raises CorruptFileError.

    The folder's `model` file holds the complete Lightning module, that is the model (prefix "model.") and its
    objective.
    """
    step = load_checkpoint(path)
    if kind == "ema":
        return LoadedWeights(path, step.tensors["ema"], step.metadata)
    model = {
        name.removeprefix("model."): value for name, value in step.tensors["model"].items() if name.startswith("model.")
    }
    return LoadedWeights(path, model, step.metadata)


def parse_ema_length(kind: str) -> float:
    """Return the length in `ema:0.15`, a fraction of the training. Raises UserError for any other text."""
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
    """Compute an EMA of any length at the end of a run from its snapshots of two EMAs (post-hoc EMA: EDM2, section
    3.2).

    folder: the run's `averages` folder.  sigma_rel: the length, relative to the training.
    Raises UserError if there are no snapshots, or too few for this length.
    """
    from ldm.ema import posthoc_coefficients

    snapshots = {path: path.stem.removeprefix("ema_").split("-") for path in sorted(folder.glob("ema_*-*.safetensors"))}
    if not snapshots:
        raise UserError(
            f"weights=ema:{sigma_rel:g}: {folder.parent} holds no snapshots; train with training.snapshot_every=N, "
            "or choose ema"
        )
    # the averages are over updates, of which there are fewer than steps if any was skipped
    lengths = [(float(name), int(atomic.read_metadata(path)["updates"])) for path, (name, _) in snapshots.items()]
    last = max(updates for _, updates in lengths)
    coefficients, error = posthoc_coefficients(lengths, sigma_rel, last)
    if error > 0.1:
        nearest = f"the nearest that its {len(lengths)} snapshots make is {error:.0%} off"
        raise UserError(
            f"weights=ema:{sigma_rel:g}: {nearest}, expected 10% or less; choose a length nearer to 0.05..0.1, "
            "or train with more"
        )
    average: dict[str, Any] = {}
    for coefficient, path in zip(coefficients, snapshots, strict=True):
        if abs(coefficient) > 1e-9:  # so that a length that was saved is read from its own file, exactly
            for name, value in atomic.read_tensors(path).items():
                if name in average:
                    average[name].add_(value, alpha=coefficient)
                else:
                    average[name] = value * coefficient
    return LoadedWeights(path, average, atomic.read_metadata(path))

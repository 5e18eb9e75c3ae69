"""Checkpoints: one folder per step with a manifest, written atomically and verified before it is loaded."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.io.atomic import (
    CorruptFileError,
    _num_bytes,
    _require_disk_space,
    _require_finite,
    _sync,
    _temporary_sibling,
    _write_safetensors,
    _write_tensor_file,
    file_sha256,
    read_metadata,
    read_tensors,
    remove_stale_temporaries,
)
from ldm.io.parse import parse_json

if TYPE_CHECKING:
    from torch import Tensor


MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path | str,
    step: int,
    tensors: "Mapping[str, Mapping[str, Tensor]]",
    state: Mapping[str, Any],
    config: str = "",
    keep: int = 2,
    metadata: Mapping[str, str] | None = None,
    spared: Callable[[int], bool] = lambda step: False,
) -> Path:
    """Write folder/step-00012000: <name>.safetensors per entry of tensors, train_state.pt, config.yaml, and last a
    manifest of sha256.

    state: tensors and plain values only (it is read back with weights_only=True).
    keep: number of newest steps to leave on the disk, at least 2, so that an older one remains if the newest turns out
    damaged; 0 for all.
    metadata: written into every safetensors file.  spared: step -> whether that older step is not to be removed.
    Raises UserError for weights that are not finite and OSError for a full disk, in both cases before anything is
    changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)
    for name, weights in tensors.items():
        _require_finite(weights, name)
    _require_disk_space(folder, sum(_num_bytes(value) for value in (*tensors.values(), state)))
    final = folder / f"step-{step:08d}"
    with _temporary_sibling(final) as temporary:
        temporary.mkdir()
        (temporary / "config.yaml").write_text(config, encoding="utf-8")
        _write_tensor_file(state, temporary / "train_state.pt")
        for name, weights in tensors.items():
            _write_safetensors(weights, temporary / f"{name}.safetensors", metadata)
        files = sorted(path.name for path in temporary.iterdir())
        for name in files:
            _sync(temporary / name)
        listed = {
            name: {"sha256": file_sha256(temporary / name), "bytes": (temporary / name).stat().st_size}
            for name in files
        }
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": listed}, indent=1))
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.exists():  # the same step again, after a resume from an older one
            os.replace(final, stale := folder / f".{final.name}.{os.getpid()}.old.tmp")
            os.replace(temporary, final)
            shutil.rmtree(stale)
        else:
            os.replace(temporary, final)
    _sync(folder)
    prune_checkpoints(folder, keep, spared)
    return final


def verify_checkpoint(step: Path | str) -> dict[str, Any]:
    """Verify every file of a step folder by its sha256 and return the manifest.

    Raises CorruptFileError naming the file and the defect.
    """
    step = Path(step)
    manifest = _read_manifest(step)
    for name, entry in manifest["files"].items():
        if file_sha256(step / name) != entry["sha256"]:
            raise CorruptFileError(f"{step / name} was changed: its sha256 is not the manifest's")
    return manifest


def _read_manifest(step: Path) -> dict[str, Any]:
    """Read the manifest of a step folder and check that all files have their sizes, without reading them.

    Raises CorruptFileError.
    """
    if not step.is_dir():
        raise CorruptFileError(f"{step} is not there")
    try:
        manifest = parse_json((step / MANIFEST).read_text())
        sizes = {
            name: int(entry["bytes"])
            for name, entry in manifest["files"].items()
            if str(entry["sha256"]) and int(manifest["step"]) >= 0
        }
    except FileNotFoundError:
        raise CorruptFileError(f"{step} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptFileError(f"{step / MANIFEST} is damaged") from None
    for name, size in sizes.items():
        if Path(name).name != name:
            raise CorruptFileError(f"{step / MANIFEST} names a file outside its folder: {name!r}")
        if not (step / name).is_file():
            raise CorruptFileError(f"{step / name} is missing")
        if (actual := (step / name).stat().st_size) != size:
            raise CorruptFileError(f"{step / name} has {actual} bytes, not {size}")
    return manifest


def list_checkpoints(folder: Path | str) -> list[Path]:
    """List the step folders in `folder`, newest first, including damaged ones."""
    return sorted(
        (path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)),
        key=checkpoint_step,
        reverse=True,
    )


def checkpoint_step(path: Path | str) -> int:
    """Return the step number in the name of a step folder."""
    return int(Path(path).name.removeprefix("step-"))


def latest_valid_checkpoint(
    folder: Path | str, before: int | None = None
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest step folder that verifies, or None, and each newer one that was skipped with the reason.

    before: consider only earlier steps.
    """
    skipped = []
    for step in list_checkpoints(folder):
        if before is not None and checkpoint_step(step) >= before:
            continue
        try:
            verify_checkpoint(step)
        except CorruptFileError as error:
            skipped.append((step, str(error)))
        else:
            return step, skipped
    return None, skipped


class Checkpoint(NamedTuple):
    """The contents of a step folder; metadata: that of its safetensors files."""

    step: int
    tensors: "dict[str, dict[str, Tensor]]"
    state: dict[str, Any]
    config: str
    metadata: dict[str, str]


def load_checkpoint(step: Path | str) -> Checkpoint:
    """Verify and load a step folder, to the CPU, unpickling nothing but tensors and plain values.

    Raises CorruptFileError.
    """
    import torch

    step = Path(step)
    manifest = verify_checkpoint(step)
    files = [name for name in manifest["files"] if name.endswith(".safetensors")]
    weights = {name.removesuffix(".safetensors"): read_tensors(step / name) for name in files}
    metadata = {key: value for name in files for key, value in read_metadata(step / name).items()}
    try:
        state = torch.load(step / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0][:80]
        raise CorruptFileError(
            f"{step / 'train_state.pt'} holds more than tensors and plain values, or is damaged ({reason})"
        ) from None
    return Checkpoint(manifest["step"], weights, state, (step / "config.yaml").read_text(encoding="utf-8"), metadata)


def prune_checkpoints(folder: Path | str, keep: int, spared: Callable[[int], bool] = lambda step: False) -> None:
    """Remove all steps but the newest `keep` (at least 2; 0 for all), the spared ones, and the newest two that are
    complete.
    """
    steps = list_checkpoints(folder)
    remaining = {step for step in steps if spared(checkpoint_step(step))}
    remaining |= set(steps[: max(2, keep)] if keep else steps)
    remaining |= set([step for step in steps if _is_complete(step)][:2])
    for step in steps:
        if step not in remaining:
            # renamed first, so that no partly removed folder has the name of a step
            os.replace(step, doomed := step.with_name(f".{step.name}.{os.getpid()}.gone.tmp"))
            shutil.rmtree(doomed)


def complete_steps(folder: Path | str) -> list[int]:
    """List the steps in `folder` whose files all have their sizes, newest first, without reading the files."""
    return [checkpoint_step(path) for path in list_checkpoints(folder) if _is_complete(path)]


def _is_complete(step: Path) -> bool:
    try:
        _read_manifest(step)
    except CorruptFileError:
        return False
    return True

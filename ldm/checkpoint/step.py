"""Checkpoints: step folders with a manifest, written atomically and verified before they are loaded."""

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
    """Write folder/step-00012000 with <name>.safetensors per entry of tensors, train_state.pt, config.yaml and last a manifest of sha256.

    state: tensors and plain values only (it is read back with weights_only=True).  keep: newest steps left on the disk, at least 2, so that
    one good older step outlives a newest one that turns out damaged; 0 keeps all.  metadata: goes into every safetensors file.
    spared: whether an older step stays all the same.
    Raises UserError for weights that are not finite, OSError for a disk too full, in both cases before anything was changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)
    for name, weights in tensors.items():
        _require_finite(weights, name)
    _require_disk_space(folder, sum(_num_bytes(one) for one in (*tensors.values(), state)))
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
    """The manifest of a step folder whose every file is what was written.  Raises CorruptFileError naming the file and what is wrong."""
    step = Path(step)
    manifest = _complete(step)
    for name, entry in manifest["files"].items():
        if file_sha256(step / name) != entry["sha256"]:
            raise CorruptFileError(f"{step / name} was changed: its sha256 is not the manifest's")
    return manifest


def _complete(step: Path) -> dict[str, Any]:
    """The manifest of a step folder whose files all have their sizes: what can be known without reading them."""
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
        if (there := (step / name).stat().st_size) != size:
            raise CorruptFileError(f"{step / name} has {there} bytes, not {size}")
    return manifest


def list_checkpoints(folder: Path | str) -> list[Path]:
    """The step folders in `folder`, newest first, damaged ones included."""
    return sorted(
        (path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)),
        key=checkpoint_step,
        reverse=True,
    )


def checkpoint_step(path: Path | str) -> int:
    """The step a step folder's name stands for."""
    return int(Path(path).name.removeprefix("step-"))


def latest_valid_checkpoint(
    folder: Path | str, before: int | None = None
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest step folder that verifies (None when there is none), and each newer one that was skipped with the reason.

    before: only those of earlier steps.
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
    """What a step folder holds; metadata: that of its safetensors files."""

    step: int
    tensors: "dict[str, dict[str, Tensor]]"
    state: dict[str, Any]
    config: str
    metadata: dict[str, str]


def load_checkpoint(step: Path | str) -> Checkpoint:
    """Verify and read a step folder, to the CPU, without unpickling anything but tensors and plain values.  Raises CorruptFileError."""
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
    """Remove all but the newest `keep` steps (at least 2; 0 keeps all) and those spared; never one of the newest two that are complete."""
    found = list_checkpoints(folder)
    kept = {step for step in found if spared(checkpoint_step(step))}
    kept |= set(found[: max(2, keep)] if keep else found) | set([step for step in found if _is_complete(step)][:2])
    for step in found:
        if step not in kept:
            os.replace(
                step, gone := step.with_name(f".{step.name}.{os.getpid()}.gone.tmp")
            )  # at once: no half of it keeps the name
            shutil.rmtree(gone)


def complete_steps(folder: Path | str) -> list[int]:
    """The steps in `folder` of which every file has its size, newest first; their contents are not read."""
    return [checkpoint_step(path) for path in list_checkpoints(folder) if _is_complete(path)]


def _is_complete(step: Path) -> bool:
    try:
        _complete(step)
    except CorruptFileError:
        return False
    return True

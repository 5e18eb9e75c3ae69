"""Files that are whole or absent: written beside, flushed to the disk, renamed; step folders that prove themselves before they are read."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.errors import UserError
from ldm.parse import json_of

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"


class DamagedError(UserError):
    """A file or step folder that is not what was written: the text names it, what is wrong and what to do."""


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the file `path` with data, all of it or nothing; folders are made.  Raises OSError naming the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    _sync(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """As write_bytes, a JSON text; raises ValueError for NaN and infinities, which are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path | str, state: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """As write_bytes, a safetensors file; raises ValueError naming the first tensor that is not finite."""
    path = Path(path)
    _finite(state, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    with _beside(path) as temporary:
        temporary.mkdir()  # a folder, so that sweep also clears what safetensors writes beside the file under a name of its own
        _pack(state, packed := temporary / path.name, metadata)
        _sync(packed)
        os.replace(packed, path)
    _sync(path.parent)


def read_tensors(path: Path | str) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, on the CPU.  Raises FileNotFoundError, or DamagedError naming the file and its size."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    data = path.read_bytes()
    try:
        return load(data)
    except SafetensorError as error:
        raise DamagedError(f"{path} ({len(data)} bytes) is not a whole safetensors file ({error}); fetch or write it again") from None


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.  Raises as read_tensors does."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        size = path.stat().st_size
        raise DamagedError(f"{path} ({size} bytes) is not a whole safetensors file ({error}); fetch or write it again") from None


def digest(*paths: Path | str, opener: Callable[..., Any] = open) -> str:
    """Compute the sha256 (hex) of what `opener` reads from files, one after the other; gzip.open reads what is inside."""
    total = hashlib.sha256()
    for path in paths:
        with opener(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def save_step(
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
    sweep(folder)
    for name, weights in tensors.items():
        _finite(weights, name)
    _room(folder, sum(_bytes(one) for one in (*tensors.values(), state)))
    final = folder / f"step-{step:08d}"
    with _beside(final) as temporary:
        temporary.mkdir()
        (temporary / "config.yaml").write_text(config, encoding="utf-8")
        _save(state, temporary / "train_state.pt")
        for name, weights in tensors.items():
            _pack(weights, temporary / f"{name}.safetensors", metadata)
        files = sorted(path.name for path in temporary.iterdir())
        for name in files:
            _sync(temporary / name)
        listed = {name: {"sha256": digest(temporary / name), "bytes": (temporary / name).stat().st_size} for name in files}
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
    prune(folder, keep, spared)
    return final


def verify(step: Path | str) -> dict[str, Any]:
    """The manifest of a step folder whose every file is what was written.  Raises DamagedError naming the file and what is wrong."""
    step = Path(step)
    manifest = _complete(step)
    for name, entry in manifest["files"].items():
        if digest(step / name) != entry["sha256"]:
            raise DamagedError(f"{step / name} was changed: its sha256 is not the manifest's")
    return manifest


def _complete(step: Path) -> dict[str, Any]:
    """The manifest of a step folder whose files all have their sizes: what can be known without reading them."""
    if not step.is_dir():
        raise DamagedError(f"{step} is not there")
    try:
        manifest = json_of((step / MANIFEST).read_text())
        sizes = {
            name: int(entry["bytes"]) for name, entry in manifest["files"].items() if str(entry["sha256"]) and int(manifest["step"]) >= 0
        }
    except FileNotFoundError:
        raise DamagedError(f"{step} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{step / MANIFEST} is damaged") from None
    for name, size in sizes.items():
        if Path(name).name != name:
            raise DamagedError(f"{step / MANIFEST} names a file outside its folder: {name!r}")
        if not (step / name).is_file():
            raise DamagedError(f"{step / name} is missing")
        if (there := (step / name).stat().st_size) != size:
            raise DamagedError(f"{step / name} has {there} bytes, not {size}")
    return manifest


def steps(folder: Path | str) -> list[Path]:
    """The step folders in `folder`, newest first, damaged ones included."""
    return sorted((path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of, reverse=True)


def step_of(path: Path | str) -> int:
    """The step a step folder's name stands for."""
    return int(Path(path).name.removeprefix("step-"))


def latest_valid(folder: Path | str, before: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest step folder that verifies (None when there is none), and each newer one that was skipped with the reason.

    before: only those of earlier steps.
    """
    skipped = []
    for step in steps(folder):
        if before is not None and step_of(step) >= before:
            continue
        try:
            verify(step)
        except DamagedError as error:
            skipped.append((step, str(error)))
        else:
            return step, skipped
    return None, skipped


class Step(NamedTuple):
    """What a step folder holds; metadata: that of its safetensors files."""

    step: int
    tensors: "dict[str, dict[str, Tensor]]"
    state: dict[str, Any]
    config: str
    metadata: dict[str, str]


def load_step(step: Path | str) -> Step:
    """Verify and read a step folder, to the CPU, without unpickling anything but tensors and plain values.  Raises DamagedError."""
    import torch

    step = Path(step)
    manifest = verify(step)
    files = [name for name in manifest["files"] if name.endswith(".safetensors")]
    weights = {name.removesuffix(".safetensors"): read_tensors(step / name) for name in files}
    metadata = {key: value for name in files for key, value in read_metadata(step / name).items()}
    try:
        state = torch.load(step / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0][:80]
        raise DamagedError(f"{step / 'train_state.pt'} holds more than tensors and plain values, or is damaged ({reason})") from None
    return Step(manifest["step"], weights, state, (step / "config.yaml").read_text(encoding="utf-8"), metadata)


def prune(folder: Path | str, keep: int, spared: Callable[[int], bool] = lambda step: False) -> None:
    """Remove all but the newest `keep` steps (at least 2; 0 keeps all) and those spared; never one of the newest two that are complete."""
    found = steps(folder)
    kept = {step for step in found if spared(step_of(step))}
    kept |= set(found[: max(2, keep)] if keep else found) | set([step for step in found if _is_complete(step)][:2])
    for step in found:
        if step not in kept:
            os.replace(step, gone := step.with_name(f".{step.name}.{os.getpid()}.gone.tmp"))  # at once: no half of it keeps the name
            shutil.rmtree(gone)


def complete_steps(folder: Path | str) -> list[int]:
    """The steps in `folder` of which every file has its size, newest first; their contents are not read."""
    return [step_of(path) for path in steps(folder) if _is_complete(path)]


def _is_complete(step: Path) -> bool:
    try:
        _complete(step)
    except DamagedError:
        return False
    return True


def sweep(folder: Path | str, name: str | None = None) -> list[Path]:
    """Clear away what writers that are gone left beside (`.name.<process>.tmp`), of one name or of all; returns what was found.

    A step that was being replaced by itself when its writer died gets its name back.
    """
    found = []
    for path in Path(folder).glob(".*.tmp"):
        left = re.fullmatch(r"\.(.+?)\.(\d+)(\.old|\.gone)?\.tmp", path.name)
        if left is None or name not in (None, left[1]) or _alive(int(left[2])):
            continue
        found.append(path)
        if left[3] == ".old" and not path.with_name(left[1]).exists():
            os.replace(path, path.with_name(left[1]))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return found


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, hence on the same file system, gone at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()  # our own leftover is from an earlier failure: writers remove theirs when they end


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save(state: Mapping[str, Any], path: Path) -> None:
    import torch

    torch.save(dict(state), path)


def _pack(state: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777  # which the umask gives; safetensors 0.8.0 replaces the file by one of mode 0600
    seen: set[int] = set()
    whole = {}
    for key, one in state.items():
        one = one.detach().cpu().contiguous()
        whole[key] = one.clone() if one.untyped_storage().data_ptr() in seen else one  # tied weights: safetensors takes no shared memory
        seen.add(whole[key].untyped_storage().data_ptr())
    save_file(whole, path, dict(metadata) if metadata else None)
    if path.stat().st_mode & 0o777 != mode:  # file systems without modes refuse to set one
        path.chmod(mode)


def _finite(state: "Mapping[str, Tensor]", name: str) -> None:
    for key, one in state.items():
        if one.is_floating_point() and not bool(one.isfinite().all()):
            bad = int((~one.isfinite()).sum())
            raise UserError(f"{name} {key}: {bad} of {one.numel()} values are not finite; nothing was written")


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested plain containers."""
    if hasattr(value, "element_size"):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        mib = 2**20
        raise OSError(
            28, f"no space for a checkpoint: {needed / mib:.0f} MiB (twice that to be safe), {free / mib:.0f} MiB free in {folder}"
        )

"""Files that are whole or absent: written beside, flushed to the disk, renamed; step folders that prove themselves before they are read."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class CorruptFileError(UserError):
    """A file or step folder that is not what was written: the text names it, what is wrong and what to do."""


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the file `path` with data, all of it or nothing; folders are made.  Raises OSError naming the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_sibling(path) as temporary:
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
    _require_finite(state, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(path.parent, path.name)
    with _temporary_sibling(path) as temporary:
        temporary.mkdir()  # a folder, so that sweep also clears what safetensors writes beside the file under a name of its own
        _write_safetensors(state, packed := temporary / path.name, metadata)
        _sync(packed)
        os.replace(packed, path)
    _sync(path.parent)


def read_tensors(path: Path | str) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, on the CPU.  Raises FileNotFoundError, or CorruptFileError naming the file and its size."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    data = path.read_bytes()
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} ({len(data)} bytes) is not a whole safetensors file ({error}); fetch or write it again"
        ) from None


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.  Raises as read_tensors does."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        size = path.stat().st_size
        raise CorruptFileError(
            f"{path} ({size} bytes) is not a whole safetensors file ({error}); fetch or write it again"
        ) from None


def file_sha256(*paths: Path | str, opener: Callable[..., Any] = open) -> str:
    """Compute the sha256 (hex) of what `opener` reads from files, one after the other; gzip.open reads what is inside."""
    total = hashlib.sha256()
    for path in paths:
        with opener(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def remove_stale_temporaries(folder: Path | str, name: str | None = None) -> list[Path]:
    """Clear away what writers that are gone left beside (`.name.<process>.tmp`), of one name or of all; returns what was found.

    A step that was being replaced by itself when its writer died gets its name back.
    """
    found = []
    for path in Path(folder).glob(".*.tmp"):
        left = re.fullmatch(r"\.(.+?)\.(\d+)(\.old|\.gone)?\.tmp", path.name)
        if left is None or name not in (None, left[1]) or _process_alive(int(left[2])):
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
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, hence on the same file system, gone at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _process_alive(process: int) -> bool:
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


def _write_tensor_file(state: Mapping[str, Any], path: Path) -> None:
    import torch

    torch.save(dict(state), path)


def _write_safetensors(state: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777  # which the umask gives; safetensors 0.8.0 replaces the file by one of mode 0600
    seen: set[int] = set()
    whole = {}
    for key, one in state.items():
        one = one.detach().cpu().contiguous()
        whole[key] = (
            one.clone() if one.untyped_storage().data_ptr() in seen else one
        )  # tied weights: safetensors takes no shared memory
        seen.add(whole[key].untyped_storage().data_ptr())
    save_file(whole, path, dict(metadata) if metadata else None)
    if path.stat().st_mode & 0o777 != mode:  # file systems without modes refuse to set one
        path.chmod(mode)


def _require_finite(state: "Mapping[str, Tensor]", name: str) -> None:
    for key, one in state.items():
        if one.is_floating_point() and not bool(one.isfinite().all()):
            bad = int((~one.isfinite()).sum())
            raise UserError(f"{name} {key}: {bad} of {one.numel()} values are not finite; nothing was written")


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested plain containers."""
    if hasattr(value, "element_size"):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


def _require_disk_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        mib = 2**20
        raise OSError(
            28,
            f"no space for a checkpoint: {needed / mib:.0f} MiB (twice that to be safe), {free / mib:.0f} MiB free in {folder}",
        )

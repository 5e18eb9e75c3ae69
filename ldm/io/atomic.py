"""Write files atomically: to a temporary name in the same folder, flushed to disk, then renamed."""

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
    """A file or checkpoint that is not as it was written; the message names it, what is wrong and what to do."""


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the file `path` with `data` atomically; creates its folder.  Raises OSError naming the path."""
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
    """Write text in UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON as `write_bytes` does.  Raises ValueError for NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path | str, state: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file as `write_bytes` does.  Raises UserError naming the first tensor that is not finite."""
    path = Path(path)
    _require_finite(state, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(path.parent, path.name)
    with _temporary_sibling(path) as temporary:
        temporary.mkdir()  # a folder, so that the temporary file of safetensors itself is cleaned up as well
        _write_safetensors(state, packed := temporary / path.name, metadata)
        _sync(packed)
        os.replace(packed, path)
    _sync(path.parent)


def read_tensors(path: Path | str) -> "dict[str, Tensor]":
    """Read the tensors of a safetensors file to the CPU.

    Raises FileNotFoundError, or CorruptFileError naming the file and its size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    data = path.read_bytes()
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} ({len(data)} bytes) is not a complete safetensors file ({error}); download or write it again"
        ) from None


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file, without its tensors.  Raises as `read_tensors` does."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        size = path.stat().st_size
        raise CorruptFileError(
            f"{path} ({size} bytes) is not a complete safetensors file ({error}); download or write it again"
        ) from None


def file_sha256(*paths: Path | str, opener: Callable[..., Any] = open) -> str:
    """Return the SHA-256 (hex) of what `opener` reads from the files, concatenated; gzip.open reads what is inside."""
    total = hashlib.sha256()
    for path in paths:
        with opener(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def remove_stale_temporaries(folder: Path | str, name: str | None = None) -> list[Path]:
    """Remove temporary files (`.name.<process>.tmp`) of processes that no longer run, and return their paths.

    name: only those of this file; default: all.
    A checkpoint that was being replaced when its writer died gets its name back.
    """
    removed = []
    for path in Path(folder).glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+?)\.(\d+)(\.old|\.gone)?\.tmp", path.name)
        if match is None or name not in (None, match[1]) or _process_alive(int(match[2])):
            continue
        removed.append(path)
        if match[3] == ".old" and not path.with_name(match[1]).exists():
            os.replace(path, path.with_name(match[1]))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return removed


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder, hence on the same file system; what is left of it is removed."""
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
    return process != os.getpid()  # a file of this process is left from an earlier failure: writers remove theirs


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
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
    mode = path.stat().st_mode & 0o777  # set by the umask; safetensors 0.8.0 replaces the file with one of mode 0600
    storages: set[int] = set()
    unshared = {}
    for key, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights are copied: safetensors does not accept shared memory.
        unshared[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(unshared[key].untyped_storage().data_ptr())
    save_file(unshared, path, dict(metadata) if metadata else None)
    if path.stat().st_mode & 0o777 != mode:  # some file systems do not support setting a mode
        path.chmod(mode)


def _require_finite(state: "Mapping[str, Tensor]", name: str) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UserError(f"{name} {key}: {bad} of {tensor.numel()} values are not finite; nothing was written")


def _num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested plain containers."""
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
            28,  # ENOSPC
            f"no space for a checkpoint: {needed / mib:.0f} MiB (twice that to be safe), "
            f"{free / mib:.0f} MiB free in {folder}",
        )

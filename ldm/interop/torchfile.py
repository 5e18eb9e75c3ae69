"""Read both file formats of torch.save; `PickleMachine` interprets their pickles, tensors are read on demand."""

import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.interop.safe_unpickler import PickleMachine, Storage, TensorRecord, require_str
from ldm.io.atomic import CorruptFileError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch before 1.6
FAULTS = (
    AttributeError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    OSError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    zipfile.BadZipFile,
    struct.error,
)


@dataclass(frozen=True)
class TorchFile:
    """A file's value, with each tensor as a TensorRecord, and a function that reads a storage's bytes."""

    tree: Any
    read: Callable[[Storage], bytearray]


def open_torch_file(path: Path) -> TorchFile:
    """Open a file of torch.save, of either format.

    Raises UserError for another kind of file, CorruptFileError naming the file and what is wrong.
    """
    try:
        return zipped(path) if zipfile.is_zipfile(path) else legacy(path)
    except UserError:
        raise
    except FAULTS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise CorruptFileError(
            f"{path} ({path.stat().st_size} bytes) is not a complete file of torch.save ({message:.120}); "
            "download or write it again"
        ) from None


def zipped(path: Path) -> TorchFile:
    """Open the format of torch 1.6 and later: a zip with data.pkl and one uncompressed record per storage."""
    archive = zipfile.ZipFile(path)  # stays open: `read` uses it later
    infos = archive.infolist()
    records = {info.filename.partition("/")[2]: info for info in infos}
    if "constants.pkl" in records:
        raise UserError(
            f"{path} is a TorchScript program, not weights; expected a state dict saved with torch.save or safetensors"
        )
    if (
        any(info.compress_type != zipfile.ZIP_STORED for info in infos)
        or sum(info.file_size for info in infos) > path.stat().st_size
    ):
        raise ValueError("it unpacks to more than its size, which torch never writes")
    if "data.pkl" not in records:
        raise UserError(f"{path} is a zip without data.pkl; expected weights saved with torch.save or safetensors")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise UserError(
            f"{path} was written on a big-endian machine; expected little-endian numbers: "
            "save it again with safetensors"
        )
    with archive.open(records["data.pkl"]) as file:
        tree = PickleMachine().run(file)

    def read(storage: Storage) -> bytearray:
        info = records[f"data/{storage.key}"]
        if info.file_size != storage.numel * storage.dtype.itemsize:
            raise ValueError(
                f"storage {storage.key} has {info.file_size} bytes, not {storage.numel * storage.dtype.itemsize}"
            )
        return bytearray(archive.read(info))  # read() verifies its checksum

    return TorchFile(tree, read)


def legacy(path: Path) -> TorchFile:
    """Open the format before torch 1.6: five consecutive pickles, then the count and bytes of each storage."""
    with open(path, "rb") as file:
        try:
            magic = PickleMachine().run(file)
        except FAULTS:
            magic = None
        if magic != MAGIC:
            raise UserError(
                f"{path} ({path.stat().st_size} bytes) {guess_file_kind(path)}; "
                "expected weights: .safetensors, or .ckpt/.pt/.bin of torch"
            )
        version, _, tree, keys = (PickleMachine().run(file) for _ in range(4))
        if version != 1001:
            raise ValueError(f"version {version}")
        start = file.tell()
    return TorchFile(tree, _LegacyStorages(path, start, [require_str(key) for key in keys], storages(tree)))


@dataclass
class _LegacyStorages:
    """Read the storages that follow a legacy file's pickles, in the order of `keys`."""

    path: Path
    start: int
    keys: list[str]
    known: Mapping[str, Storage]
    offsets: dict[str, int] = field(default_factory=dict)

    def __call__(self, storage: Storage) -> bytearray:
        if not self.offsets:
            self._index()
        offset, size = self.offsets[storage.key], storage.numel * storage.dtype.itemsize
        if offset + size > self.path.stat().st_size:
            raise ValueError(f"storage {storage.key} ends early")
        with open(self.path, "rb") as file:
            file.seek(offset)
            return bytearray(file.read(size))

    def _index(self) -> None:
        with open(self.path, "rb") as file:
            offset = self.start
            for key in self.keys:
                file.seek(offset)
                (count,) = struct.unpack("<q", file.read(8))
                if count != self.known[key].numel:
                    raise ValueError(f"storage {key} has {count} numbers, not {self.known[key].numel}")
                self.offsets[key] = offset + 8
                offset += 8 + count * self.known[key].dtype.itemsize


def storages(tree: Any) -> dict[str, Storage]:
    """Collect every storage in a tree by key; each container is visited once, however often it occurs."""
    result, visited, todo = {}, set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, TensorRecord):
            result[node.storage.key] = node.storage
        elif isinstance(node, dict | list | tuple) and id(node) not in visited:
            visited.add(id(node))
            todo.extend(node.values() if isinstance(node, dict) else node)
    return result


def guess_file_kind(path: Path) -> str:
    """Describe what a file that is not a checkpoint seems to be."""
    with open(path, "rb") as file:
        head = file.read(200)
    kinds = {
        b"version https://git-lfs": "is a Git LFS pointer, not the file it points to (git lfs pull downloads that)",
        b"<": "is a web page, as a refused download leaves",
        b"\x80": "is a pickle, but not of torch.save",
        b"\x93NUMPY": "is a numpy array",
        b"\x1f\x8b": "is gzipped (unpack it)",
    }
    if not head:
        return "is empty"
    return next((kind for start, kind in kinds.items() if head.lstrip().startswith(start)), "is of unknown kind")

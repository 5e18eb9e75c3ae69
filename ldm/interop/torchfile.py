"""The two file formats of torch.save: the pickle in them through our own machine, their numbers only when asked for."""

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
    """A file's value with each tensor as a Stored, and how its numbers are read."""

    tree: Any
    read: Callable[[Storage], bytearray]


def open_torch_file(path: Path) -> TorchFile:
    """A file of torch.save, of either format. Raises UserError for another kind of file, CorruptFileError naming the file and what is wrong."""
    try:
        return zipped(path) if zipfile.is_zipfile(path) else legacy(path)
    except UserError:
        raise
    except FAULTS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise CorruptFileError(
            f"{path} ({path.stat().st_size} bytes) is not a whole file of torch.save ({said:.120}); fetch or write it again"
        ) from None


def zipped(path: Path) -> TorchFile:
    """The format of torch 1.6 and later: a zip with data.pkl and one record a storage, none compressed."""
    archive = zipfile.ZipFile(path)  # open as long as anyone may still read from it
    infos = archive.infolist()
    records = {one.filename.partition("/")[2]: one for one in infos}
    if "constants.pkl" in records:
        raise UserError(
            f"{path} is a TorchScript program, not weights; expected a state dict saved with torch.save or safetensors"
        )
    if (
        any(one.compress_type != zipfile.ZIP_STORED for one in infos)
        or sum(one.file_size for one in infos) > path.stat().st_size
    ):
        raise ValueError("it unpacks to more than it is, which torch never writes")
    if "data.pkl" not in records:
        raise UserError(f"{path} is a zip without data.pkl; expected weights saved with torch.save or safetensors")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise UserError(
            f"{path} was written on a big-endian machine; expected little-endian numbers: save it again with safetensors"
        )
    with archive.open(records["data.pkl"]) as file:
        tree = PickleMachine().run(file)

    def read(storage: Storage) -> bytearray:
        info = records[f"data/{storage.key}"]
        if info.file_size != storage.numel * storage.dtype.itemsize:
            raise ValueError(
                f"storage {storage.key} has {info.file_size} bytes, not {storage.numel * storage.dtype.itemsize}"
            )
        return bytearray(archive.read(info))  # and its checksum is compared

    return TorchFile(tree, read)


def legacy(path: Path) -> TorchFile:
    """The format before torch 1.6: five pickles one after another, then each storage's count and bytes."""
    with open(path, "rb") as file:
        try:
            magic = PickleMachine().run(file)
        except FAULTS:
            magic = None
        if magic != MAGIC:
            raise UserError(
                f"{path} ({path.stat().st_size} bytes) {guess_file_kind(path)}; expected weights: .safetensors, or .ckpt/.pt/.bin of torch"
            )
        version, _, tree, keys = (PickleMachine().run(file) for _ in range(4))
        if version != 1001:
            raise ValueError(f"version {version}")
        place = file.tell()
    return TorchFile(tree, _Behind(path, place, [require_str(key) for key in keys], storages(tree)))


@dataclass
class _Behind:
    """The storages that lie behind a legacy file's pickles, in the order of keys."""

    path: Path
    start: int
    keys: list[str]
    known: Mapping[str, Storage]
    places: dict[str, int] = field(default_factory=dict)

    def __call__(self, storage: Storage) -> bytearray:
        if not self.places:
            self._find()
        place, size = self.places[storage.key], storage.numel * storage.dtype.itemsize
        if place + size > self.path.stat().st_size:
            raise ValueError(f"storage {storage.key} ends early")
        with open(self.path, "rb") as file:
            file.seek(place)
            return bytearray(file.read(size))

    def _find(self) -> None:
        with open(self.path, "rb") as file:
            place = self.start
            for key in self.keys:
                file.seek(place)
                (count,) = struct.unpack("<q", file.read(8))
                if count != self.known[key].numel:
                    raise ValueError(f"storage {key} has {count} numbers, not {self.known[key].numel}")
                self.places[key] = place + 8
                place += 8 + count * self.known[key].dtype.itemsize


def storages(tree: Any) -> dict[str, Storage]:
    """Every storage in a tree, by key; each container is looked into once, however often it is in the tree."""
    found, seen, todo = {}, set(), [tree]
    while todo:
        one = todo.pop()
        if isinstance(one, TensorRecord):
            found[one.storage.key] = one.storage
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            todo.extend(one.values() if isinstance(one, dict) else one)
    return found


def guess_file_kind(path: Path) -> str:
    """What a file that is no checkpoint seems to be."""
    with open(path, "rb") as file:
        head = file.read(200)
    begins = {
        b"version https://git-lfs": "is a Git LFS pointer, not the file it points to (git lfs pull fetches that)",
        b"<": "is a web page, as a download that was refused leaves",
        b"\x80": "is a pickle, but not one of torch.save",
        b"\x93NUMPY": "is a numpy array",
        b"\x1f\x8b": "is gzipped (unpack it)",
    }
    return (
        "is empty"
        if not head
        else next((said for start, said in begins.items() if head.lstrip().startswith(start)), "is of no known kind")
    )

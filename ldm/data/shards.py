"""Tar shards in webdataset's layout, indexed once and then read by offset, which gives random access to the samples."""

import io
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import Tensor

from ldm.data.captions import SHOWN, captions_in
from ldm.data.image_cache import cached
from ldm.data.lazy import LazyDataset, class_captions, split_rows
from ldm.errors import UserError
from ldm.io.download import cache_dir
from ldm.io.parse import parse_json
from ldm.tensors import derive_seed

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
MAX_MEMBER_BYTES = {"image": 1 << 30, "text": 1 << 20}  # members above these sizes are not read
INDEX = 2  # raise it when `build_index` changes its table, so that cached tables are not used
CLASSES = 1 << 20  # labels at or above it are errors
COLUMNS = ("key", "shard", "image", "image_bytes", "text", "text_bytes", "label")  # columns of the index; -1: none


class TarShardDataset(LazyDataset):
    """The samples of webdataset shards: consecutive files in a tar with one name and several extensions.

    path: a tar, a folder of tars, or a pattern with numbers, `train-{000..146}.tar`, of files or of URLs, which are
    downloaded once into the cache. An image's captions are the lines of its .txt, or "caption" in its .json; its label
    is the number in its .cls.
    names: a text file with the classes' names, one per line.
    test_fraction: fraction of the samples in the test split, chosen by each sample's name.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | Sequence[int] = 256,
        channels: int = 3,
        names: str | Path | None = None,
        test_fraction: float = 0.02,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        source = TarSource(tuple(local_path(shard) for shard in expand_pattern(str(path))), names, str(path))
        rows = split_rows(source.keys, test_fraction, split)
        super().__init__(f"{path} ({split})", source, rows, size, channels, content_hash, seed, flip)


class TarSource:
    """The source of TarShardDataset: tar files and an index of the samples' positions in them."""

    def __init__(self, paths: tuple[Path, ...], names: str | Path | None = None, root: str = ""):
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        self.paths, self.root, self.identity = paths, root, repr([(Path(name).name, *rest) for name, *rest in files])
        table, _ = cached("shards", (INDEX, files), lambda: (build_index(paths), {}))
        self.keys, self.table = table[:, 0].tolist(), table
        labels = int(table[:, COLUMNS.index("label")].max()) + 1
        bare = table[:, COLUMNS.index("text")] < 0
        self.captioned = not bool(bare.all())
        self.single_class = not labels and (names is None or not self.captioned)
        self.unlabelled = (table[:, COLUMNS.index("label")] < 0) & (not self.single_class)
        self.uncaptioned = bare if self.captioned or self.single_class else self.unlabelled
        if names is not None:
            text = Path(names).expanduser().read_text(encoding="utf-8")
            classes = [line.strip() for line in text.splitlines() if line.strip()]
            if len(classes) < labels:
                raise UserError(f"names={names}: {len(classes)} classes, but labels reach to {labels - 1}")
            self.classes = class_captions(classes)
        else:
            self.classes = class_captions([str(i) for i in range(labels)])
        if self.single_class:
            samples = [text for i in range(0, len(self), -(-len(self) // SHOWN)) for text in self.texts(i)]
            self.classes = {"image": list(dict.fromkeys(samples)) or [""]}

    def __len__(self) -> int:
        return len(self.table)

    def image(self, i: int) -> io.BytesIO:
        """Return the image's file."""
        return io.BytesIO(self._read(i, "image"))

    def texts(self, i: int) -> list[str]:
        """Return the sample's captions."""
        return lines_of(self._read(i, "text"))

    def label(self, i: int) -> int:
        """Return the sample's class, -1 without one."""
        return 0 if self.single_class else int(self.table[i, COLUMNS.index("label")])

    def name(self, i: int) -> str:
        """Return the image's location for messages."""
        return f"{self.paths[int(self.table[i, 1])]} at byte {int(self.table[i, 2])}"

    def _read(self, i: int, what: str) -> bytes:
        column = COLUMNS.index(what)
        shard, offset, size = (int(self.table[i, c]) for c in (1, column, column + 1))
        if size > MAX_MEMBER_BYTES[what]:
            raise ValueError(f"{what} of {size:,} bytes")
        return _open_shard(self.paths[shard], os.getpid()).read(size, offset) if size > 0 else b""


class _OpenFile:
    """A file that is open for reading as long as this object exists."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.descriptor, size, offset)


@lru_cache(maxsize=256)
def _open_shard(path: Path, process: int) -> _OpenFile:
    """Open a shard in this process; of many thousands the most recently read ones stay open."""
    return _OpenFile(path)


def expand_pattern(pattern: str) -> list[str]:
    """Return the shards that a path or pattern stands for, in order. Raises UserError without any."""
    ranged = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if ranged:
        before, low, high, after = ranged.groups()
        return [f"{before}{i:0{len(low)}d}{after}" for i in range(int(low), int(high) + 1)]
    path = Path(pattern).expanduser()
    if path.is_dir():
        shards = sorted(map(str, path.glob("*.tar")))
        if not shards:
            raise UserError(f"path={pattern}: no .tar in this folder; expected webdataset shards")
        return shards
    return [pattern]


def local_path(shard: str) -> Path:
    """Return the file of a shard; a URL is downloaded into the cache first. Raises UserError naming it."""
    if "://" not in shard:
        path = Path(shard).expanduser()
        if not path.is_file():
            raise UserError(
                f"path={shard}: no such file; expected a tar, a folder of tars, "
                f"or a pattern like train-{{000..146}}.tar"
            )
        return path
    from filelock import FileLock

    path = cache_dir() / "shards" / sha256(shard.encode()).hexdigest()[:16] / shard.rsplit("/", 1)[1].partition("?")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            partial_file = path.with_suffix(".part")
            try:
                with urlopen(shard, timeout=30) as response, open(partial_file, "wb") as file:
                    shutil.copyfileobj(response, file, 1 << 20)
            except OSError as error:
                raise UserError(f"path={shard}: cannot be fetched ({error})") from None
            os.replace(partial_file, path)
    return path


def build_index(paths: Sequence[Path]) -> Tensor:
    """Index the samples: (N, 7) int64, one row per sample with COLUMNS, in the shards' order.

    Raises UserError naming a damaged shard.
    """
    rows = []
    for shard, path in enumerate(paths):
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not Path(member.name).name.startswith(
                        "."
                    ):
                        stem, _, ending = member.name.rpartition("/")[2].partition(".")
                        parts = samples.setdefault(f"{member.name.rpartition('/')[0]}/{stem}", {})
                        parts[ending.lower()] = (member.offset_data, member.size)
            end = max((sum(part) for parts in samples.values() for part in parts.values()), default=0)
            if path.stat().st_size < -(-end // 512) * 512 + 512:  # a complete tar ends with an empty block
                raise tarfile.ReadError("cut short")
        # made-up headers raise any of these
        except (
            tarfile.TarError,
            ValueError,
            ArithmeticError,
            EOFError,
            RecursionError,
            struct.error,
        ) as error:
            raise UserError(f"path={path}: not a whole, uncompressed tar ({error})") from None
        file = _OpenFile(path)
        for name, parts in samples.items():
            image = next((parts[ending] for ending in IMAGES if ending in parts), None)
            if image is not None:
                rows.append(
                    [derive_seed("held out", name), shard, *image, *_text(file, parts), _label(path, file, parts)]
                )
    if not rows:
        raise UserError(
            f"path={paths[0]}: no image in {len(paths)} shards; "
            f"expected files like 000123.jpg beside 000123.txt or 000123.cls"
        )
    return torch.tensor(rows)


def lines_of(text: bytes) -> list[str]:
    """Parse captions: the lines of a .txt, or "caption" of a .json."""
    decoded = text.decode("utf-8", "replace")
    if not decoded.lstrip().startswith("{"):
        return [line for line in (" ".join(line.split()) for line in decoded.splitlines()) if line]
    try:
        return captions_in(parse_json(decoded).get("caption"))
    except ValueError:
        return []


def _text(file: _OpenFile, parts: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the position of a sample's captions, offset and bytes; (-1, -1) without any."""
    for ending in ("txt", "json"):
        offset, size = parts.get(ending, (-1, -1))
        if 0 < size <= MAX_MEMBER_BYTES["text"] and lines_of(file.read(size, offset)):
            return offset, size
    return -1, -1


def _label(path: Path, file: _OpenFile, parts: dict[str, tuple[int, int]]) -> int:
    """Return the number in a sample's .cls, -1 without one or if it is -1. Raises UserError for anything else."""
    if "cls" not in parts:
        return -1
    offset, size = parts["cls"]
    text = file.read(min(size, 20), offset).strip()
    if text == b"-1":
        return -1
    if not text.isdigit() or int(text) >= CLASSES:
        raise UserError(f"path={path}: a .cls holds {text!r}, not a number below {CLASSES:,}")
    return int(text)

"""Features of captions by a frozen text encoder: kept in memory, stored on disk, or computed for each batch."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from ldm.condition import Condition
from ldm.conditioner.tokens import TextEncoder
from ldm.errors import ConfigError
from ldm.io import atomic
from ldm.io.progress import ProgressBar

MAX_CACHE_VALUES = 1 << 28  # float32 values (1 GiB) of tokens that were not computed ahead; beyond it they are dropped
CAPTIONS_PER_FILE = 4096


class CaptionFeatures(Protocol):
    """The features of captions, at most `length` tokens each: the `cache` of a text conditioner.

    A plain object, not a module: nothing in it is to be trained, saved, averaged or sent between processes.
    """

    encoder: TextEncoder
    length: int

    def condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        """Return context (B, L, D), mask (B, L) and vector (B, V) of B captions, float32, on a device.

        L is the longest of the batch rounded up to a multiple of 8, at most `length`; padding is zero.
        """
        ...


class FeatureCache:
    """Features in memory: each caption is encoded once, ahead by `encode_all` or when it is first needed.

    context (T, D): the tokens of all captions, one after another; row 0 is zero and stands for padding.
    token_rows (N, length): for caption n, the rows of `context` with its tokens.  vector (N, V).
    ahead: number of captions that were encoded ahead; the others are dropped when they exceed MAX_CACHE_VALUES.
    """

    def __init__(self, encoder: TextEncoder, length: int):
        self.encoder, self.length, self.ahead = encoder, length, 0
        self.row: dict[str, int] = {}
        self.size: list[int] = []  # tokens of each caption; a list, so that no batch waits for the device
        self.used, self.used_ahead = 1, 1  # rows of context
        self.context = torch.zeros(1, encoder.context_dim)
        self.token_rows = torch.zeros(1, length, dtype=torch.int64)
        self.vector = torch.zeros(1, encoder.vector_dim)

    @torch.inference_mode(False)  # else tables created while sampling could not be written to in training
    @torch.no_grad()
    def condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        self.move(device)
        if (self.used - self.used_ahead) * self.encoder.context_dim > MAX_CACHE_VALUES:
            self.clear()
        for text in dict.fromkeys(captions):
            if text not in self.row:
                self.insert(text, *encode(self.encoder, text, self.length, device))
        rows = [self.row[text] for text in captions]
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        tokens = self.token_rows[index, : padded_length((self.size[row] for row in rows), self.length)]  # (B, L)
        return Condition(context=self.context[tokens], mask=tokens > 0, vector=self.vector[index])

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode_all(self, captions: Iterable[str], device: torch.device) -> None:
        """Encode captions before they are needed; the processes of a training share them out and exchange the results.

        All processes must call it with the same captions.
        """
        texts = list(dict.fromkeys(captions))
        joined = dist.is_available() and dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        share, bar = {}, ProgressBar("captions", len(texts[rank::ranks]), unit="captions")
        for text in texts[rank::ranks]:
            tokens, vector = encode(self.encoder, text, self.length, device)
            share[text] = (tokens.cpu(), vector.cpu()) if ranks > 1 else (tokens, vector)
            bar.update(len(share))
        shares: list[Any] = [share] * ranks
        if ranks > 1:
            dist.all_gather_object(shares, share)
        self.move(device)
        for position, text in enumerate(texts):
            if text not in self.row:
                self.insert(text, *(part.to(device) for part in shares[position % ranks][text]))
        self.ahead, self.used_ahead = len(self.size), self.used

    def insert(self, text: str, tokens: Tensor, vector: Tensor) -> None:
        """Append a caption with tokens (S, D) and vector (V,) to the tables."""
        row, size = len(self.size), len(tokens)
        self.context = grow(self.context, self.used + size)
        self.token_rows, self.vector = grow(self.token_rows, row + 1), grow(self.vector, row + 1)
        self.context[self.used : self.used + size] = tokens
        self.token_rows[row, :size] = torch.arange(self.used, self.used + size)
        self.vector[row] = vector
        self.row[text] = row
        self.size.append(size)
        self.used += size

    def clear(self) -> None:
        """Drop the captions that were not encoded ahead."""
        self.row = {text: row for text, row in self.row.items() if row < self.ahead}
        self.size, self.used = self.size[: self.ahead], self.used_ahead
        self.context = self.context[: self.used].clone()
        self.token_rows, self.vector = (table[: self.ahead].clone() for table in (self.token_rows, self.vector))

    def move(self, device: torch.device) -> None:
        """Move the tables to a device."""
        if self.context.device != device:
            self.context, self.token_rows, self.vector = (
                table.to(device) for table in (self.context, self.token_rows, self.vector)
            )


class OnlineFeatures:
    """Features computed for each batch, all captions of it at once; nothing is kept.

    They differ from those of a caption encoded alone by rounding.
    """

    def __init__(self, encoder: TextEncoder, length: int):
        self.encoder, self.length = encoder, length

    @torch.no_grad()
    def condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        row = {text: i for i, text in enumerate(dict.fromkeys(captions))}
        features = self.encoder.to(device)([*row] or [""], self.length)
        mask = features.mask
        extra = padded_length([mask.shape[1]], self.length) - mask.shape[1]
        context = pad(features.context.masked_fill(~mask[..., None], 0), (0, 0, 0, extra))
        vector = normalize(features.vector, dim=1) * self.encoder.vector_dim**0.5
        index = torch.tensor([row[text] for text in captions], dtype=torch.int64, device=device)
        return Condition(context=context[index], mask=pad(mask, (0, extra), value=False)[index], vector=vector[index])


class StoredFeatures:
    """Features in memory-mapped files, computed once for all runs and processes; of other captions as FeatureCache.

    folder: its subfolder that is named by encoder, tokenizer and captions has files of CAPTIONS_PER_FILE captions, each
    written atomically: a process that is killed leaves the complete ones to the next.  Processes that come at once
    share the files out.  A file that is not whole is written again.
    Raises ConfigError for an encoder without a `fingerprint`.
    """

    def __init__(self, encoder: TextEncoder, length: int, captions: Iterable[str], folder: Path):
        if not hasattr(encoder, "fingerprint"):
            name = type(encoder).__name__
            raise ConfigError(
                f"training.text_features=disk: {name} has no `fingerprint`, by which features are stored; "
                "choose memory or online"
            )
        self.encoder, self.length = encoder, length
        texts = sorted({*captions})
        starts = range(0, len(texts), CAPTIONS_PER_FILE)
        self.texts = [texts[start : start + CAPTIONS_PER_FILE] for start in starts]  # of each file
        self.location = {text: divmod(i, CAPTIONS_PER_FILE) for i, text in enumerate(texts)}  # file, row
        self.folder = folder / hash_texts([encoder.fingerprint, str(length), *texts])[:32]
        self.files: dict[int, FeatureFile] = {}  # open ones
        self.others = FeatureCache(encoder, length)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredFeatures":
        return self  # a copy would read the files into memory

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    @torch.no_grad()
    def write_missing(self, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        """Compute the files that are not there or not whole; each process begins at its own share.

        Returns when all files are there, whichever process wrote them.
        """
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        first = len(self.texts) * rank // ranks
        order = [*range(first, len(self.texts)), *range(first)]
        for timeout in (0, -1):  # those that nobody is writing, then those that another process was writing
            for number in order:
                path = self.path(number)
                if is_whole(path):
                    continue
                try:
                    with FileLock(path.with_suffix(".lock"), timeout=timeout):
                        if not is_whole(path):
                            self.write(number, device)
                except Timeout:
                    continue

    def write(self, number: int, device: torch.device) -> None:
        """Encode the captions of one file and write it."""
        tokens, vectors, texts = [], [], self.texts[number]
        bar = ProgressBar(f"captions {number + 1}/{len(self.texts)}", len(texts), unit="captions")
        for text in texts:
            context, vector = encode(self.encoder, text, self.length, device)
            tokens.append(context.cpu())
            vectors.append(vector.cpu())
            bar.update(len(tokens))
        state = {
            "context": torch.cat(tokens),
            "end": torch.tensor([len(one) for one in tokens]).cumsum(0),
            "vector": torch.stack(vectors),
            "checksum": torch.tensor([checksum(*one) for one in zip(tokens, vectors, strict=True)]),
        }
        atomic.write_tensors(self.path(number), state)

    @torch.inference_mode(False)
    @torch.no_grad()
    def condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        texts = list(dict.fromkeys(captions)) or [""]
        features = dict(self.read_all(texts, device))
        length = padded_length((len(tokens) for tokens, _ in features.values()), self.length)
        context = torch.stack([pad(features[text][0], (0, 0, 0, length - len(features[text][0]))) for text in texts])
        size = torch.tensor([len(features[text][0]) for text in texts])
        mask, vector = torch.arange(length) < size[:, None], torch.stack([features[text][1] for text in texts])
        row = {text: i for i, text in enumerate(texts)}
        index = torch.tensor([row[text] for text in captions], dtype=torch.int64)
        return Condition(context=context[index], mask=mask[index], vector=vector[index]).to(device)

    def read_all(self, texts: Iterable[str], device: torch.device) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yield each caption with its tokens (S, D) and vector (V,), on the CPU."""
        for text in texts:
            if text in self.location:
                number, row = self.location[text]
                if number not in self.files:
                    self.files[number] = FeatureFile(self.path(number))
                yield text, self.files[number].read(row)
            else:
                cond = self.others.condition([text], device)
                yield text, (cond.context[cond.mask].cpu(), cond.vector[0].cpu())  # type: ignore[index]


class FeatureFile:
    """One file of StoredFeatures, mapped from the disk; each caption is compared with its checksum when first read."""

    def __init__(self, path: Path):
        self.path, self.checked = path, set[int]()
        self.tensors = map_tensors(path)

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return tokens (S, D) and vector (V,) of a caption. Raises CorruptFileError naming the file."""
        start, end = (int(self.tensors["end"][i]) if i >= 0 else 0 for i in (row - 1, row))
        tokens, vector = self.tensors["context"][start:end], self.tensors["vector"][row]
        if row not in self.checked:
            if checksum(tokens, vector) != int(self.tensors["checksum"][row]):
                raise atomic.CorruptFileError(
                    f"{self.path} is damaged: caption {row} has another checksum; remove it, and it is computed again"
                )
            self.checked.add(row)
        return tokens, vector


@torch.no_grad()
def encode(encoder: TextEncoder, text: str, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Encode one text alone, so that its features are bit-identical whichever batch or process needs it first.

    Returns its tokens (S, D) and its vector (V,), scaled to norm sqrt(V).
    """
    features = encoder.to(device)([text], length)
    return features.context[features.mask], normalize(features.vector[0], dim=0) * encoder.vector_dim**0.5


def padded_length(sizes: Iterable[int], limit: int) -> int:
    """Return the length of a batch of captions of these sizes: a multiple of 8, or the limit."""
    return min(-(-max(sizes, default=1) // 8) * 8, limit)


def grow(table: Tensor, need: int) -> Tensor:
    """Return the table with at least `need` rows: at least doubled if it is too small, padded with zeros."""
    return (
        table
        if len(table) >= need
        else torch.cat([table, table.new_zeros(max(need - len(table), len(table)), *table.shape[1:])])
    )


def checksum(tokens: Tensor, vector: Tensor) -> int:
    """Return the CRC-32 of the bytes of a caption's features."""
    values: list[Any] = [part.contiguous().numpy() for part in (tokens, vector)]
    return zlib.crc32(values[1], zlib.crc32(values[0]))


def map_tensors(path: Path) -> Mapping[str, Tensor]:
    """Map the tensors of a safetensors file from the disk. Raises CorruptFileError naming the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except (SafetensorError, OSError) as error:
        raise atomic.CorruptFileError(
            f"{path} is not a whole file of features ({error}); the same command writes it again"
        ) from None


def is_whole(path: Path) -> bool:
    """Return whether a file of features is there, with all its bytes."""
    try:
        return path.is_file() and map_tensors(path).keys() >= {"context", "end", "vector", "checksum"}
    except atomic.CorruptFileError:
        return False


def hash_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of a sequence of texts."""
    digest = sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def text_caches(conditioner: nn.Module) -> list[CaptionFeatures]:
    """Return the features of all text encoders in a conditioner, each once."""
    caches: list[Any] = [getattr(module, "cache", None) for module in conditioner.modules()]
    return list(dict.fromkeys(cache for cache in caches if hasattr(cache, "encoder")))


def replace_caches(conditioner: nn.Module, make: Callable[[CaptionFeatures], CaptionFeatures]) -> None:
    """Replace the features of all text encoders in a conditioner by make(features), in place."""
    new = {cache: make(cache) for cache in text_caches(conditioner)}
    for module in conditioner.modules():
        if hasattr(getattr(module, "cache", None), "encoder"):
            module.cache = new[module.cache]  # type: ignore[assignment,index]


def most_bytes(features: CaptionFeatures, captions: int) -> int:
    """Return the bytes that the features of so many captions take at most: if each has `length` tokens."""
    return 4 * captions * (features.length * features.encoder.context_dim + features.encoder.vector_dim)

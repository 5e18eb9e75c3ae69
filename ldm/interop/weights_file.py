"""Read weights from safetensors, from both pickle formats of torch, and sharded folders, without executing anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import torchfile
from ldm.interop.safe_unpickler import Name, Stub, TensorRecord
from ldm.io.atomic import CorruptFileError
from ldm.io.parse import parse_json

NAMES = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
)  # of weights files in folders of diffusers or transformers
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
# Keys under which a training checkpoint has its weights.
INSIDE = {"ema": ("ema", "state_dict", "model"), "raw": ("state_dict", "model")}
WRAPPED = "module."  # prefix added by DistributedDataParallel


def read_weights(path: str | Path, kind: str = "ema") -> dict[str, Tensor]:
    """Read the tensors of a weights file or of a folder of them to the CPU, by name, in the file's dtypes.

    kind: "ema" or "raw", for a checkpoint that has both under these names (as those of DiT, SiT and LightningDiT).
    Raises UserError for a file without weights, CorruptFileError for a damaged one; both name it and what is wrong.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return shards(path, kind)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected weights: .safetensors, or .ckpt/.pt/.bin of torch")
    return read_safetensors(path) if is_safetensors(path) else read_pickle(path, kind)


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors, complete or not: an 8-byte length, then the beginning of a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.lstrip().startswith((b"<", b"version ")))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.  Raises CorruptFileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a mapping
    except SafetensorError as error:
        size = path.stat().st_size
        raise CorruptFileError(
            f"{path} ({size} bytes) is not a complete safetensors file ({error}); download or write it again"
        ) from None


def metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata in a safetensors file's header; {} for another kind of file.  Raises CorruptFileError."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file() or not is_safetensors(path):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is not a complete safetensors file ({error}); download or write it again"
        ) from None


def read_pickle(path: Path, kind: str) -> dict[str, Tensor]:
    """Read the weights in a file of torch.save.  Raises UserError or CorruptFileError."""
    file = torchfile.open_torch_file(path)
    tree = find_state_dict(file.tree, kind, path)
    data: dict[str, bytearray] = {}
    state = {}
    try:
        for name, record in tree.items():
            if record.storage.key not in data:
                data[record.storage.key] = file.read(record.storage)
            state[name] = record.view(data[record.storage.key])
    except torchfile.FAULTS as error:
        raise CorruptFileError(f"{path}: {name} is incomplete ({error}); download or write the file again") from None
    return state


def find_state_dict(tree: Any, kind: str, path: Path) -> Mapping[str, TensorRecord]:
    """Return the state dict in a checkpoint's tree.  Raises UserError if there is none, or if not all are tensors."""
    if kind not in INSIDE:
        raise UserError(f"weights={kind}: expected ema or raw")
    if isinstance(tree, Mapping):
        tree = next((tree[name] for name in INSIDE[kind] if isinstance(tree.get(name), Mapping)), tree)
    if not isinstance(tree, Mapping) or not any(isinstance(one, TensorRecord) for one in tree.values()):
        raise UserError(
            f"{path} contains no state dict of tensors; "
            f"expected one at the top level or under {', '.join(INSIDE[kind])}"
        )
    for name, one in tree.items():
        if not isinstance(name, str) or not isinstance(one, TensorRecord):
            raise UserError(f"{path}: {name!s:.80} is {kind_of(one)}, not a plain tensor; save the state dict alone")
    bare = all(name.startswith(WRAPPED) for name in tree)
    return {name.removeprefix(WRAPPED): one for name, one in tree.items()} if bare else tree


def kind_of(value: Any) -> str:
    """Describe the type of a value in a tree."""
    return f"a {value.path}" if isinstance(value, Stub | Name) else f"a {type(value).__name__}"


def shards(folder: Path, kind: str) -> dict[str, Tensor]:
    """Read the weights in a folder of diffusers or transformers: one file, or an index and its shards.

    Raises UserError.
    """
    candidates = [folder / f"{name}{ending}" for ending in ENDINGS for name in NAMES]
    for file in candidates:
        if file.is_file():
            return read_weights(file, kind)
        index = file.with_name(f"{file.name}.index.json")
        if index.is_file():
            return of_index(index, kind)
    raise UserError(
        f"{folder}: no weights in it; expected {candidates[0].name}, {NAMES[1]}.safetensors, "
        "or such a file's .index.json"
    )


def of_index(index: Path, kind: str) -> dict[str, Tensor]:
    """Read the weights that an index of shards lists.  Raises UserError or CorruptFileError."""
    try:
        shard_of = dict(parse_json(index.read_text(encoding="utf-8"))["weight_map"])
        files = {str(name) for name in shard_of.values()}
    except (ValueError, KeyError, TypeError):
        raise CorruptFileError(
            f"{index} is not an index of shards (a JSON object with weight_map); download it again"
        ) from None
    if outside := [name for name in files if Path(name).name != name]:
        raise CorruptFileError(f"{index} names a file outside its folder: {outside[0]!r}")
    state: dict[str, Tensor] = {}
    for name in sorted(files):
        state |= read_weights(index.parent / name, kind)
    if different := sorted(state.keys() ^ shard_of.keys()):
        raise CorruptFileError(
            f"{index} and its {len(files)} files differ in {len(different)} names, the first is {different[0]}"
        )
    return state

"""Each data set of conf/data on the disk in a small version, with the arrays that its files were written from."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.memory import InMemoryDataset

SIZE, NUM, CLASSES = 16, 24, 3
CAPTIONS = [f"picture {i}" for i in range(NUM)]
LABELS = [i % CLASSES for i in range(NUM)]


@dataclass(frozen=True)
class Source:
    """A data set on the disk.

    overrides: of train.py.  images (N, C, H, W) uint8, labels (N,), captions {class: texts} and texts of each sample,
    or None: what its files hold, of its training split.
    """

    overrides: tuple[str, ...]
    images: Tensor
    labels: Tensor
    captions: dict[str, list[str]]
    texts: list[list[str]] | None = None

    def in_memory(self, seed: int = 0, flip: bool = True) -> InMemoryDataset:
        """Return the same samples as an InMemoryDataset."""
        return InMemoryDataset("memory", self.images, self.labels, self.captions, seed, flip, texts=self.texts)


def noise(num: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    """Return images (N, H, W, C) uint8, drawn at random."""
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, channels), dtype=np.uint8)


def to_tensor(images: np.ndarray) -> Tensor:
    """Return images (N, H, W, C) as (N, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def encode(image: np.ndarray) -> bytes:
    """Return an image (H, W, C) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], mode: str = "w") -> None:
    """Write a tar archive of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def templates(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the captions that ldm.data.captions makes of class names."""
    return {name: [name, f"a photo of {name}", f"a picture of {name}"] for name in names}


def captioned(kind: str, path: Path, *more: str, images: np.ndarray) -> Source:
    """Return a source whose samples have a caption each and no class."""
    texts = [[caption] for caption in CAPTIONS]
    words = (f"data={kind}", f"data.path={path}", f"data.size={SIZE}", "data.test_fraction=0", *more)
    return Source(words, to_tensor(images), torch.zeros(NUM, dtype=torch.long), {"image": CAPTIONS}, texts)


def make_folder(root: Path) -> Source:
    images = noise(NUM, 3, SIZE)
    for i, image in enumerate(images):
        write(root / f"{i:04d}.png", encode(image))
        write(root / f"{i:04d}.txt", CAPTIONS[i].encode())
    return captioned("folder", root, "data.channels=3", images=images)


def make_buckets(root: Path) -> Source:
    folder = make_folder(root)
    return Source(("data=buckets", *folder.overrides[1:]), folder.images, folder.labels, folder.captions, folder.texts)


def make_huggingface(root: Path) -> Source:
    import datasets

    images = noise(NUM, 3, SIZE)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    cells = [{"bytes": encode(image), "path": None} for image in images]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"image": cells, "text": CAPTIONS}, features=features).save_to_disk(str(root))
    return captioned("huggingface", root, images=images)


def make_webdataset(root: Path) -> Source:
    images = noise(NUM, 3, SIZE)
    files = [(f"{i:04d}.png", encode(image)) for i, image in enumerate(images)]
    files += [(f"{i:04d}.txt", caption.encode()) for i, caption in enumerate(CAPTIONS)]
    write_tar(root / "x-000.tar", sorted(files))
    return captioned("webdataset", root, images=images)


def make_imagenet(root: Path) -> Source:
    images, names = noise(NUM, 3, SIZE), [f"n{k}" for k in range(CLASSES)]
    order = sorted(range(NUM), key=lambda i: (LABELS[i], i))
    for i in range(NUM):
        for split in ("train", "val"):
            write(root / split / names[LABELS[i]] / f"{i:04d}.JPEG", encode(images[i]))
    words = ("data=imagenet", f"data.path={root}", f"data.size={SIZE}")
    return Source(words, to_tensor(images[order]), torch.tensor(LABELS)[order], templates(names))


def make_lsun(root: Path) -> Source:
    images = noise(NUM, 3, SIZE)
    for i, image in enumerate(images):
        for split in ("train", "val"):
            write(root / f"church_outdoor_{split}" / f"{i:04d}.webp", encode(image))
    words, texts = (
        ("data=lsun", f"data.path={root}", f"data.size={SIZE}"),
        templates(["church outdoor"])["church outdoor"],
    )
    return Source(words, to_tensor(images), torch.zeros(NUM, dtype=torch.long), {"church_outdoor": texts})


def make_coco(root: Path) -> Source:
    images, texts = noise(NUM, 3, SIZE), [[caption, f"{caption} again"] for caption in CAPTIONS]
    for split in ("train", "val"):
        for i, image in enumerate(images):
            write(root / f"{split}2017" / f"{i:012d}.jpg", encode(image))
        content = {
            "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(NUM)],
            "annotations": [{"image_id": i, "caption": text} for i in range(NUM) for text in texts[i]],
        }
        write(root / "annotations" / f"captions_{split}2017.json", json.dumps(content).encode())
    words = ("data=coco", f"data.path={root}", f"data.size={SIZE}")
    captions = {"image": [first for first, _ in texts]}
    return Source(words, to_tensor(images), torch.zeros(NUM, dtype=torch.long), captions, texts)


def make_fashion_mnist(root: Path) -> Source:
    from ldm.data.fashion_mnist import CAPTIONS as FILE
    from ldm.data.fashion_mnist import FILES

    images, labels = noise(NUM, 1, 28), np.array(LABELS, np.uint8)
    for name in FILES.values():
        for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            write(root / f"{name}-{kind}-ubyte.gz", gzip.compress(head + array.tobytes()))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return Source(("data=fashion_mnist",), to_tensor(padded), torch.tensor(LABELS), json.loads(FILE.read_text()))


def make_cifar10(root: Path) -> Source:
    from ldm.data.cifar10 import CAPTIONS as FILE
    from ldm.data.cifar10 import SPLITS

    images = noise(NUM, 3, 32)
    rows = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in zip(LABELS, images, strict=True)]
    names = [name for names in SPLITS.values() for name in names]
    for at, name in enumerate(names):
        write(root / name, b"".join(rows[at * 4 : at * 4 + 4] if name in SPLITS["train"] else rows[:4]))
    num = 4 * len(SPLITS["train"])
    words = ("data=cifar10", f"data.root={root}")
    return Source(words, to_tensor(images[:num]), torch.tensor(LABELS[:num]), json.loads(FILE.read_text()))


def make_blue_marble(root: Path) -> Source:
    from ldm.data.blue_marble import CAPTIONS as FILE

    root.mkdir(parents=True)
    relief, mask = np.empty((90, 180, 3), np.uint8), np.zeros((2160, 4320), np.uint8)
    relief[:] = (14, 133, 249)  # 4,500 m deep: every tile is ocean
    Image.fromarray(noise(1, 3, 180)[0, :90]).save(root / "bmng.jpg", quality=100, subsampling=0)
    Image.fromarray(relief).save(root / "etopo1.jpg", quality=100, subsampling=0)
    (root / "lsmask_5min_f.bin").write_bytes(gzip.compress(mask.tobytes(), 1))
    earth = np.array(Image.open(root / "bmng.jpg"))
    low, high = ((degrees + 180) / 2 for degrees in (60.0, 100.0))  # the band of the test split, in pixels
    corners = [
        (y, x) for y in range(0, 90 - SIZE + 1, SIZE) for x in range(0, 180 - SIZE + 1, SIZE)
        if x + SIZE <= low or x >= high
    ]  # fmt: skip
    images = np.stack([earth[y : y + SIZE, x : x + SIZE] for y, x in corners])
    words = ("data=blue_marble", f"data.root={root}", f"data.size={SIZE}")
    return Source(words, to_tensor(images), torch.zeros(len(images), dtype=torch.long), json.loads(FILE.read_text()))


def make_emoji(root: Path) -> Source:
    from ldm.data.emoji import TEMPLATES
    from ldm.data.glyphs import GROUPS
    from ldm.tensors import derive_seed

    names = [f"1F4{i:02X}" for i in range(NUM)]
    rows = [
        {"hexcode": name, "annotation": f"thing {i}", "tags": "", "group": GROUPS[i % 9], "emoji": "x",
         "skintone": "", "skintone_base_hexcode": ""}
        for i, name in enumerate(names)
    ]  # fmt: skip
    pictures = noise(NUM, 3, SIZE)
    write_tar(root / "openmoji.tgz", [("package/data/openmoji.json", json.dumps(rows).encode())], "w:gz")
    files = [
        (f"package/assets/{name.lower()}.webp", encode(picture)) for name, picture in zip(names, pictures, strict=True)
    ]
    write_tar(root / "fluent.tgz", files, "w:gz")
    train = [i for i, name in enumerate(names) if derive_seed("held out", name) >= 0.1 * 2**63]
    texts = [[text.format(f"thing {i}") for text in TEMPLATES["3d"]] for i in train]
    labels = [i % 9 for i in train]
    captions = {
        group: [texts[j][0] for j, label in enumerate(labels) if label == k] or [group.replace("-", " and ")]
        for k, group in enumerate(GROUPS)
    }
    words = ("data=emoji", f"data.size={SIZE}", "data.styles=[3d]")
    return Source(words, to_tensor(pictures[train]), torch.tensor(labels), captions, texts)


def make_synthetic(root: Path) -> Source:
    from ldm.data.synthetic import Synthetic

    data = Synthetic(num=NUM, size=SIZE)
    captions = dict(zip(data.classes, data.captions, strict=True))
    return Source(("data=synthetic", f"data.num={NUM}", f"data.size={SIZE}"), data.images, data.labels, captions)


MAKERS: dict[str, Callable[[Path], Source]] = {
    name.removeprefix("make_"): make for name, make in dict(globals()).items() if name.startswith("make_")
}


def make_all(root: Path) -> dict[str, Source]:
    """Write every data set below `root`, and what `replace_downloads` needs; return them by their options."""
    return {name: make(root / name) for name, make in MAKERS.items()}


def replace_downloads(root: Path, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let the data sets that are downloaded read those below `root` instead.  patch: setattr, or a test's."""
    from ldm.data import blue_marble, cifar10, fashion_mnist, glyphs

    def hashes(name: str) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (root / name).iterdir()}

    patch(blue_marble, "FILES", hashes("blue_marble"))
    patch(cifar10, "FILES", hashes("cifar10"))
    patch(fashion_mnist, "fashion_mnist", lambda _: root / "fashion_mnist")
    patch(glyphs, "openmoji", lambda: root / "emoji" / "openmoji.tgz")
    patch(glyphs, "fluent_archive", lambda: root / "emoji" / "fluent.tgz")

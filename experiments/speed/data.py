"""A folder of photographs as a training reads it: packed once and mapped, beside PIL and torchvision, who decode each
image each time.
"""

import os
import tempfile
from collections import deque
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pairs import Way, Work, keep, paired, told
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import __version__, datasets, transforms

from ldm.data.decode import load_rectangle
from ldm.data.folder import ImageFolder
from ldm.data.stream import BatchDataset, BatchStream

SIZE, BATCH, ENDLESS = 64, 256, 1 << 30
PHOTOGRAPH, LARGE = (400, 300), (1600, 1200)  # width and height: of those in the folder, and of one as a camera has it


def photograph(path: Path, size: tuple[int, int], seed: int) -> None:
    """Write a JPEG with something at every scale."""
    draw = np.random.default_rng(seed)
    image = np.zeros((size[1], size[0], 3))
    for scale in (4, 16, 64):
        coarse = (
            draw.normal(128, 24 * scale**0.25, (size[1] // scale + 2, size[0] // scale + 2, 3))
            .clip(0, 255)
            .astype(np.uint8)
        )
        image += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) / 3
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path, quality=90)


def theirs_of(folder: Path, workers: int) -> Way:
    """A pass as torchvision's examples read it, whole batches alone."""
    usual = [
        transforms.Resize(SIZE),
        transforms.CenterCrop(SIZE),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    data = datasets.ImageFolder(str(folder), transforms.Compose(usual))
    loader = DataLoader(data, min(BATCH, len(data)), shuffle=True, drop_last=True, num_workers=workers)
    return lambda: deque(loader, maxlen=0)


def ours_of(data: ImageFolder) -> Way:
    """A pass as ldm.training.fit reads it, as many batches."""
    batch = min(BATCH, len(data))
    batches = iter(DataLoader(BatchDataset(data), sampler=BatchStream(len(data), batch, ENDLESS), batch_size=None))
    return lambda: deque(islice(batches, len(data) // batch), maxlen=0)


def decoded(path: Path) -> Tensor:
    """An image (3, SIZE, SIZE) uint8 as torchvision's examples have it."""
    with Image.open(path) as file:
        image = transforms.CenterCrop(SIZE)(transforms.Resize(SIZE)(file.convert("RGB")))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def apart(a: Tensor, b: Tensor) -> str:
    """How far two pictures, or batches of them, in 0..255 are."""
    difference = (a.float() - b.float()).abs()
    return f"{float(difference.mean()):.1f} grey levels on average (Lanczos, bilinear)"


def measure(pairs: int, threads: int, images: int = 2000) -> None:
    """A pass over a packed folder; one photograph decoded."""
    peer = f"torchvision {__version__}, PIL"
    with tempfile.TemporaryDirectory() as place:
        os.environ["LDM_CACHE"] = str(Path(place, "cache"))
        for i in range(images):
            photograph(Path(place, "images", "ab"[i % 2], f"{i:06d}.jpg"), PHOTOGRAPH, i)
        data = ImageFolder(Path(place, "images"), size=SIZE, channels=3, test_fraction=0, flip=False)
        once = torch.stack([load_rectangle(data.root / file.name, SIZE, SIZE, 3)[0] for file in data.files[:16]])
        if not torch.equal(data.pixels(range(len(once))), once.float() / 127.5 - 1):
            raise AssertionError("packed images are not those decoded one by one")
        workers = threads if threads > 1 else 0
        ways = ours_of(data), theirs_of(Path(place, "images"), workers)
        near = apart(once, torch.stack([decoded(data.root / file.name) for file in data.files[: len(once)]]))
        setting = f"a pass over {images:,} JPEGs of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]} at {SIZE} px, batches of {min(BATCH, images)}"
        work = Work("packed folder", setting, f"{peer}, DataLoader, {workers} workers")
        keep(told(work, threads, *paired(*ways, pairs), f"to one's own decoding exactly, to theirs {near}"))
        large = Path(place, "large.jpg")
        photograph(large, LARGE, 0)
        ours, theirs = partial(load_rectangle, large, SIZE, SIZE, 3), partial(decoded, large)
        setting = f"JPEG of {LARGE[0]}x{LARGE[1]} to {SIZE} px"
        keep(told(Work("decoding", setting, peer), threads, *paired(ours, theirs, pairs), apart(ours()[0], theirs())))


if __name__ == "__main__":
    measure(5, torch.get_num_threads())

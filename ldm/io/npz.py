"""Image batches and feature statistics in .npz files, in the layout of ADM's evaluator (guided-diffusion)."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class Moments(NamedTuple):
    """A mean (D,) and a covariance (D, D), in float64."""

    mu: "Tensor"
    sigma: "Tensor"


@dataclass(frozen=True)
class NpzImages:
    """An npz of images of shape (N, H, W, 3), which are read in batches.  Raises UserError naming the file."""

    path: Path
    shape: tuple[int, ...]
    names: Sequence[str]

    @classmethod
    def open(cls, path: str | Path) -> "NpzImages":
        """Open a file and check the names, shape and dtype of its arrays."""
        path = Path(path).expanduser()
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" not in names:
                    raise UserError(f"{path} contains {', '.join(names) or 'nothing'}: expected arr_0, the images")
                with archive.open("arr_0.npy") as file:
                    shape, fortran, dtype = read_npy_header(file)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected an .npz of images") from None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read as an .npz ({error}); copy it again") from None
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {dtype} {shape}, expected images uint8 (N, height, width, 3)")
        if shape[0] < 4:
            raise UserError(
                f"{path}: arr_0 has {shape[0]} images, expected at least 4 (k = 3 neighbours), "
                "and 50,000 to compare with papers"
            )
        return cls(path, shape, names)

    def iter_batches(self, size: int) -> "Iterator[Tensor]":
        """Yield the images in order as (B, 3, H, W) uint8, B <= size.  Raises UserError if the file ends early."""
        import torch

        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            read_npy_header(file)
            image_bytes = int(np.prod(self.shape[1:]))
            for start in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                try:
                    read = bytearray(file.read(count * image_bytes))
                except (zipfile.BadZipFile, EOFError) as error:
                    raise UserError(f"{self.path} is damaged after {start} images ({error}); copy it again") from None
                if len(read) < count * image_bytes:
                    raise UserError(
                        f"{self.path} ends after {start + len(read) // image_bytes} of {self.shape[0]} images; "
                        "copy it again"
                    )
                yield torch.frombuffer(read, dtype=torch.uint8).view(count, *self.shape[1:]).permute(0, 3, 1, 2)

    def statistics(self, pooled: int, spatial: int) -> tuple[Moments, Moments] | None:
        """Return the statistics stored in the file, of pooled and of spatial features, or None if it has none.

        pooled, spatial: their dimensions.  Raises UserError for statistics of other features.
        """
        import torch

        if "mu" not in self.names:
            return None
        if missing := [name for name in STATISTICS if name not in self.names]:
            raise UserError(
                f"{self.path} has mu, but no {', '.join(missing)}: expected {', '.join(STATISTICS)}, or none of them"
            )
        with np.load(self.path, allow_pickle=False) as file:
            mu, sigma, mu_s, sigma_s = (torch.as_tensor(np.asarray(file[name], np.float64)) for name in STATISTICS)
        for name, value, shape in (
            *(("mu", mu, (pooled,)), ("sigma", sigma, (pooled, pooled))),
            *(("mu_s", mu_s, (spatial,)), ("sigma_s", sigma_s, (spatial, spatial))),
        ):
            if value.shape != shape or not value.isfinite().all():
                raise UserError(
                    f"{self.path}: {name} is {tuple(value.shape)}, expected {shape}, all finite: "
                    "statistics of the same features"
                )
        return Moments(mu, sigma), Moments(mu_s, sigma_s)


def read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype of an open .npy, which is left at its data.  Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy version {version}")
    return read[version](file)


def write_npz(path: Path, images: "Mapping[int, Tensor]", shape: tuple[int, int, int]) -> None:
    """Write images of all ranks, row -> (C, H, W) uint8, as arr_0 (N, H, W, 3) of an npz; grey is repeated.

    shape: N, H, W.  As `write_rows`.
    """
    rows = {row: image.permute(1, 2, 0).numpy() for row, image in images.items()}  # (H, W, 1) is repeated by numpy
    write_rows(path, "arr_0", rows, (*shape, 3), "uint8")


def write_rows(path: Path, name: str, rows: Mapping[int, np.ndarray], shape: tuple[int, ...], dtype: str) -> None:
    """Write rows of all ranks, row -> array, as the array `name` of an npz.

    shape: N and the shape of a row.  Every rank calls this with its share of the rows 0..N-1; all ranks see the same
    folder.
    """
    import torch.distributed as dist

    def barrier() -> bool:
        """Wait for all ranks and return whether this one writes the file."""
        if not (dist.is_available() and dist.is_initialized()):
            return True
        dist.barrier()
        return dist.get_rank() == 0

    array_file = path.with_name(f".{path.stem}.npy")
    if barrier():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(array_file, "w+", np.dtype(dtype), shape)
    barrier()
    written = np.lib.format.open_memmap(array_file, "r+")
    for row, value in rows.items():
        written[row] = value
    written.flush()
    if barrier():
        temporary = path.with_name(f".{path.name}.tmp")
        with zipfile.ZipFile(temporary, "w") as archive:
            archive.write(array_file, f"{name}.npy")
        temporary.replace(path)
        array_file.unlink()

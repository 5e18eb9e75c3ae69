"""ADM's evaluation, as papers use it: python -m ldm.adm REFERENCE.npz SAMPLES.npz [key=value ...]

  REFERENCE.npz   a reference batch such as VIRTUAL_imagenet256_labeled.npz: arr_0, images uint8 (N, H, W, 3), and the statistics of the
                  whole training set, mu, sigma (of pool3), mu_s, sigma_s (of the spatial features); without them, those of arr_0
  SAMPLES.npz     arr_0 alone is needed: sample.py run=RUN num=50000 save=npz writes it
  weights=FILE    Inception's, by default from the cache, $LDM_INCEPTION or torch-fidelity's release
  batch_size=64   images at a time
  out=FILE        the numbers with their protocol, by default SAMPLES.json

FID and sFID are taken to the reference's statistics, precision and recall (k = 3) between the images of the two files, the inception score
in blocks of 5,000 in the file's order (Dhariwal & Nichol 2021, section 2.2, and their evaluator).
"""

import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ldm import durable, protocol
from ldm.command import guarded
from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class Moments(NamedTuple):
    """A mean (D,) and a covariance (D, D), in float64."""

    mu: "Tensor"
    sigma: "Tensor"


class PooledAndSpatial(Protocol):
    """A feature network whose first `pooled` features are FID's and the others sFID's: ldm.metrics.features.SpatialInception."""

    pooled: int
    num_features: int
    name: str
    resize: str

    @property
    def identity(self) -> str: ...
    def __call__(self, images: "Tensor") -> "Tensor": ...
    def classify(self, features: "Tensor") -> "Tensor": ...


@dataclass(frozen=True)
class Batch:
    """An npz of images, of which no more are in memory than are looked at. shape: (N, H, W, 3). Raises UserError naming the file."""

    path: Path
    shape: tuple[int, ...]
    names: Sequence[str]

    @classmethod
    def of(cls, path: str | Path) -> "Batch":
        """A file, looked at: what is in it, and of which shape."""
        place = Path(path).expanduser()
        try:
            with zipfile.ZipFile(place) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" not in names:
                    raise UserError(f"{place} holds {', '.join(names) or 'nothing'}: expected arr_0, the images")
                with archive.open("arr_0.npy") as file:
                    shape, fortran, dtype = header(file)
        except FileNotFoundError:
            raise UserError(f"{place}: no such file; expected an .npz of images") from None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            said = error if isinstance(error, UserError) else f"{place} cannot be read as an .npz ({error}); copy it again"
            raise UserError(str(said)) from None
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise UserError(f"{place}: arr_0 is {dtype} {shape}, expected images uint8 (N, height, width, 3)")
        if shape[0] < 4:
            raise UserError(
                f"{place}: arr_0 has {shape[0]} images, expected at least 4 (k = 3 neighbours), and 50,000 to compare with papers"
            )
        return cls(place, shape, names)

    def images(self, size: int) -> "Iterator[Tensor]":
        """The images in order, (B, 3, H, W) uint8, `size` at a time. Raises UserError where the file ends early."""
        import torch

        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            header(file)
            each = int(np.prod(self.shape[1:]))
            for start in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                try:
                    read = bytearray(file.read(count * each))
                except (zipfile.BadZipFile, EOFError) as error:
                    raise UserError(f"{self.path} is damaged after {start} images ({error}); copy it again") from None
                if len(read) < count * each:
                    raise UserError(f"{self.path} ends after {start + len(read) // each} of {self.shape[0]} images; copy it again")
                yield torch.frombuffer(read, dtype=torch.uint8).view(count, *self.shape[1:]).permute(0, 3, 1, 2)

    def statistics(self, pooled: int, spatial: int) -> tuple[Moments, Moments] | None:
        """The file's own statistics, of pooled and of spatial features, None without any. Raises UserError for those of other features."""
        import torch

        if "mu" not in self.names:
            return None
        if missing := [name for name in STATISTICS if name not in self.names]:
            raise UserError(f"{self.path} has mu, but no {', '.join(missing)}: expected {', '.join(STATISTICS)}, or none of them")
        with np.load(self.path, allow_pickle=False) as file:
            mu, sigma, mu_s, sigma_s = (torch.as_tensor(np.asarray(file[name], np.float64)) for name in STATISTICS)
        for name, value, shape in (
            *(("mu", mu, (pooled,)), ("sigma", sigma, (pooled, pooled))),
            *(("mu_s", mu_s, (spatial,)), ("sigma_s", sigma_s, (spatial, spatial))),
        ):
            if value.shape != shape or not value.isfinite().all():
                raise UserError(
                    f"{self.path}: {name} is {tuple(value.shape)}, expected {shape}, all finite: statistics of the same features"
                )
        return Moments(mu, sigma), Moments(mu_s, sigma_s)


def header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an opened .npy, which is left at its data. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy version {version}")
    return read[version](file)


def evaluate(reference: Batch, samples: Batch, net: PooledAndSpatial, batch_size: int = 64) -> dict[str, float]:
    """fid, sfid, inception_score, precision and recall of the samples, in float64 from the network's float32 features.

    Statistics that a file brings serve in the place of those of its images, as in ADM's evaluator; that one's distances between neighbours
    are of float16 where they fit into it, which these are not.  Raises UserError.
    """
    import torch

    from ldm.metrics.distribution import frechet, precision_recall, require_finite
    from ldm.metrics.inception import inception_score

    def features(batch: Batch) -> "Tensor":
        with torch.inference_mode():
            found = torch.cat([net(images).cpu() for images in batch.images(batch_size)])  # (N, pooled + spatial)
        require_finite(found, str(batch.path))
        return found

    def moments(batch: Batch, x: "Tensor") -> tuple[Moments, Moments]:
        parts = x.double().split([net.pooled, net.num_features - net.pooled], 1)
        mine = [Moments(part.mean(0), part.T.cov()) for part in parts]
        return batch.statistics(net.pooled, net.num_features - net.pooled) or (mine[0], mine[1])

    for batch in (reference, samples):
        batch.statistics(net.pooled, net.num_features - net.pooled)  # a mistake is said before an hour of features
    theirs, ours = features(reference), features(samples)
    (pool_1, spatial_1), (pool_2, spatial_2) = moments(samples, ours), moments(reference, theirs)
    precision, recall = precision_recall(ours[:, : net.pooled], theirs[:, : net.pooled], k=3)
    return {
        "fid": frechet(*pool_1, *pool_2).item(),
        "sfid": frechet(*spatial_1, *spatial_2).item(),
        "inception_score": inception_score(net.classify(ours), 5000).item(),
        "precision": precision.item(),
        "recall": recall.item(),
    }


def write(path: Path, images: "Mapping[int, Tensor]", shape: tuple[int, int, int]) -> None:
    """Keep images, row -> (C, H, W) uint8, of all processes as arr_0 (N, H, W, 3) of an npz; shape: N, H, W. Grey is repeated.

    Every process calls it with its share of the rows 0..N-1, and all see the same folder.
    """
    import torch.distributed as dist

    def meet() -> bool:
        """Whether this process writes the file, once all are here."""
        if not (dist.is_available() and dist.is_initialized()):
            return True
        dist.barrier()
        return dist.get_rank() == 0

    whole = path.with_name(f".{path.stem}.npy")
    if meet():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(whole, "w+", np.uint8, (*shape, 3))
    meet()
    rows = np.lib.format.open_memmap(whole, "r+")
    for row, image in images.items():
        rows[row] = image.permute(1, 2, 0).numpy()  # (H, W, 1) is repeated by numpy
    rows.flush()
    if meet():
        temporary = path.with_name(f".{path.name}.tmp")
        with zipfile.ZipFile(temporary, "w") as archive:
            archive.write(whole, "arr_0.npy")
        temporary.replace(path)
        whole.unlink()


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    from ldm.metrics.features import SpatialInception

    if {"--help", "-h"} & set(argv) or not argv:
        print(__doc__)
        return 0 if argv else 2
    places = [word for word in argv if "=" not in word]
    options = {"weights": "", "batch_size": "64", "out": ""} | dict(word.split("=", 1) for word in argv if "=" in word)
    if len(places) != 2 or len(options) > 3:
        raise UserError(f"{' '.join(argv)}: expected REFERENCE.npz SAMPLES.npz [weights=FILE] [batch_size=64] [out=FILE]")
    if not options["batch_size"].isdigit() or int(options["batch_size"]) < 1:
        raise UserError(f"batch_size={options['batch_size']}: expected a number of images")
    reference, samples = (Batch.of(place) for place in places)
    net = SpatialInception(options["weights"] or None)
    values = evaluate(reference, samples, net, int(options["batch_size"]))
    said = {
        "network": net.name,
        "identity": net.identity,
        "resize": net.resize,
        "n": samples.shape[0],
        "size": list(samples.shape[1:3]),
        "reference": durable.digest(reference.path),
        "evaluator": "ADM: IS in blocks of 5000, k = 3, distances in float64",
    }
    out = Path(options["out"]).expanduser() if options["out"] else samples.path.with_suffix(".json")
    durable.write_json(out, {**values, **protocol.stated(said)})
    for name, value in values.items():
        print(f"{name:<16}{value:.5g}")
    print(f"{samples.shape[0]} samples, {reference.shape[0]} references; {out}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))

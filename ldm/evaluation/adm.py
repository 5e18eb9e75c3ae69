"""ADM's evaluation, as papers use it: python -m ldm.evaluation.adm REFERENCE.npz SAMPLES.npz [key=value ...]

  REFERENCE.npz   a reference batch such as VIRTUAL_imagenet256_labeled.npz: arr_0, images uint8 (N, H, W, 3), and the
                  statistics of the complete training set, mu, sigma (of pool3), mu_s, sigma_s (of the spatial
                  features); without them, the statistics of arr_0 are used
  SAMPLES.npz     arr_0 alone is needed: sample.py run=RUN num=50000 save=npz writes it
  weights=FILE    Inception's, by default from the cache, $LDM_INCEPTION or torch-fidelity's release
  batch_size=64   images at a time
  out=FILE        the numbers with their protocol, by default SAMPLES.json

FID and sFID compare with the reference's statistics, precision and recall (k = 3) with the images of the reference
file; the inception score is computed in blocks of 5,000 in the file's order (Dhariwal & Nichol 2021, section 2.2, and
their evaluator).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ldm.cli.errors import run_guarded
from ldm.errors import UserError
from ldm.evaluation import protocol
from ldm.io import atomic
from ldm.io.npz import Moments, NpzImages

if TYPE_CHECKING:
    from torch import Tensor


class PooledAndSpatial(Protocol):
    """A feature network whose first `pooled` features are FID's and the others sFID's, as of SpatialInception."""

    pooled: int
    num_features: int
    name: str
    resize: str

    @property
    def identity(self) -> str: ...
    def __call__(self, images: "Tensor") -> "Tensor": ...
    def classify(self, features: "Tensor") -> "Tensor": ...


def adm_metrics(
    reference: NpzImages, samples: NpzImages, net: PooledAndSpatial, batch_size: int = 64
) -> dict[str, float]:
    """Compute fid, sfid, inception_score, precision and recall of the samples, in float64 from float32 features.

    Statistics in a file replace those of its images, as in ADM's evaluator. Unlike there, distances between neighbours
    are never computed in float16.
    Raises UserError.
    """
    import torch

    from ldm.metrics.distribution import frechet, precision_recall, require_finite
    from ldm.metrics.inception import inception_score

    def features(batch: NpzImages) -> "Tensor":
        with torch.inference_mode():
            values = torch.cat(
                [net(images).cpu() for images in batch.iter_batches(batch_size)]
            )  # (N, pooled + spatial)
        require_finite(values, str(batch.path))
        return values

    def moments(batch: NpzImages, x: "Tensor") -> tuple[Moments, Moments]:
        parts = x.double().split([net.pooled, net.num_features - net.pooled], 1)
        pooled, spatial = (Moments(part.mean(0), part.T.cov()) for part in parts)
        return batch.statistics(net.pooled, net.num_features - net.pooled) or (pooled, spatial)

    for batch in (reference, samples):
        batch.statistics(net.pooled, net.num_features - net.pooled)  # an error is raised before an hour of features
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


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code. Raises UserError."""
    from ldm.metrics.features import SpatialInception

    if {"--help", "-h"} & set(argv) or not argv:
        print(__doc__)
        return 0 if argv else 2
    paths = [word for word in argv if "=" not in word]
    options = {"weights": "", "batch_size": "64", "out": ""} | dict(word.split("=", 1) for word in argv if "=" in word)
    if len(paths) != 2 or len(options) > 3:
        raise UserError(
            f"{' '.join(argv)}: expected REFERENCE.npz SAMPLES.npz [weights=FILE] [batch_size=64] [out=FILE]"
        )
    if not options["batch_size"].isdigit() or int(options["batch_size"]) < 1:
        raise UserError(f"batch_size={options['batch_size']}: expected a number of images")
    reference, samples = (NpzImages.open(path) for path in paths)
    net = SpatialInception(options["weights"] or None)
    values = adm_metrics(reference, samples, net, int(options["batch_size"]))
    settings = {
        "network": net.name,
        "identity": net.identity,
        "resize": net.resize,
        "n": samples.shape[0],
        "size": list(samples.shape[1:3]),
        "reference": atomic.file_sha256(reference.path),
        "evaluator": "ADM: IS in blocks of 5000, k = 3, distances in float64",
    }
    out = Path(options["out"]).expanduser() if options["out"] else samples.path.with_suffix(".json")
    atomic.write_json(out, {**values, **protocol.with_protocol_hash(settings)})
    for name, value in values.items():
        print(f"{name:<16}{value:.5g}")
    print(f"{samples.shape[0]} samples, {reference.shape[0]} references; {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))

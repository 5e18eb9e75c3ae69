"""Latent spaces: every file that depends on one records its identity, and files of another one are refused."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_json
from ldm.runs.identity import hash_config
from ldm.tensors import format_factor, hash_state_dict

KEY = "latent_space"  # in the metadata of safetensors files
# in the metadata of weights that include those of a first stage, trained together with the denoiser from that of KEY
JOINT = {"first_stage": "trained"}


@dataclass(frozen=True)
class LatentSpace:
    """The latent space of one autoencoder.

    identity: sha256 of the autoencoder's config, weights, shift and scale.  shape: its factor and channels, as in f8c4,
    for readability.
    data, images: fingerprint and size of the data set that shift and scale were computed on; "" and 0 if unknown.
    """

    identity: str
    shape: str
    data: str = ""
    images: int = 0

    @staticmethod
    def from_autoencoder(autoencoder: Any, config: Mapping[str, Any], data: str = "") -> "LatentSpace":
        """Return the latent space of an autoencoder.

        config: the plain `autoencoder` node it was built from.  data: the fingerprint of the data set it was calibrated
        on.
        """
        identity = hash_config([config, autoencoder.weights_hash()])
        return LatentSpace(
            identity,
            f"f{format_factor(autoencoder.factor)}c{autoencoder.z_channels}",
            data,
            int(autoencoder.calibrated_on),
        )

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], where: Path | str) -> "LatentSpace":
        """Return the latent space recorded in a file's metadata.

        Raises UserError, naming the file, if there is none.
        """
        try:
            return LatentSpace(**parse_json(metadata[KEY]))
        except (KeyError, ValueError, TypeError):
            raise UserError(
                f"{where} does not say which autoencoder it belongs to; make it again with this version, or remove it"
            ) from None

    @property
    def name(self) -> str:
        """The short name, as in f8c4-0123456789ab."""
        return f"{self.shape}-{self.identity[:12]}"

    def trained_name(self, weights: Mapping[str, Any]) -> str:
        """Return the name of the space in which a first stage ends that begins in this one and is trained.

        weights: of a LatentDiffusion, by name.
        """
        prefix = "autoencoder."
        trained = {name: value for name, value in weights.items() if name.startswith(prefix)}
        return f"{self.shape}-{hash_state_dict(trained)[:12]}"

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that safetensors files of this space carry."""
        return {KEY: json.dumps(asdict(self))}

    def require_same(self, metadata: Mapping[str, str], where: Path | str, remedy: str) -> None:
        """Raise UserError, with both names in one line, unless a file's metadata record this space."""
        other = LatentSpace.from_metadata(metadata, where)
        if other.identity != self.identity:
            raise UserError(f"{where} belongs to autoencoder {other.name}, the one here is {self.name}; {remedy}")

    def require_same_file(self, path: Path, remedy: str) -> None:
        """Check the metadata of a safetensors file, see `require_same`."""
        self.require_same(atomic.read_metadata(path), path, remedy)


def require_same_latent_space(part: tuple[str, str], reference_part: tuple[str, str], remedy: str) -> None:
    """Check that two parts share a latent space, each given as (description, name of its latent space).

    Raises UserError otherwise.
    """
    (what, space), (reference, expected) = part, reference_part
    if space != expected:
        raise UserError(f"{what} belongs to autoencoder {space}, {reference} to {expected}: {remedy}")

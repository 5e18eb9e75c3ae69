"""The contract of a latent space: its name goes with everything that was made in it, and nothing of another one is let in."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_json
from ldm.runs.identity import hash_config

KEY = "latent_space"  # in the metadata of safetensors files


@dataclass(frozen=True)
class LatentSpace:
    """Which autoencoder a latent means something to.

    identity: sha256 of its config, weights, shift and scale.  form: factor and channels, for the eye.
    data, images: fingerprint and size of the set that shift and scale were taken over; "" and 0 where that is not known.
    """

    identity: str
    shape: str
    data: str = ""
    images: int = 0

    @staticmethod
    def from_autoencoder(autoencoder: Any, config: Mapping[str, Any], data: str = "") -> "LatentSpace":
        """The space of an autoencoder built from the plain `autoencoder` node `config`, calibrated on the data set of that fingerprint."""
        identity = hash_config([config, autoencoder.weights_hash()])
        return LatentSpace(
            identity, f"f{autoencoder.factor}c{autoencoder.z_channels}", data, int(autoencoder.calibrated_on)
        )

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], where: Path | str) -> "LatentSpace":
        """The space that a file's metadata names. Raises UserError naming the file for one without a name."""
        try:
            return LatentSpace(**parse_json(metadata[KEY]))
        except (KeyError, ValueError, TypeError):
            said = (
                f"{where} does not say which autoencoder it belongs to; make it again with this version, or remove it"
            )
            raise UserError(said) from None

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.identity[:12]}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the safetensors files of this space carry."""
        return {KEY: json.dumps(asdict(self))}

    def require_same(self, metadata: Mapping[str, str], where: Path | str, remedy: str) -> None:
        """Raises UserError, with both names in one line, for a file made in another space or in none."""
        other = LatentSpace.from_metadata(metadata, where)
        if other.identity != self.identity:
            raise UserError(f"{where} belongs to autoencoder {other.name}, the one here is {self.name}; {remedy}")

    def require_same_file(self, path: Path, remedy: str) -> None:
        """As admit, for a safetensors file."""
        self.require_same(atomic.read_metadata(path), path, remedy)


def require_same_latent_space(one: tuple[str, str], other: tuple[str, str], remedy: str) -> None:
    """Refuse two parts, each given as what it is and the name of its latent space, unless these names are equal. Raises UserError."""
    (what, space), (reference, expected) = one, other
    if space != expected:
        raise UserError(f"{what} belongs to autoencoder {space}, {reference} to {expected}: {remedy}")

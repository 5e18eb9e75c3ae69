"""The contract of a latent space: its name goes with everything that was made in it, and nothing of another one is let in."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm import durable, runs
from ldm.errors import UserError
from ldm.parse import json_of

KEY = "latent_space"  # in the metadata of safetensors files


@dataclass(frozen=True)
class Space:
    """Which autoencoder a latent means something to.

    identity: sha256 of its config, weights, shift and scale.  form: factor and channels, for the eye.
    data, images: fingerprint and size of the set that shift and scale were taken over; "" and 0 where that is not known.
    """

    identity: str
    form: str
    data: str = ""
    images: int = 0

    @staticmethod
    def of(autoencoder: Any, config: Mapping[str, Any], data: str = "") -> "Space":
        """The space of an autoencoder built from the plain `autoencoder` node `config`, calibrated on the data set of that fingerprint."""
        identity = runs.fingerprint([config, autoencoder.identity()])
        return Space(identity, f"f{autoencoder.factor}c{autoencoder.z_channels}", data, int(autoencoder.calibrated_on))

    @staticmethod
    def carried(metadata: Mapping[str, str], where: Path | str) -> "Space":
        """The space that a file's metadata names. Raises UserError naming the file for one without a name."""
        try:
            return Space(**json_of(metadata[KEY]))
        except (KeyError, ValueError, TypeError):
            said = f"{where} does not say which autoencoder it belongs to; make it again with this version, or remove it"
            raise UserError(said) from None

    @property
    def name(self) -> str:
        return f"{self.form}-{self.identity[:12]}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the safetensors files of this space carry."""
        return {KEY: json.dumps(asdict(self))}

    def admit(self, metadata: Mapping[str, str], where: Path | str, remedy: str) -> None:
        """Raises UserError, with both names in one line, for a file made in another space or in none."""
        other = Space.carried(metadata, where)
        if other.identity != self.identity:
            raise UserError(f"{where} belongs to autoencoder {other.name}, the one here is {self.name}; {remedy}")

    def admit_file(self, path: Path, remedy: str) -> None:
        """As admit, for a safetensors file."""
        self.admit(durable.read_metadata(path), path, remedy)


def require_same_latent_space(one: tuple[str, str], other: tuple[str, str], remedy: str) -> None:
    """Refuse two parts, each given as what it is and the name of its latent space, unless these names are equal. Raises UserError."""
    (what, space), (reference, expected) = one, other
    if space != expected:
        raise UserError(f"{what} belongs to autoencoder {space}, {reference} to {expected}: {remedy}")

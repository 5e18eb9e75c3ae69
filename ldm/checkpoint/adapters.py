"""Adapters: the reference to the unchanged base model (path and hash), and the parameters trained on top of it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.model import LatentDiffusion


BASE_REF_FILE = "base.json"


WRAPPER_PREFIX = re.compile(  # the part of a parameter's name that depends on the modules wrapped around the network
    r"^denoiser\.(net\.)+|^controls\.\d+\.|^conditioner\.(told\.)*|parametrizations\.weight\.\d+\."
)


@dataclass(frozen=True)
class BaseModelRef:
    """The base model of an adapter run.

    path: absolute, as init= named it.  weights: `weights.hash_model` of that model.
    """

    path: str
    weights: str

    def write(self, folder: Path) -> None:
        """Write the reference into an adapter's run folder."""
        atomic.write_json(folder / BASE_REF_FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> "BaseModelRef":
        """Read the reference from an adapter's run folder.

        Raises CorruptFileError naming the file, UserError if the base model does not exist any more.
        """
        path = folder / BASE_REF_FILE
        try:
            fields = parse_json(path.read_text(encoding="utf-8"))
            base = BaseModelRef(str(fields["path"]), str(fields["weights"]))
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            raise atomic.CorruptFileError(
                f'{path} is damaged or gone; expected {{"path": RUN, "weights": HASH}}, '
                "as the same train.py command writes it"
            ) from None
        if not Path(base.path).exists():
            raise UserError(
                f"{folder} is an adapter on {base.path}, which is not there: put it back, or name in {path} where it is"
            )
        return base

    def check_weights(self, weights: str, where: Path) -> None:
        """Raise UserError unless `weights`, the hash of the base model now, is the one that the run in `where` was
        trained on.
        """
        if weights != self.weights:
            raise UserError(
                f"{where} was trained on other weights of {self.path} ({self.weights[:12]}) than are there now "
                f"({weights[:12]}): put those back, or name in {where / BASE_REF_FILE} where they are"
            )


def apply_lora_file(model: "LatentDiffusion", path: Path, scale: float) -> None:
    """Add the factors in a LoRA file of diffusers to a model in place, and freeze all parameters.

    scale: factor on the LoRA's contribution. Raises UserError, naming the file, if it does not match the network.
    """
    from ldm.adapter import lora
    from ldm.interop import adapters, weights_file

    net, header = lora.unwrap(model.denoiser.net), weights_file.metadata(path)
    try:
        factors = adapters.import_lora(weights_file.read_weights(path), lora.base_state_dict(net))
        lora.load_factors(net, factors, scale * adapters.lora_scaling(header.get("lora_adapter_metadata")))
    except (ValueError, RuntimeError, UserError) as error:
        raise UserError(
            f"{path} is no LoRA of this network, or none in diffusers' layout: {' '.join(str(error).split())[:200]}"
        ) from None
    model.requires_grad_(False)


def adapter_parameters(model: "nn.Module") -> "dict[str, Tensor]":
    """Return the trainable parameters of a model, by the adapter's names for them (see `local_parameter_name`)."""
    from ldm.checkpoint.state import trainable_parameters

    return {local_parameter_name(name): p for name, p in trainable_parameters(model).items()}


def local_parameter_name(name: str) -> str:
    """Return an adapter's name of a parameter, independent of the modules around it: middle1.res.conv1.down,
    copied.stem.weight.
    """
    return WRAPPER_PREFIX.sub("", WRAPPER_PREFIX.sub("", name))


def copy_parameters(live: "dict[str, Tensor]", state: "dict[str, Tensor]") -> None:
    """Copy the saved parameters `state` into `live` in place. Raises ValueError naming those that do not match."""
    import torch

    mismatched = sorted(live.keys() ^ state.keys()) or [n for n in live if live[n].shape != state[n].shape]
    if mismatched:
        raise ValueError(f"{', '.join(mismatched[:3])}{' ...' if len(mismatched) > 3 else ''} do not match")
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(state[name])

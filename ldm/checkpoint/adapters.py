"""Models with adapters: a base that stays as it is, named by path and hash, and what was trained on top of it."""

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


WRAPPER_PREFIX = re.compile(  # where in a model a part happens to be
    r"^denoiser\.(net\.)+|^controls\.\d+\.|^conditioner\.(told\.)*|parametrizations\.weight\.\d+\."
)


@dataclass(frozen=True)
class BaseModelRef:
    """What an adapter run was trained on.  path: absolute, as init= named it.  weights: drawing.fingerprint of that model."""

    path: str
    weights: str

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / BASE_REF_FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> "BaseModelRef":
        """The base of an adapter run. Raises CorruptFileError naming the file, UserError where the base is not there any more."""
        place = folder / BASE_REF_FILE
        try:
            said = parse_json(place.read_text(encoding="utf-8"))
            base = BaseModelRef(str(said["path"]), str(said["weights"]))
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            raise atomic.CorruptFileError(
                f'{place} is damaged or gone; expected {{"path": RUN, "weights": HASH}}, as the same train.py command writes it'
            ) from None
        if not Path(base.path).exists():
            raise UserError(
                f"{folder} is an adapter on {base.path}, which is not there: put it back, or name in {place} where it is"
            )
        return base

    def check_weights(self, weights: str, where: Path) -> None:
        """Raises UserError if the weights there are now are not those that the run in `where` was trained on."""
        if weights != self.weights:
            raise UserError(
                f"{where} was trained on other weights of {self.path} ({self.weights[:12]}) than are there now ({weights[:12]}): "
                f"put those back, or name in {where / BASE_REF_FILE} where they are"
            )


def apply_lora_file(model: "LatentDiffusion", path: Path, scale: float) -> None:
    """Put the factors in a LoRA file of diffusers on a model. Raises UserError naming the file."""
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
    """What is trained of a model, by the adapter's own names."""
    from ldm.checkpoint.state import trainable_parameters

    return {local_parameter_name(name): p for name, p in trainable_parameters(model).items()}


def local_parameter_name(name: str) -> str:
    """An adapter's name of a parameter, wherever in whatever model it lies: middle1.res.conv1.down, copied.stem.weight."""
    return WRAPPER_PREFIX.sub("", WRAPPER_PREFIX.sub("", name))


def copy_parameters(live: "dict[str, Tensor]", state: "dict[str, Tensor]") -> None:
    """Copy saved parameters into live ones. Raises ValueError naming what does not fit."""
    import torch

    if other := sorted(live.keys() ^ state.keys()) or [name for name in live if live[name].shape != state[name].shape]:
        raise ValueError(f"{', '.join(other[:3])}{' ...' if len(other) > 3 else ''} do not match")
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(state[name])

"""Models with adapters: a base that stays as it is, named by path and hash, and what was trained on top of it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ldm import admit, durable
from ldm.errors import UserError
from ldm.load import config_of, kept, load, load_data_card, run_folder, space_of
from ldm.parse import json_of
from ldm.space import require_same_latent_space

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.model import LatentDiffusion

FILE = "base.json"
TAKEN = ("autoencoder", "conditioner", "net", "schedule", "prediction", "learned_variance")  # what the base decides
WITHIN = re.compile(  # where in a model a part happens to be
    r"^denoiser\.(net\.)+|^controls\.\d+\.|^conditioner\.(told\.)*|parametrizations\.weight\.\d+\."
)


class Adapter(Protocol):
    """What conf/adapter makes: adds parameters of its own to a model, whose other parameters are frozen; at first they change nothing."""

    def put_on(self, model: Any, scale: float = 1.0) -> None: ...


@dataclass(frozen=True)
class Base:
    """What an adapter run was trained on.  path: absolute, as init= named it.  weights: drawing.fingerprint of that model."""

    path: str
    weights: str

    def write(self, folder: Path) -> None:
        durable.write_json(folder / FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> "Base":
        """The base of an adapter run. Raises DamagedError naming the file, UserError where the base is not there any more."""
        place = folder / FILE
        try:
            said = json_of(place.read_text(encoding="utf-8"))
            base = Base(str(said["path"]), str(said["weights"]))
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            raise durable.DamagedError(
                f'{place} is damaged or gone; expected {{"path": RUN, "weights": HASH}}, as the same train.py command writes it'
            ) from None
        if not Path(base.path).exists():
            raise UserError(f"{folder} is an adapter on {base.path}, which is not there: put it back, or name in {place} where it is")
        return base

    def admit(self, weights: str, where: Path) -> None:
        """Raises UserError if the weights there are now are not those that the run in `where` was trained on."""
        if weights != self.weights:
            raise UserError(
                f"{where} was trained on other weights of {self.path} ({self.weights[:12]}) than are there now ({weights[:12]}): "
                f"put those back, or name in {where / FILE} where they are"
            )


def settled(cfg: Any) -> Any:
    """The config with the parts that its base decides, where it has an adapter, so that a person need not name them again.

    Raises UserError without init=.
    """
    if not cfg.get("adapter"):
        return cfg
    if not cfg.get("init"):
        raise UserError("adapter= is trained on top of a trained model: init=RUN says which")
    base = config_of(run_folder(cfg.init))
    for name in TAKEN:
        cfg[name] = base.get(name, False)  # a pipeline of another project does not say that its variance is not learned
    return cfg


def begun(cfg: Any, model: "LatentDiffusion", data: Any) -> tuple[Base, str]:
    """Put a fresh adapter of the config on the model of cfg.init, all else frozen; the base, and in words how much is trained.

    Raises UserError for data that the model cannot be told.
    """
    import torch
    from hydra.utils import instantiate

    from ldm.drawing import fingerprint
    from ldm.tensors import key

    card = load_data_card(run_folder(cfg.init))
    if data.channels != card.channels or ("label" in model.conditioner.keys and len(data.classes) != len(card.classes)):
        was = f"{card.channels} channels and {len(card.classes)} classes"
        raise UserError(
            f"init={cfg.init} was trained on images of {was}, these have {data.channels} and {len(data.classes)}: choose data= alike"
        )
    base = Base(str(Path(cfg.init).expanduser().absolute()), fingerprint(model))
    torch.manual_seed(key(cfg.seed, "weights"))
    model.requires_grad_(False)
    instantiate(cfg.adapter).put_on(model)
    model.size = (data.size, data.size)
    trained, every = (sum(p.numel() for p in some) for some in (fresh(model).values(), model.parameters()))
    frozen = every - trained
    return base, f"adapter     {trained:,} parameters on {frozen:,} frozen ones of {cfg.init}: {100 * trained / frozen:.2f}%"


def load_adapted(run: str | Path, weights: str = "ema") -> "LatentDiffusion":
    """The model of an adapter run: its base, proven the one that it was trained on, with the adapter put on. Raises UserError."""
    from ldm.drawing import fingerprint

    folder = run_folder(run)
    base, card = Base.read(folder), load_data_card(folder)
    model = load(base.path)
    base.admit(fingerprint(model), folder)
    put_on(model, run, 1.0, weights)
    model.size = (card.size, card.size)
    return model


def put_on(model: "LatentDiffusion", run: str | Path, scale: float = 1.0, weights: str = "ema") -> None:
    """Put what an adapter run, or a LoRA file of diffusers, holds on a model, `scale` times as strong. Raises UserError naming the run."""
    from hydra.utils import instantiate

    from ldm.foreign import is_foreign

    model.requires_grad_(False)
    if is_foreign(run):
        return put_on_file(model, Path(run).expanduser(), scale)
    folder = adapter_folder(run)
    found = kept(run, weights)
    with admit.building(folder):
        adapter: Adapter = instantiate(config_of(folder).adapter)
    try:
        adapter.put_on(model, scale)
        fill(fresh(model), {own(name): value for name, value in found.tensors.items()})
    except ValueError as error:
        raise UserError(f"{run} is an adapter of another network: {error}") from None
    model.requires_grad_(False)


@dataclass(frozen=True)
class Asked:
    """One of sample.py's adapters=: an adapter run or a LoRA file of diffusers, and how strong it is to be."""

    run: str
    scale: float


def asked(cfg: Any) -> list[Asked]:
    """The adapters of a request, each of the latent space of cfg.run. Raises UserError, before a model is loaded."""
    from ldm.build import plain
    from ldm.foreign import is_foreign

    found = []
    for one in plain(cfg)["adapters"]:
        if not isinstance(one, dict) or not isinstance(one.get("run"), str) or one.keys() - {"run", "scale"}:
            raise UserError(f"adapters: {one}: expected {{run: RUN, scale: 1.0}}, of an adapter run or a LoRA file of diffusers")
        if not isinstance(scale := one.get("scale", 1.0), int | float) or isinstance(scale, bool):
            raise UserError(f"adapters: scale={scale} of {one['run']}: expected a number")
        found.append(Asked(one["run"], float(scale)))
        if not is_foreign(one["run"]):
            adapter_folder(one["run"])
            adapter, model = (f"adapters: {one['run']}", space_of(one["run"])), (f"run={cfg.run}", space_of(cfg.run))
            require_same_latent_space(adapter, model, "choose one of its latents")
    return found


def worn(model: "LatentDiffusion", cfg: Any) -> "LatentDiffusion":
    """The model with the adapters of a request put on. Raises UserError."""
    for one in asked(cfg):
        put_on(model, one.run, one.scale, cfg.weights)
    return model.eval().to(model.device)


def layers(run: str | Path) -> list[Path]:
    """The adapter runs that `run` is made of, the innermost first; none for a run that is whole by itself."""
    from ldm.foreign import is_foreign

    if is_foreign(run) or not config_of(folder := run_folder(run)).get("adapter"):
        return []
    return [*layers(Base.read(folder).path), folder]


def adapter_folder(run: str | Path) -> Path:
    """The folder of an adapter run. Raises UserError for another kind of run."""
    folder = run_folder(run)
    if not config_of(folder).get("adapter"):
        raise UserError(f"{run} is no adapter: expected a run of train.py adapter=..., or a LoRA file of diffusers")
    return folder


def put_on_file(model: "LatentDiffusion", path: Path, scale: float) -> None:
    """Put the factors in a LoRA file of diffusers on a model. Raises UserError naming the file."""
    from ldm.adapter import lora
    from ldm.interop import adapters, read

    net, header = lora.innermost(model.denoiser.net), read.metadata(path)
    try:
        factors = adapters.import_lora(read.weights(path), lora.plain(net))
        lora.load(net, factors, scale * adapters.strength(header.get("lora_adapter_metadata")))
    except (ValueError, RuntimeError, UserError) as error:
        raise UserError(f"{path} is no LoRA of this network, or none in diffusers' layout: {' '.join(str(error).split())[:200]}") from None
    model.requires_grad_(False)


def fresh(model: "nn.Module") -> "dict[str, Tensor]":
    """What is trained of a model, by the adapter's own names."""
    from ldm.training.callbacks import trained

    return {own(name): p for name, p in trained(model).items()}


def own(name: str) -> str:
    """An adapter's name of a parameter, wherever in whatever model it lies: middle1.res.conv1.down, copied.stem.weight."""
    return WITHIN.sub("", WITHIN.sub("", name))


def fill(live: "dict[str, Tensor]", state: "dict[str, Tensor]") -> None:
    """Copy saved parameters into live ones. Raises ValueError naming what does not fit."""
    import torch

    if other := sorted(live.keys() ^ state.keys()) or [name for name in live if live[name].shape != state[name].shape]:
        raise ValueError(f"{', '.join(other[:3])}{' ...' if len(other) > 3 else ''} do not match")
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(state[name])

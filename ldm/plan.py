"""Say what a training would cost before anything runs: python -m ldm.plan [what train.py takes] [paper=PRESET] [throughput=N] [json=FILE]

The model is built on the meta device: parameters, FLOPs, memory and disk are those of the config, and no weight exists.

  paper=PRESET      the preset to compare with; by default the one that preset= names
  throughput=N      images per second that one device trains on, measured by you: gives device-hours
  batches=1,8       batch sizes per device to list beside the config's own
  json=FILE         all figures, also those that the table leaves out
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ldm import durable, runs
from ldm.argv import Tree, one_of, rewrite, several
from ldm.build import SUPPLIED, plain
from ldm.command import Plan as Composition
from ldm.command import guarded
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
OWN = ("paper", "throughput", "batches", "json")
IGNORED = (*runs.RUN_ONLY, "published", "optimize", "judge", "metrics", "budget")


@dataclass(frozen=True)
class Card:
    """What a plan must know of the data: the config's own where it is there, else what a preset says of its paper's."""

    name: str
    classes: Sequence[str]
    channels: int
    size: int
    images: int
    flips: int


@dataclass
class Figures:
    """Everything that is found out; memory and disk in bytes, FLOPs of one device's step, a multiplication and an addition being two."""

    parts: dict[str, dict[str, int]]
    data: Card
    z: tuple[int, ...]
    steps: int
    batch_size: int
    devices: int
    flops: dict[str, int]
    memory: dict[str, int]
    activations: dict[str, dict[int, dict[str, int]]]
    disk: dict[str, int]
    published: Mapping[str, Any]
    throughput: float | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.steps * self.batch_size

    @property
    def published_count(self) -> int:
        """Our parameters of the parts that the paper's count is of, with what it counts beside them."""
        counts = (self.parts[name]["parameters"] for name in self.published["parts"] if name in self.parts)
        return sum(counts) + self.published["beside"]

    @property
    def device_hours(self) -> float | None:
        return self.images / self.throughput / 3600 if self.throughput else None


def composed(typed: Sequence[str]) -> tuple[Any, dict[str, Any] | None]:
    """The config of a command line, checked as train.py checks it, and what a preset says of its data where there is no path to them.

    Raises UserError.
    """
    from omegaconf import OmegaConf

    import ldm.studies  # noqa: F401  makes experiments/ a group

    tree = Tree((ROOT / "conf",), ROOT)
    words = [rewrite(one, tree, (), ("runs", "data.path", "data.captions"), False) for one in typed]
    plan = Composition(tree, "train", False, [part for word in words for part in several(word, tree)])
    with plan.explained(SimpleNamespace(started=False)):  # type: ignore[arg-type]
        config = plan.compose(plan.overrides)
        published = plain(config.get("published")) or None
        if published is not None and OmegaConf.is_missing(config.data, "path"):
            plan.overrides.append("data.path=.")
            config.data.path = "."
        else:
            published = None
        plan.check(SUPPLIED)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), published


def card_of(cfg: Any, published: Mapping[str, Any] | None) -> Card:
    if published is not None:
        classes = [str(i) for i in range(published["classes"])]
        size = cfg.data.get("size") or published["size"]
        return Card(published["data"], classes, published["channels"], size, published["images"], 1 + bool(cfg.data.flip))
    from ldm import build

    data = build.dataset(cfg, "train")
    return Card(data.name, data.classes, data.channels, data.size, len(data), 1 + bool(data.flip))


def figures(cfg: Any, card: Card, batches: Sequence[int] = ()) -> Figures:
    """What the config's diffusion model and its training cost. Raises UserError for a config that trains something else."""
    import torch

    from ldm import build, meter

    if not str(cfg.training._target_).startswith("ldm.stage.diffusion."):
        raise UserError(f"training._target_={cfg.training._target_}: a plan is of training=diffusion")
    cfg = cfg.copy()
    weightless(cfg.conditioner)
    with meter.on_meta():
        autoencoder = build.autoencoder(cfg.autoencoder, card.channels).requires_grad_(False)
        conditioner = build.conditioner(cfg.conditioner, autoencoder, card)
        net = build.net(cfg, autoencoder, conditioner)
        image = torch.empty(1, card.channels, card.size, card.size)
        z = (autoencoder.z_channels, *(card.size // autoencoder.factor,) * 2)
        encoders = unread(conditioner)

        def answer(batch: int, training: bool = False) -> "torch.Tensor":
            with torch.no_grad() if not training else torch.enable_grad(), meter.on_meta():
                batch_ = batch_of(batch, card, conditioner)
                cond = conditioner(batch_)
                if training and cfg.training.drop:
                    cond = cond.where(torch.ones(batch, dtype=torch.bool), conditioner.null(batch_))
                weight = next(net.parameters())
                return net(torch.empty(batch, *z, dtype=weight.dtype), torch.empty(batch), cond.to(weight.dtype))

        def step(batch: int) -> "torch.Tensor":
            return answer(batch, training=True).float().square().mean()

        trained = [p for part in (net, conditioner) for p in part.parameters() if p.requires_grad]
        devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
        local = max(1, cfg.training.batch_size // devices)
        precisions = {"32": None, "bf16": torch.bfloat16}
        activations = {
            name: {batch: asdict(meter.training(step, trained, batch, dtype)) for batch in sorted({*batches, local})}
            for name, dtype in precisions.items()
        }
        one = activations["32"][local]["flops"] // local
        flops = {
            "training step, one device": one * local,
            "training, an image": one,
            "network, an image": meter.forward(answer, 1).flops,
            "first stage encodes an image": meter.forward(lambda n: autoencoder.posterior(image), 1).flops,
            "first stage decodes an image": meter.forward(lambda n: autoencoder.decode(torch.empty(1, *z)), 1).flops,
        }
        per_image = meter.bytes_of([autoencoder.posterior(image).moments.half()])
        optimizer = states(cfg.training.optimizer, trained)
        sampling = {f"sampling, a forward pass of 1, {name}": meter.forward(answer, 1, d).peak for name, d in precisions.items()}
        frozen = meter.bytes_of([p for part in (autoencoder, *encoders) for p in part.parameters()])
        weights = meter.bytes_of(trained)
        sampling |= {"network in bf16": meter.bytes_of(list(net.to(torch.bfloat16).parameters()))}
        sampling |= {f"forward pass of {n} in bf16": meter.forward(answer, n).peak for n in (1, 2)}
    memory = {"weights": weights, "frozen weights": frozen, "gradients": weights, "optimizer": optimizer, "average": weights, **sampling}
    parts = {"network": [net], "conditioner": [conditioner], "text encoder": encoders, "first stage": [autoencoder]}
    return Figures(
        {name: count for name, modules in parts.items() if (count := counted(modules))["parameters"]},
        card,
        z,
        cfg.training.steps,
        cfg.training.batch_size,
        devices,
        flops,
        memory,
        activations,
        {"cached latents": per_image * card.images * card.flips, "a checkpoint": weights * 2 + optimizer},
        plain(cfg.get("published")) or {},
    )


def counted(modules: Sequence["torch.nn.Module"]) -> dict[str, int]:
    every = [p for module in modules for p in module.parameters()]
    return {"parameters": sum(p.numel() for p in every), "trained": sum(p.numel() for p in every if p.requires_grad)}


def unread(conditioner: "torch.nn.Module") -> list["torch.nn.Module"]:
    """Let no text be read; returns the encoders that would have read them."""
    told: Any
    encoders = []
    for told in conditioner.modules():
        if hasattr(told, "kept"):
            encoders.append(told.kept.encoder)
            told.kept = Unread(told.kept)
    return encoders


class Unread:
    """Stands for a frozen text encoder's table of features: as long as texts can be, of no value."""

    def __init__(self, kept: Any):
        self.encoder, self.length = None, kept.length
        self.context_dim, self.vector_dim = kept.encoder.context_dim, kept.encoder.vector_dim

    def condition(self, captions: Sequence[str], device: Any) -> Any:
        import torch

        from ldm.condition import Condition

        n = len(captions)
        mask = torch.empty(n, self.length, dtype=torch.bool)
        return Condition(context=torch.empty(n, self.length, self.context_dim), mask=mask, vector=torch.empty(n, self.vector_dim))


def weightless(node: Any) -> None:
    """Let what can be drawn at random be so: a plan wants no published weights."""
    for name, child in list(node.items()):
        if name == "random":
            node.random, node.weights = True, None
        elif hasattr(child, "items"):
            weightless(child)


def batch_of(rows: int, card: Card, conditioner: "torch.nn.Module") -> dict[str, Any]:
    """A batch without content that holds all a conditioner may ask for."""
    import torch

    size = (card.size, card.size)
    batch: dict[str, Any] = {
        "image": torch.empty(rows, card.channels, *size),
        "mask": torch.empty(rows, 1, *size),
        "caption": [""] * rows,
        "label": torch.zeros(rows, dtype=torch.long, device="cpu"),
        "boxes": [[]] * rows,
    }
    part: Any
    for part in conditioner.modules():
        keys = getattr(part, "keys", None)
        if not isinstance(keys, tuple):  # no conditioner: a container's keys are a method
            continue
        if "map" in keys:
            batch["map"] = torch.empty(rows, part.classes, *size)
        if "low_res" in keys:
            batch["low_res"] = torch.empty(rows, card.channels, card.size // part.scale, card.size // part.scale)
        if "relief" in keys:
            batch["relief"] = torch.empty(rows, part.concat_channels - 1, *size)
    return batch


def states(node: Any, parameters: Sequence["torch.Tensor"]) -> int:
    """Bytes that the config's optimiser keeps of the parameters."""
    import torch
    from hydra.utils import instantiate

    from ldm.meter import bytes_of

    optimizer = instantiate(node, **({"fused": False} if "fused" in node else {}))(parameters)  # a fused one wants a real device
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    for p in parameters:
        p.grad = None
    return bytes_of([one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)])


def differences(cfg: Any, paper: str) -> list[str]:
    """Each key in which a config is not the preset's, as `key: the paper's -> yours`. Raises UserError for no such preset."""
    theirs, _ = composed([f"preset={paper}"])
    mine = runs.without(plain(cfg), (*IGNORED, "data"))
    return runs.differences(runs.without(plain(theirs), (*IGNORED, "data")), mine)


def table(found: Figures) -> str:
    """The figures for people to read."""
    lines: list[str] = []

    def section(title: str, rows: Mapping[str, str]) -> None:
        lines.extend(["", title, *(f"  {name:<38}{value:>16}" for name, value in rows.items())])

    whole = {name: f"{part['parameters']:,}" + ("" if part["trained"] else " frozen") for name, part in found.parts.items()}
    section("parameters", whole)
    if "parameters" in found.published:
        theirs, parts = found.published["parameters"], " + ".join(found.published["parts"])
        same = "the same" if agree(found.published_count, theirs) else f"ours has {found.published_count:,}"
        lines.append(f"  {found.published['table']} ({parts}): {theirs if isinstance(theirs, str) else format(theirs, ',')}, {same}")
    section("FLOPs", {name: si(value, "FLOP") for name, value in found.flops.items()})
    names = ("weights", "frozen weights", "gradients", "optimizer", "average")
    section("memory of training, each device", {name: size(found.memory[name]) for name in names})
    fixed = sum(found.memory[name] for name in names if name != "gradients")
    for precision, costs in found.activations.items():
        for batch, cost in costs.items():
            what = f"precision {precision}, batch {batch}: activations {size(cost['kept'])}, in all {size(fixed + cost['peak'])}"
            lines.append(f"  {what}")
    section("memory of sampling, beside the weights", {n: size(v) for n, v in found.memory.items() if n not in names})
    section("disk", {name: size(value) for name, value in found.disk.items()})
    seen = {"steps": f"{found.steps:,}", "batch, all devices": f"{found.batch_size:,}", "images seen": f"{found.images:,}"}
    seen |= {"passes over the data": f"{found.images / found.data.images:.3g}"}
    seen |= {"compute": si(found.flops["training, an image"] * found.images, "FLOP")}
    seen |= {"latent": " x ".join(map(str, found.z)), "data": f"{found.data.images:,} of {found.data.name}"}
    if found.device_hours is not None:
        seen["device-hours"] = f"{found.device_hours:,.1f}"
    section("training", seen)
    if found.differences:
        lines.extend(["", "differs from the paper's", *(f"  {one}" for one in found.differences)])
    return "\n".join(lines[1:])


def agree(count: int, printed: int | str) -> bool:
    """Whether a count is the one printed: exactly, or as 390.89M to its last decimal."""
    if not isinstance(printed, str):
        return count == printed
    decimals = len(printed.rstrip("M").partition(".")[2])
    return f"{count / 1e6:.{decimals}f}M" == printed


def si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} Y{unit}"


def size(value: float) -> str:
    for prefix in ("", "Ki", "Mi", "Gi"):
        if value < 1024:
            return f"{value:.4g} {prefix}B"
        value /= 1024
    return f"{value:,.4g} TiB"


def own(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The plan's own keys, and what train.py takes."""
    pairs = [(word.partition("="), word) for word in argv]
    return {name: value for (name, _, value), _ in pairs if name in OWN}, [word for (name, _, _), word in pairs if name not in OWN]


def number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    """Raises UserError for what is no positive number."""
    try:
        if (value := kind(text)) > 0:
            return value
    except ValueError:
        pass
    raise UserError(f"{name}={text}: expected a number above 0")


def plan(argv: Sequence[str]) -> Figures:
    """The figures of a command line. Raises UserError."""
    asked, typed = own(argv)
    throughput = number("throughput", asked["throughput"], float) if "throughput" in asked else None
    batches = [number("batches", one, int) for one in asked["batches"].split(",")] if "batches" in asked else [1]
    chosen = next((word.partition("=")[2] for word in reversed(typed) if word.startswith("preset=")), None)
    paper = asked.get("paper", chosen)
    presets = sorted(file.stem for file in (ROOT / "conf" / "preset").glob("*.yaml"))
    if paper not in (None, "null", *presets):
        raise UserError(f"paper={paper}: no such preset{one_of(presets, 60)}")
    cfg, published = composed(typed)
    found = figures(cfg, card_of(cfg, published), batches)
    found.throughput = throughput
    found.differences = differences(cfg, paper) if paper not in (None, "null") else []
    if "json" in asked:
        durable.write_json(asked["json"], {**asdict(found), "images": found.images, "device_hours": found.device_hours})
    return found


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    logging.disable(logging.WARNING)  # that weights are missing: here they are to be
    print(table(plan(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))

"""Compute parameters, FLOPs, memory and disk space of a training on the meta device, without allocating weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ldm.conditioner.features import CaptionFeatures, most_bytes, text_caches
from ldm.config.build import to_container
from ldm.errors import UserError
from ldm.plan.data_info import DataInfo
from ldm.plan.placeholders import placeholder_batch, stub_text_encoders, use_random_weights

if TYPE_CHECKING:
    import torch


@dataclass
class PlanResult:
    """All figures of a plan.

    Memory and disk are in bytes; FLOPs are per step of one device, a multiplication and an addition counting as two.
    """

    parts: dict[str, dict[str, int]]
    data: DataInfo
    z: tuple[int, ...]
    steps: int
    batch_size: int
    devices: int
    flops: dict[str, int]
    memory: dict[str, int]
    activations: dict[str, dict[int, dict[str, int]]]
    disk: dict[str, int]
    published: Mapping[str, Any]
    text_features: Mapping[str, int]  # bytes at most for each of training.text_features; empty without a text encoder
    throughput: float | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.steps * self.batch_size

    @property
    def published_count(self) -> int:
        """Parameters of our parts that the paper's count includes, plus those that it counts in addition."""
        counts = (self.parts[name]["parameters"] for name in self.published["modules"] if name in self.parts)
        return sum(counts) + self.published["extra_parameters"]

    @property
    def device_hours(self) -> float | None:
        return self.images / self.throughput / 3600 if self.throughput else None


def estimate(cfg: Any, card: DataInfo, batches: Sequence[int] = ()) -> PlanResult:
    """Estimate the cost of training the config's diffusion model.

    card: metadata of the data set.  batches: batch sizes per device to list in addition to the config's own.
    Raises UserError for a config that trains something else.
    """
    import torch

    from ldm.config import build
    from ldm.plan.flops import forward_cost, meta_device, num_bytes, training_cost
    from ldm.tensors import divide_sides

    if not str(cfg.training._target_).startswith("ldm.recipes.diffusion."):
        raise UserError(f"training._target_={cfg.training._target_}: only training=diffusion can be planned")
    cfg = cfg.copy()
    use_random_weights(cfg.conditioner)
    with meta_device():
        autoencoder = build.build_autoencoder(cfg.autoencoder, card.shape[0]).requires_grad_(False)
        conditioner = build.build_conditioner(cfg.conditioner, autoencoder, card).eval()  # without keyed noise
        net = build.build_network(cfg, autoencoder, conditioner)
        image = torch.empty(1, *card.shape)
        z = (autoencoder.z_channels, *divide_sides(card.shape[1:], autoencoder.factor))
        caches = text_caches(conditioner)
        encoders = stub_text_encoders(conditioner)

        def predict(batch: int, training: bool = False) -> "torch.Tensor":
            with torch.no_grad() if not training else torch.enable_grad(), meta_device():
                batch_ = placeholder_batch(batch, card, conditioner)
                cond = conditioner(batch_)
                if training and cfg.training.cond_drop_prob:
                    cond = cond.where(torch.ones(batch, dtype=torch.bool), conditioner.null(batch_))
                weight = next(net.parameters())
                return net(torch.empty(batch, *z, dtype=weight.dtype), torch.empty(batch), cond.to(weight.dtype))

        def step(batch: int) -> "torch.Tensor":
            return predict(batch, training=True).float().square().mean()

        trained = [p for part in (net, conditioner) for p in part.parameters() if p.requires_grad]
        devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
        local = max(1, cfg.training.batch_size // devices)
        precisions = {"32": None, "bf16": torch.bfloat16}
        activations = {
            name: {batch: asdict(training_cost(step, trained, batch, dtype)) for batch in sorted({*batches, local})}
            for name, dtype in precisions.items()
        }
        flops_per_image = activations["32"][local]["flops"] // local
        flops = {
            "training step, one device": flops_per_image * local,
            "training, an image": flops_per_image,
            "network, an image": forward_cost(predict, 1).flops,
            "first stage encodes an image": forward_cost(lambda n: autoencoder.posterior(image), 1).flops,
            "first stage decodes an image": forward_cost(lambda n: autoencoder.decode(torch.empty(1, *z)), 1).flops,
        }
        per_image = num_bytes([autoencoder.posterior(image).moments.half()])
        latents = {} if cfg.training.latents == "online" else {"cached latents": per_image * card.images * card.flips}
        optimizer = optimizer_bytes(cfg.training.optimizer, trained)
        sampling = {
            f"sampling, a forward pass of 1, {name}": forward_cost(predict, 1, d).peak for name, d in precisions.items()
        }
        frozen = num_bytes([p for part in (autoencoder, *encoders) for p in part.parameters()])
        weights = num_bytes(trained)
        sampling |= {"network in bf16": num_bytes(list(net.to(torch.bfloat16).parameters()))}
        sampling |= {f"forward pass of {n} in bf16": forward_cost(predict, n).peak for n in (1, 2)}
    memory = {
        "weights": weights,
        "frozen weights": frozen,
        "gradients": weights,
        "optimizer": optimizer,
        "average": weights,
        **sampling,
    }
    parts = {"network": [net], "conditioner": [conditioner], "text encoder": encoders, "first stage": [autoencoder]}
    return PlanResult(
        {name: count for name, modules in parts.items() if (count := count_parameters(modules))["parameters"]},
        card,
        z,
        cfg.training.steps,
        cfg.training.batch_size,
        devices,
        flops,
        memory,
        activations,
        {**latents, "a checkpoint": weights * 2 + optimizer},
        to_container(cfg.get("paper")) or {},
        text_feature_bytes(caches, card.captions, local) if caches else {},
    )


def text_feature_bytes(caches: Sequence[CaptionFeatures], captions: int | None, rows: int) -> dict[str, int]:
    """Return the bytes that the features of captions take at most, for each of training.text_features.

    captions: different ones, None for an unknown number, which only `online` is independent of.  rows: of a batch.
    """
    stored = {} if captions is None else dict.fromkeys(("memory", "disk"), captions)
    return {name: sum(most_bytes(cache, n) for cache in caches) for name, n in {**stored, "online": rows}.items()}


def count_parameters(modules: Sequence["torch.nn.Module"]) -> dict[str, int]:
    """Count all and trainable parameters of the modules."""
    every = [p for module in modules for p in module.parameters()]
    return {"parameters": sum(p.numel() for p in every), "trained": sum(p.numel() for p in every if p.requires_grad)}


def optimizer_bytes(node: Any, parameters: Sequence["torch.Tensor"]) -> int:
    """Return the bytes of the state that the config's optimizer allocates for the parameters."""
    import torch
    from hydra.utils import instantiate

    from ldm.plan.flops import num_bytes

    # A fused optimizer needs a real device.
    optimizer = instantiate(node, **({"fused": False} if "fused" in node else {}))(parameters)
    for p in parameters:
        p.grad = torch.empty_like(p)
    with torch.device("cpu"):  # the number of steps is read as a number, which a tensor on `meta` does not have
        optimizer.step()
    for p in parameters:
        p.grad = None
    return num_bytes(
        [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]
    )

"""The loss on held-out images at fixed times and noise, by noise level: comparable between steps and between runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor, nn

from ldm.checkpoint.state import trainable_parameters
from ldm.devices import rank_and_world_size, resolve_precision
from ldm.diffusion.fixed_pairs import level_noise, per_row_objective, timestep_density
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.diffusion import LitDiffusion
from ldm.training.parallel import all_reduce_sum

TERMS = ("loss", "error", "t")  # of an objective; the last two may be missing
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 2.0**12  # factor on the loss, so that its gradients do not underflow in float16


@dataclass(frozen=True)
class ValidationConfig:
    """How the loss on held-out images is measured: every `every` steps, None for never, on at most `num` images.

    levels: number of noise levels; every image is at one fixed time in each.  batch_size: rows of a forward pass.
    seed: of the choice of images, of their noise and times; the run's seed does not enter.
    density: (u, schedule) -> t, of the times; None for that of the objective.
    grad_norms: whether the norm of the gradient of each level's loss is measured too.
    Raises ConfigError for numbers out of range.
    """

    every: int | None = None
    num: int = 64
    levels: int = 8
    batch_size: int = 64
    seed: int = 0
    density: Callable[..., Any] | None = None
    grad_norms: bool = False

    def __post_init__(self):
        for name in ("every", "num", "levels", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                expected = "null, or 1 or more steps" if name == "every" else "1 or more"
                raise ConfigError(f"training.validation.{name}={value}: expected {expected}")
        if self.density is not None and not callable(self.density):
            raise ConfigError(
                f"training.validation.density={self.density}: expected null or a node, as in "
                "training.validation.density={_target_:ldm.diffusion.times.uniform,_partial_:true}"
            )

    def metric_names(self, steps: int) -> set[str]:
        """Return the names of the numbers that a training of `steps` steps may write, none if it writes none."""
        if self.every is None:
            return set()
        groups = ("loss", "error", *(["grad_norm"] if self.grad_norms else []))
        levels = {f"val/{group}_{level}" for group in groups for level in range(self.levels)}
        return {"val/loss", "val/error"} | levels


class HeldOutLoss:
    """Measure the loss of a diffusion model, with the weights that it has at the call, at fixed pairs (t, eps).

    data: held-out images, with moments or to be encoded; their latents are fixed too.  rows: the key of each.
    precision: the trainer's.
    report: receives one line, at the first call.
    Without dropout of conditions or of activations, without random numbers of torch, and without gradients left behind.
    The processes share out the images; the result is the same in all.
    """

    def __init__(
        self,
        lit: LitDiffusion,
        data: Any,
        rows: Sequence[int],
        options: ValidationConfig,
        precision: str | int = "auto",
        report: Callable[[str], None] = lambda line: None,
    ):
        self.lit, self.data, self.rows, self.options, self.report = lit, data, rows, options, report
        self.precision, self.reported = resolve_precision(precision), False

    def __call__(self) -> dict[str, float]:
        """Return val/loss, the mean of val/loss_0, val/loss_1, ... of the levels in order of increasing t.

        val/error, val/error_0, ... are the loss before weighting, if the objective has it.  val/grad_norm_0, ... are
        the norms of the gradients of val/loss_0, ... by the model's trainable parameters.
        """
        objective = per_row_objective(self.lit.objective)
        rank, ranks = rank_and_world_size()
        images, size = range(rank, len(self.rows), ranks), self.options.batch_size
        with evaluation_mode(self.lit), timestep_density(objective, self.options.density):
            batches = [self.prepare(images[start : start + size]) for start in range(0, len(images), size)]
            levels = [self.measure(objective, batches, level) for level in range(self.options.levels)]
        levels.sort(key=lambda values: values.get("t", 0.0))
        if not self.reported:
            self.reported = True
            times = ", ".join(f"{values['t']:.3g}" for values in levels if "t" in values)
            self.report(f"validation  mean t of the levels: {times or 'not known for this objective'}")
        values = {f"val/{name}": fmean(one[name] for one in levels) for name in ("loss", "error") if name in levels[0]}
        return values | {
            f"val/{name}_{level}": one[name]
            for name in ("loss", "error", "grad_norm")
            for level, one in enumerate(levels)
            if name in one
        }

    @torch.no_grad()
    def prepare(self, images: Sequence[int]) -> dict[str, Any]:
        """Return a batch of images by number, with keys `rows`, latents `z` and conditions `cond`."""
        weight = next(self.lit.model.denoiser.parameters())
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        batch = self.data.batch([(0, i) for i in images])
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = value.to(weight.device, dtype if value.is_floating_point() else None)
        rows = [self.rows[i] for i in images]
        noise = KeyedNoise(derive_seed(self.options.seed, "validation"), rows)
        with arithmetic(self.precision, weight):
            z = self.lit.sample_latent(batch, noise)
            cond = None if self.options.grad_norms else self.lit.model.condition({**batch, "noise": noise})
        return {"batch": batch, "images": images, "rows": rows, "noise": noise, "z": z, "cond": cond}

    def measure(self, objective: nn.Module, batches: Sequence[dict[str, Any]], level: int) -> dict[str, float]:
        """Return the means of TERMS at a level over the images of all processes, and the norm of the gradient."""
        model, options = self.lit.model, self.options
        weight = next(model.denoiser.parameters())
        sums = torch.zeros(2, len(TERMS), dtype=torch.float64)  # of the terms, and the numbers of rows
        parameters = list(trainable_parameters(model).values()) if options.grad_norms else []
        grads = [torch.zeros_like(p) for p in parameters]
        scale = FP16_SCALE if self.precision == "fp16" else 1.0
        for part in batches:
            noise = level_noise(options.seed, part["rows"], part["images"], level, options.levels)
            with torch.set_grad_enabled(options.grad_norms), arithmetic(self.precision, weight):
                cond = part["cond"]
                if cond is None:  # for each level anew, as a backward pass frees what it went through
                    cond = model.condition({**part["batch"], "noise": part["noise"]})
                terms = self.lit.terms(objective, part["z"], cond.to(part["z"].dtype), noise, part["batch"])
            for i, name in enumerate(TERMS):
                if name in terms:
                    sums[:, i] += torch.stack([terms[name].detach().double().sum().cpu(), torch.tensor(len(noise))])
            if parameters:
                loss = terms["loss"].sum() * (scale / len(self.rows))
                for total, grad in zip(grads, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if grad is not None:
                        total += grad
        total, number = all_reduce_sum(sums)
        values = {name: float(total[i] / number[i]) for i, name in enumerate(TERMS) if number[i]}
        if parameters:
            squares = [float(all_reduce_sum(grad).double().square().sum()) for grad in grads]
            values["grad_norm"] = sum(squares) ** 0.5 / scale
        return values


def arithmetic(precision: str, weight: Tensor) -> AbstractContextManager[Any]:
    """Return the context in which Lightning runs a training step of a precision, for weights like this one."""
    if weight.dtype == torch.float64:
        return DoublePrecision().forward_context()
    if precision in AUTOCAST:
        return torch.autocast(weight.device.type, AUTOCAST[precision], cache_enabled=False)
    return nullcontext()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode within the block, and each part of it back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode

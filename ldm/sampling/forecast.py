"""Forecasts: a model of the change to the next state, applied to its own results.

States are (B, C, ...), in the units of the data set's states, which are those of batch["before"].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, cfg
from ldm.diffusion.sampler import Sampler, ddpm
from ldm.model import LatentDiffusion
from ldm.sampling.tasks import Task, generate, inpaint, run_plan
from ldm.tensors import KeyedNoise

Draw = Callable[[Tensor, int], Tensor]  # (state (B, C, ...), number of the step) -> its change to the next state
Observe = Callable[[int], tuple[Tensor, Tensor]]  # step -> next state (B, C, ...), known (B, 1, ...) bool


def rollout(draw: Draw, state: Tensor, steps: int) -> Tensor:
    """Add what is drawn for a state to it, `steps` times: states (B, steps + 1, C, ...), the first included."""
    states = [state]
    for step in range(steps):
        states.append(states[-1] + draw(states[-1], step).to(state))
    return torch.stack(states, 1)


def change_sampler(
    model: LatentDiffusion,
    scale: float,
    seeds: Sequence[int],
    ts: Tensor,
    sampler: Sampler = ddpm,
    guidance: Guidance = cfg,
    vector: Tensor | None = None,
    observe: Observe | None = None,
) -> Draw:
    """Return `draw` of `rollout`, which samples a model of image = (next state - before) / scale.

    scale: of the model's data set.  seeds: of the rows; rows of one state with several seeds are an ensemble. The noise
    of a row is keyed by (seed, step), so that it is the same in any batch.  ts: descending grid.  guidance: with its
    options bound.  vector: (B, D), constants of each row's equation, for a model that is conditioned on them.
    observe: sensors. The next state is kept where it is known and drawn elsewhere (`tasks.inpaint`).
    """
    model.eval()

    @torch.inference_mode()
    def draw(state: Tensor, step: int) -> Tensor:
        noise = KeyedNoise(0, [(seed, step) for seed in seeds])
        batch = {"before": state.float(), "noise": noise}
        task: Task = generate
        if vector is not None:
            batch["vector"] = vector
        if observe is not None:
            target, known = observe(step)
            batch |= {"image": torch.where(known, (target - state) / scale, 0.0), "mask": (~known).float()}
            task = inpaint
        return scale * run_plan(model, task(model, batch, noise, ts), noise, sampler, guidance)

    return draw

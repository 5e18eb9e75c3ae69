"""Optimizers that treat a network's parameters by their number of dimensions."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.dtensor import distribute_like, full_tensors, is_dtensor, moment_like


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float = 1e-4,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    fused: bool = True,
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter 2019) that decays matrices and kernels, not biases, gains and other vectors."""
    decayed, others = split_parameters(parameters, lambda p: p.ndim > 1)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr, (betas[0], betas[1]), weight_decay=weight_decay, fused=fused
    )


def muon(
    parameters: Iterable[nn.Parameter],
    lr: float = 1e-4,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    fused: bool = True,
    matrix_lr: float = 0.02,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """Build Muon (Jordan et al. 2024) for matrices, with the rate matrix_lr, and `adamw` for kernels and vectors.

    Returns adamw alone if there is no matrix.
    """
    matrices, rest = split_parameters(parameters, lambda p: p.ndim == 2)
    if not matrices:
        return adamw(rest, lr, betas, weight_decay, fused)
    first = Muon(matrices, lr=matrix_lr, momentum=momentum, weight_decay=weight_decay)
    return ChainedOptimizer([first, *([adamw(rest, lr, betas, weight_decay, fused)] if rest else [])])


def split_parameters(
    parameters: Iterable[nn.Parameter], first: Callable[[Tensor], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into those for which `first` is true, and the others."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for p in parameters:
        groups[not first(p)].append(p)
    return groups


class Muon(torch.optim.Muon):
    """torch's Muon, with the step of each sharded matrix taken on the unsharded one, one matrix at a time.

    Products of shards in bfloat16 round differently from those of one process, and torch has none for fewer rows than
    processes.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step as torch's Muon does; parameters, momenta and gradients stay sharded between steps."""
        groups = self.param_groups
        if not any(is_dtensor(p) for group in groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            for group in groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_unsharded(group, p)
        finally:
            self.param_groups = groups
        return loss

    @torch.no_grad()
    def _step_unsharded(self, group: dict[str, Any], p: Tensor) -> None:
        matrix = full_tensors(p).clone()
        matrix.grad = full_tensors(p.grad)
        if p in self.state:
            self.state[matrix] = full_tensors(dict(self.state[p]))
        self.param_groups = [{**group, "params": [matrix]}]
        super().step()
        p.copy_(distribute_like(matrix, p))
        self.state[p] = {name: moment_like(value, p) for name, value in self.state.pop(matrix).items()}


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one; its parameter groups are theirs."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([{"params": group["params"]} for one in self.optimizers for group in one.param_groups], {})
        self._link()

    def _link(self) -> None:
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step of each optimizer, after closure() if there is one; return the value of closure()."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one in self.optimizers:
            one.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            one.load_state_dict(state)
        self._link()

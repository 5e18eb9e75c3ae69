"""Trajectories of fields as pairs of successive states, on which a model of the next state is trained."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.memory import InMemoryDataset
from ldm.errors import ConfigError, UserError
from ldm.tensors import hash_state_dict


class TrajectoryDataset(InMemoryDataset):
    """Pairs of successive states: image (C, ...) is the change to the next state over `scale`, in [-1, 1].

    states: (N, T, C, ...) float32, N trajectories of T states at equal steps.  vector: (N, D), constants of each
    trajectory, or None.
    A batch also has before (B, C, ...), the state that changes, in the states' own units, and vector (B, D) if it is
    given. The states of trajectory n are the samples n (T - 1) to (n + 1)(T - 1) - 1.
    Pairs with a value that is not finite are left out: `skipped` of them, which `summary` counts.
    Raises UserError for fewer than two states, for no pair that is finite, and for a change larger than `scale`.
    """

    medium = "field"

    def __init__(self, name: str, states: Tensor, scale: float, vector: Tensor | None = None, seed: int = 0):
        if states.ndim < 4 or states.shape[1] < 2:
            raise UserError(
                f"{name}: states of {tuple(states.shape)}; expected (trajectories, states, channels, ...), "
                "two states or more"
            )
        if not scale > 0:
            raise ConfigError(f"scale={scale}: expected a positive number, the largest change of a state")
        before, after = states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)
        finite = (before.isfinite() & after.isfinite()).flatten(1).all(1)
        self.skipped = int((~finite).sum())
        if self.skipped == len(finite):
            raise UserError(f"{name}: no pair of successive states is finite; expected at least one")
        self.summary = f"{name}: {len(finite) - self.skipped:,} pairs of successive states"
        if self.skipped:
            self.summary += f", {self.skipped:,} that are not finite left out"
        self.states, self.scale = states, scale
        self.before = before[finite]
        self.vector = None if vector is None else vector.repeat_interleave(states.shape[1] - 1, 0)[finite]
        change = after[finite] - self.before
        if (largest := float(change.abs().max())) > scale:
            raise ConfigError(f"scale={scale}: the states change by up to {largest:.3g}; raise it to that or more")
        super().__init__(name, change / scale, seed=seed)

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images, with before and vector; see InMemoryDataset."""
        metadata = super().batch_metadata(samples)
        index = torch.tensor(metadata["index"], dtype=torch.long)
        constants = {} if self.vector is None else {"vector": self.vector[index]}
        return {**metadata, "before": self.before[index], **constants}


class OwnTrajectories(TrajectoryDataset):
    """Trajectories of a file of one's own, a .npy array or a safetensors file with one tensor, `states`.

    path: states (N, T, C, L), (N, T, C, H, W) or (N, T, C, F, H, W), floating point.
    split: test has the last ceil(N test_fraction) trajectories, train the others.
    scale: the largest change of a state; by default the largest in the file.
    content_hash: expected digest of the states.
    Raises UserError naming the path.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        scale: float | None = None,
        test_fraction: float = 0.1,
        content_hash: str | None = None,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        states = read_states(Path(path).expanduser())
        self.content = hash_state_dict({"states": states})[:16]
        if content_hash not in (None, self.content):
            raise UserError(
                f"data.path={path}: its states are not those of this run (digest {self.content}, expected "
                f"{content_hash}); put them back, or train on these under another name="
            )
        num = len(states) - math.ceil(len(states) * test_fraction)
        if not 0 < test_fraction < 1 or num < 1:
            raise ConfigError(
                f"test_fraction={test_fraction}: expected a part between 0 and 1 that leaves training data of "
                f"{len(states)} trajectories"
            )
        if scale is None:
            change = states.diff(dim=1).abs()
            scale = float(change[change.isfinite()].max()) if change.isfinite().any() else 1.0
        selected = states[:num] if split == "train" else states[num:]
        super().__init__(f"{Path(path).stem}-{split}", selected, scale, seed=seed)

    @property
    def resolved_config(self) -> dict[str, Any]:
        """Values of the options that a config left open; content_hash makes run names depend on the states."""
        return {"scale": self.scale, "content_hash": self.content}


def read_states(path: Path) -> Tensor:
    """Read states (N, T, C, ...) as float32. Raises UserError naming the path."""
    from ldm.io.atomic import read_tensors

    try:
        if path.suffix == ".npy":
            import numpy as np

            states = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            states = read_tensors(path)["states"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.path={path}: {error}; expected a .npy file, or a .safetensors file with a tensor named states"
        ) from None
    if not states.is_floating_point() or states.ndim < 4 or states.shape[1] < 2:
        raise UserError(
            f"data.path={path}: {states.dtype} {tuple(states.shape)}; expected floating point "
            "(trajectories, states, channels, ...), two states or more"
        )
    return states.float()

"""The Kuramoto-Sivashinsky equation u_t = -u u_x - u_xx - viscosity u_xxxx on a ring: its solver, and a data set."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.image_cache import cached
from ldm.data.trajectory import TrajectoryDataset
from ldm.errors import ConfigError
from ldm.tensors import derive_seed

SOLVER = 1  # raise it when `solve` or `initial_states` changes its result, so that cached states are not used
WAVES = 3  # longest waves of an initial state
CONTOUR = 32  # points of the contour integrals
UNITS = (64.0, 1.0)  # of length and viscosity in `vector`


class KuramotoSivashinsky(TrajectoryDataset):
    """Successive states of the Kuramoto-Sivashinsky equation, a chaotic field on a ring: image (1, points).

    A sample is a pair of states that are `steps` time steps of the solver apart; see TrajectoryDataset for `scale`,
    before (B, 1, points) and `states` (trajectories, T, 1, points). vector (B, 2): length / 64 and viscosity.
    split: train has `trajectories` of `states` states each, test `test_trajectories` of `test_states`, from other
    initial states; trajectory i is a function of (seed, split, i) and the equation alone.
    length: of the ring; viscosity: of the fourth derivative; each a number, or [lowest, highest] from which each
    trajectory draws its own.
    time_step: of the solver.  warmup: time that passes before the first state, so that the chaos has developed.
    Raises ConfigError for an invalid option, and if the solution does not stay finite.
    """

    def __init__(
        self,
        split: str = "train",
        trajectories: int = 256,
        states: int = 141,
        test_trajectories: int = 32,
        test_states: int = 161,
        points: int = 128,
        length: float | Sequence[float] = 64.0,
        viscosity: float | Sequence[float] = 1.0,
        time_step: float = 0.1,
        steps: int = 8,
        warmup: float = 100.0,
        scale: float = 2.5,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        num, times = (trajectories, states) if split == "train" else (test_trajectories, test_states)
        if min(num, steps) < 1 or times < 2 or points < 8 or points % 2:
            raise ConfigError(
                f"{num} trajectories of {times} states, points={points} steps={steps}: expected one trajectory or more "
                "of at least two states, an even number of points from 8, and one step or more"
            )
        if not time_step > 0 or not warmup >= 0:
            raise ConfigError(f"time_step={time_step} warmup={warmup}: expected a positive step, and 0 or more")
        lengths, viscosities = (
            draw_constants(name, value, num, (seed, split))
            for name, value in (("length", length), ("viscosity", viscosity))
        )

        def create() -> tuple[Tensor, None]:
            initial = initial_states(num, points, (seed, split))
            developed = solve(initial, lengths, viscosities, time_step, n := round(warmup / time_step), n or 1)[:, -1]
            solved = solve(developed, lengths, viscosities, time_step, (times - 1) * steps, steps)
            if not solved.isfinite().all():
                raise ConfigError(
                    f"time_step={time_step}: the solution does not stay finite; lower it, or raise viscosity"
                )
            return solved[:, :, None].float(), None

        key = (SOLVER, split, num, times, points, length, viscosity, time_step, steps, warmup, seed)
        vector = torch.stack([lengths / UNITS[0], viscosities / UNITS[1]], 1).float()
        super().__init__(f"kuramoto_sivashinsky-{split}", cached("kuramoto_sivashinsky", key, create)[0], scale, vector)
        self.time_step, self.solver_steps = time_step, steps
        self.interval = steps * time_step  # time between two states


class Etdrk4(NamedTuple):
    """Coefficients of ETDRK4 for u' = linear u + N(u), each like `linear` (Kassam & Trefethen 2005, eq. 2.3-2.6)."""

    full: Tensor  # exp(linear dt)
    half: Tensor  # exp(linear dt / 2)
    stage: Tensor  # dt phi_1(linear dt / 2) / 2, of the inner stages
    first: Tensor  # of N at the beginning of a step
    middle: Tensor  # of the sum of N at the two stages in the middle
    last: Tensor  # of N at the stage at the end

    @staticmethod
    def of(linear: Tensor, dt: float) -> "Etdrk4":
        """Compute the coefficients of a real `linear`, by contour integrals, as the formulas lose all digits near 0."""
        angle = math.pi / CONTOUR * (2 * torch.arange(CONTOUR, dtype=torch.float64) + 1)
        z = dt * linear[..., None] + torch.exp(1j * angle)
        e = z.exp()
        integrands = (
            ((z / 2).exp() - 1) / z,
            (-4 - z + e * (4 - 3 * z + z**2)) / z**3,
            2 * (2 + z + e * (z - 2)) / z**3,
            (-4 - 3 * z - z**2 + e * (4 - z)) / z**3,
        )
        return Etdrk4((dt * linear).exp(), (dt * linear / 2).exp(), *(dt * f.mean(-1).real for f in integrands))


def solve(state: Tensor, length: Tensor, viscosity: Tensor, dt: float, steps: int, every: int) -> Tensor:
    """Solve from states (B, points), in float64: (B, steps // every + 1, points), with each `every`-th step's state.

    length, viscosity: (B,) of each row.  ETDRK4 in Fourier space (Kassam & Trefethen 2005, section 4), without
    dealiasing; the mean is conserved.
    """
    points = state.shape[-1]
    wave = 2 * math.pi / length.double()[:, None] * torch.arange(points // 2 + 1, dtype=torch.float64)
    step = Etdrk4.of(wave**2 - viscosity.double()[:, None] * wave**4, dt)
    derivative = -0.5j * wave  # of the highest wave imaginary, which irfft leaves out: it has no derivative

    def nonlinear(v: Tensor) -> Tensor:
        return derivative * torch.fft.rfft(torch.fft.irfft(v, points).square())

    v, states = torch.fft.rfft(state.double()), [state.double()]
    for i in range(1, steps + 1):
        start = nonlinear(v)
        a = step.half * v + step.stage * start
        at_a = nonlinear(a)
        b = step.half * v + step.stage * at_a
        at_b = nonlinear(b)
        c = step.half * a + step.stage * (2 * at_b - start)
        v = step.full * v + step.first * start + step.middle * (at_a + at_b) + step.last * nonlinear(c)
        if i % every == 0:
            states.append(torch.fft.irfft(v, points))
    return torch.stack(states, 1)


def initial_states(num: int, points: int, key: tuple[int, str]) -> Tensor:
    """Draw states (num, points) float64 of mean 0: a few long waves of random amplitude and phase, by row."""
    x = 2 * math.pi * torch.arange(points, dtype=torch.float64) / points
    wave = torch.arange(1, WAVES + 1, dtype=torch.float64)[:, None]
    rows = []
    for i in range(num):
        amplitude, phase = torch.rand(2, WAVES, 1, generator=generator(*key, "state", i), dtype=torch.float64)
        rows.append((amplitude * torch.sin(wave * x + 2 * math.pi * phase)).sum(0))
    return torch.stack(rows)


def draw_constants(name: str, value: float | Sequence[float], num: int, key: tuple[int, str]) -> Tensor:
    """Return a constant of each trajectory (num,) float64: a number, or uniform between two.

    Raises ConfigError for anything else, and unless they are positive.
    """
    bounds = list(value) if isinstance(value, Sequence) else [value, value]
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise ConfigError(f"{name}={value}: expected a positive number, or [lowest, highest]")
    part = [torch.rand((), generator=generator(*key, name, i), dtype=torch.float64) for i in range(num)]
    return bounds[0] + (bounds[1] - bounds[0]) * torch.stack(part)


def generator(*parts: int | str) -> torch.Generator:
    """Return a generator of random numbers that depends on the parts alone."""
    return torch.Generator().manual_seed(derive_seed("kuramoto_sivashinsky", *parts))

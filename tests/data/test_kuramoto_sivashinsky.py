"""The solver against its order, another integrator and what it conserves; the data set against the solver."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ldm.data.kuramoto_sivashinsky import KuramotoSivashinsky, initial_states, solve
from ldm.errors import ConfigError

SMALL = {"trajectories": 3, "states": 4, "test_trajectories": 2, "test_states": 5, "points": 32, "length": 22.0}
SMALL |= {"warmup": 20.0}
ONE = torch.ones(2, dtype=torch.float64)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))


def test_solver_converges_with_order_four_and_conserves_mean():
    """The error falls by 2^4 for half the step (Kassam & Trefethen 2005, figure 4); rows have their own constants."""
    start, length, viscosity = initial_states(2, 32, (0, "order")) + 0.25, 12 * ONE, torch.tensor([1.0, 0.7])
    ends = [solve(start, length, viscosity, 0.1 / n, 4 * n, 4 * n)[:, -1] for n in (8, 16, 32)]
    coarse, fine = ((a - b).norm() for a, b in pairwise(ends))
    assert 3.5 < math.log2(coarse / fine) < 4.3
    assert (ends[-1] - start).norm() > 0.1 * start.norm()
    torch.testing.assert_close(ends[0].mean(-1), start.mean(-1), rtol=0, atol=1e-14)


def test_solver_equals_general_integrator():
    """The method of lines with the spectral derivatives as matrices, solved by a Runge-Kutta method of order 8."""
    points, length, viscosity = 16, 9.0, 0.8
    start = initial_states(1, points, (0, "reference"))
    wave = 2 * np.pi * np.fft.fftfreq(points, length / points)
    basis = np.fft.fft(np.eye(points), axis=0)
    odd = 1j * np.where(np.arange(points) == points // 2, 0, wave)
    first, second, fourth = (np.fft.ifft(f[:, None] * basis, axis=0).real for f in (odd, -(wave**2), wave**4))

    def velocity(t, u):
        return -first @ (u * u) / 2 - second @ u - viscosity * fourth @ u

    exact = solve_ivp(velocity, (0, 2), start[0].numpy(), method="DOP853", rtol=1e-11, atol=1e-11, t_eval=[1, 2]).y
    solved = solve(start, length * ONE[:1], viscosity * ONE[:1], 0.005, 400, 200)
    assert solved.shape == (1, 3, points)
    torch.testing.assert_close(solved[0, 1:], torch.from_numpy(exact.T), rtol=0, atol=1e-8)


def test_samples_are_changes_between_successive_states(cache):
    data = KuramotoSivashinsky(**SMALL)
    assert (len(data), data.shape, data.classes, data.medium) == (9, (1, 32), [], "field")
    batch = data.batch([(0, 8), (1, 3)])
    states = data.states.flatten(0, 1)  # sample 3 is the first pair of trajectory 1, sample 8 the last of trajectory 2
    assert torch.equal(batch["before"], states[[10, 4]])
    assert (batch["before"] + 2.5 * batch["image"] - states[[11, 5]]).abs().max() < 1e-6
    assert batch["image"].abs().max() <= 1
    assert torch.equal(batch["vector"], torch.tensor([[22 / 64, 1.0]] * 2))
    solved = solve(states[:1, 0], *(torch.tensor([x]) for x in (22.0, 1.0)), 0.1, 8, 8)[0, 1]
    assert (solved - states[1, 0]).abs().max() < 1e-5
    assert data.interval == pytest.approx(0.8)
    assert states.mean(-1).abs().max() < 1e-6
    assert 0.5 < states.std() < 2.5


def test_trajectories_depend_on_seed_split_and_index_alone(cache):
    data, test = KuramotoSivashinsky(**SMALL), KuramotoSivashinsky("test", **SMALL)
    more = KuramotoSivashinsky(**SMALL | {"trajectories": 4})
    assert torch.allclose(more.states[:3], data.states, atol=1e-4)
    assert test.states.shape == (2, 5, 1, 32)
    other = KuramotoSivashinsky(**SMALL, seed=1)
    first = [x.states[0, 0] for x in (data, test, other)] + [data.states[1, 0]]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(first) for b in first[:i])
    family = KuramotoSivashinsky(**SMALL | {"length": [20.0, 24.0]}, viscosity=[0.9, 1.1])
    assert len(family.vector.unique(dim=0)) == 3
    low, high = torch.tensor([20 / 64, 0.9]), torch.tensor([24 / 64, 1.1])
    assert ((family.vector >= low) & (family.vector <= high)).all()
    assert data.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 31}, "points=31"),
        ({"states": 1}, "1 states"),
        ({"time_step": 0}, "time_step=0"),
        ({"length": [2.0, 1.0]}, "length=[2.0, 1.0]"),
        ({"viscosity": -1.0}, "viscosity=-1.0"),
        ({"scale": 0.1}, "scale=0.1: the states change by up to"),
        ({"split": "val"}, "split='val'"),
        ({"viscosity": 1e-6}, "time_step=0.1: the solution does not stay finite"),
    ],
)
def test_invalid_options_are_refused(cache, options, message):
    with pytest.raises(ConfigError) as error:
        KuramotoSivashinsky(**SMALL | options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

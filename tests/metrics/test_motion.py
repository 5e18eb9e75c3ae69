import math

import pytest
import torch

from ldm.data.moving import MOTIONS, STILL, direction, paste
from ldm.metrics import motion
from ldm.metrics.motion import centre_of_mass, measure_motion


def clips(velocity: torch.Tensor, frames: int = 8, size: int = 40) -> torch.Tensor:
    """A bright sprite that starts near the middle and moves by velocity (B, 2) a frame."""
    sprite = 0.3 + 0.7 * torch.rand(
        len(velocity), 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    at = 16.0 + velocity[:, None] * torch.arange(frames)[:, None]
    return 2 * paste(sprite, at, size)[:, None] - 1


def test_motion_recovers_direction_and_speed():
    """Velocities 20 degrees off each direction, and at each side of the slowest, are classified; speeds are exact."""
    off = math.radians(20)
    turn = torch.tensor([[math.cos(off), math.sin(off)], [-math.sin(off), math.cos(off)]], dtype=torch.float64)
    asked = torch.arange(STILL).repeat(2)
    v = torch.cat([direction(torch.arange(STILL)) @ turn, direction(torch.arange(STILL)) @ turn.T]) * 1.5
    x = clips(v)
    centres = centre_of_mass(x, floor=0)
    assert torch.allclose(motion.velocity(centres), v, atol=1e-9)
    assert torch.allclose(motion.speeds(centres), torch.full((16,), 1.5, dtype=torch.float64), atol=1e-9)
    assert motion.rms_acceleration(centres).max() < 1e-9
    found = measure_motion(x, asked)
    assert found["motion"].mean() == 1
    assert (found["speed"] - 1.5).abs().max() < 0.05
    slow = clips(torch.tensor([[0.0, 0.45], [0.0, 0.55]], dtype=torch.float64))
    assert motion.motions(centre_of_mass(slow, 0)).tolist() == [STILL, 0]
    assert motion.STILL == STILL == len(MOTIONS) - 1


def test_motion_is_that_of_the_first_half():
    there = torch.tensor([0.0, 2, 4, 6, 5, 3, 1, 0], dtype=torch.float64)
    centres = torch.stack([there, torch.zeros(8, dtype=torch.float64)], -1)[None]
    assert motion.velocity(centres).tolist() == [[2, 0]]
    second = torch.tensor([0.0, 0, -3, -1, 0, 1])
    assert motion.rms_acceleration(centres).item() == pytest.approx(second.square().mean().sqrt().item())
    assert motion.speeds(centres).item() == pytest.approx((6 + 6) / 7)


def test_controls_are_seen():
    """Frozen clips stand still and are smoother than real; shuffled ones accelerate; a changed look costs PSNR."""
    v = direction(torch.arange(STILL)) * torch.linspace(1.1, 1.9, STILL)[:, None]
    x, asked = clips(v), torch.arange(STILL)
    real, frozen = measure_motion(x, asked), measure_motion(motion.freeze(x), asked)
    assert frozen["motion"].sum() == 0
    assert (frozen["steadiness"] > real["steadiness"]).all()
    assert torch.allclose(frozen["steadiness"], torch.full_like(frozen["steadiness"], 10 * math.log10(4e8)))
    mixed = motion.shuffle_frames(x, range(8))
    assert torch.equal(mixed.flatten(3).sum(3).sort(2).values, x.flatten(3).sum(3).sort(2).values)
    assert torch.equal(mixed[2:4], motion.shuffle_frames(x[2:4], [2, 3]))
    shuffled = measure_motion(mixed, asked)
    assert shuffled["motion"].mean() < 0.5
    assert (shuffled["acceleration"] > 20 * real["acceleration"].clamp(min=0.01)).all()
    assert (shuffled["continuity"] < real["continuity"] - 10).all()
    still = direction(torch.arange(4)) * 2  # whole pixels along rows and columns
    assert measure_motion(clips(still[::2]), torch.arange(2))["continuity"].min() > 80
    x[:, :, 3, :, ::2] = -1  # a frame loses half of its columns
    assert (measure_motion(x, asked)["steadiness"] < real["steadiness"] - 1).all()


def test_recentre_undoes_whole_shifts():
    x = clips(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    still = motion.recentre(x, centre_of_mass(x, 0))
    assert (still - still[:, :, :1]).abs().max() < 1e-9
    assert torch.allclose(centre_of_mass(still, 0), torch.full((1, 8, 2), 19.5, dtype=torch.float64))
    assert centre_of_mass(torch.full((1, 1, 2, 4, 6), -1.0)).tolist() == [[[1.5, 2.5]] * 2]

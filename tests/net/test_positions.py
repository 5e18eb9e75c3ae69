import itertools
import math

import pytest
import torch
from helpers import randomize_weights

from ldm.condition import Condition
from ldm.net.dit import DiT
from ldm.net.positions import rope, sincos, unordered


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 2)])
def test_sincos_is_sines_and_cosines_of_column_then_row(height, width):
    found = sincos((height, width), 8)
    assert found.shape == (height * width, 8)
    assert found.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            expected = [
                f(place / 10_000 ** (k / 2)) for place in (column, row) for f in (math.sin, math.cos) for k in range(2)
            ]
            torch.testing.assert_close(found[row * width + column], torch.tensor(expected))


def test_sincos_of_large_grid_contains_small_grid():
    large = sincos((6, 7), 8).reshape(6, 7, 8)
    assert torch.equal(large[:3, :5].reshape(15, 8), sincos((3, 5), 8))


def test_rope_products_depend_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=g) for _ in range(2))
    height, width = 5, 6
    rotate = rope((height, width), 8)
    scores = torch.einsum("nd,md->nm", *(rotate(one.expand(1, 1, height * width, 8))[0, 0] for one in (q, k)))
    found: dict = {}
    for n in range(height * width):
        for m in range(height * width):
            found.setdefault((m // width - n // width, m % width - n % width), []).append(scores[n, m])
    for same in found.values():
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), rtol=1e-4, atol=1e-5)
    assert (found[0, 1][0] - found[1, 0][0]).abs() > 1e-3  # down is not right
    assert (found[0, 1][0] - found[0, -1][0]).abs() > 1e-3  # nor left
    torch.testing.assert_close(found[0, 0][0], q @ k)


def test_rope_rotates_neighbouring_pairs():
    rotate = rope((2, 3), 8)
    x = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    angles = torch.tensor([[p * r for p in (n // 3, n % 3) for r in (1.0, 0.01)] for n in range(6)])
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(6, 4), angles)).flatten(-2)
    torch.testing.assert_close(rotate(x), expected)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16()).dtype == torch.bfloat16


def test_rope_theta_is_slowest_period():
    x = torch.zeros(1, 1, 2, 8)
    x[..., ::2] = 1.0
    turned = rope((2, 1), 8, theta=16.0)(x)[0, 0, 1]
    torch.testing.assert_close(turned[:4], torch.tensor([math.cos(1), math.sin(1), math.cos(0.25), math.sin(0.25)]))


@pytest.mark.parametrize(
    ("grid", "dim", "shares"),
    [((5,), 6, (3,)), ((3, 2), 6, (2, 1)), ((2, 3, 4), 12, (2, 2, 2)), ((2, 3, 4), 16, (4, 2, 2))],
)
def test_positions_of_any_grid_share_width_over_coordinates(grid, dim, shares):
    """The first coordinate has the rates that are left over; sincos has the last coordinate first, rope the first."""
    x = torch.randn(1, 1, math.prod(grid), dim, generator=torch.Generator().manual_seed(0))
    fixed, rotated = sincos(grid, dim), rope(grid, dim, theta=100.0)(x)[0, 0]
    for n, position in enumerate(itertools.product(*map(range, grid))):
        rates = [[base ** (-k / share) for k in range(share)] for base in (10_000, 100) for share in shares]
        angles = [[p * rate for rate in of_side] for p, of_side in zip(position * 2, rates, strict=True)]
        told = [f(a) for side in reversed(angles[: len(grid)]) for f in (math.sin, math.cos) for a in side]
        torch.testing.assert_close(fixed[n], torch.tensor(told))
        turned = [a for side in angles[len(grid) :] for a in side]
        pairs = torch.view_as_complex(x[0, 0, n].unflatten(0, (-1, 2)).contiguous())
        expected = torch.view_as_real(pairs * torch.polar(torch.ones(dim // 2), torch.tensor(turned))).flatten()
        torch.testing.assert_close(rotated[n], expected)


@pytest.mark.parametrize("make", [sincos, rope])
@pytest.mark.parametrize("dim", [7, 4])
def test_positions_reject_odd_and_small_widths(make, dim):
    with pytest.raises(ValueError, match=f"3 sides need an even width of at least 6, not {dim}"):
        make((2, 2, 2), dim)


def test_dit_without_positions_permutes_with_its_tokens():
    """A network for sets: moving the atoms moves its output with them, which positions prevent."""
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    x, t = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.rand(2).double()
    for positions, equal in ((unordered, True), (sincos, False)):
        net = randomize_weights(DiT(5, 5, patch_size=[1], channels=16, depth=2, num_heads=2, positions=positions))
        net.double()
        moved = net(x[..., order], t, Condition())
        assert torch.allclose(moved, net(x, t, Condition())[..., order], rtol=1e-9, atol=1e-9) is equal

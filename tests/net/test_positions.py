import math

import pytest
import torch

from ldm.net.positions import rope_2d, sincos_2d


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 2)])
def test_sincos_2d_is_sines_and_cosines_of_column_then_row(height, width):
    found = sincos_2d(height, width, 8)
    assert found.shape == (height * width, 8)
    assert found.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            expected = [
                f(place / 10_000 ** (k / 2)) for place in (column, row) for f in (math.sin, math.cos) for k in range(2)
            ]
            torch.testing.assert_close(found[row * width + column], torch.tensor(expected))


def test_sincos_2d_of_large_grid_contains_small_grid():
    large = sincos_2d(6, 7, 8).reshape(6, 7, 8)
    assert torch.equal(large[:3, :5].reshape(15, 8), sincos_2d(3, 5, 8))


def test_rope_2d_products_depend_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=g) for _ in range(2))
    height, width = 5, 6
    rotate = rope_2d(height, width, 8)
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


def test_rope_2d_rotates_neighbouring_pairs():
    rotate = rope_2d(2, 3, 8)
    x = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    angles = torch.tensor([[p * r for p in (n // 3, n % 3) for r in (1.0, 0.01)] for n in range(6)])
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(6, 4), angles)).flatten(-2)
    torch.testing.assert_close(rotate(x), expected)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16()).dtype == torch.bfloat16


def test_rope_2d_theta_is_slowest_period():
    x = torch.zeros(1, 1, 2, 8)
    x[..., ::2] = 1.0
    turned = rope_2d(2, 1, 8, theta=16.0)(x)[0, 0, 1]
    torch.testing.assert_close(turned[:4], torch.tensor([math.cos(1), math.sin(1), math.cos(0.25), math.sin(0.25)]))


@pytest.mark.parametrize("make", [sincos_2d, rope_2d])
def test_positions_reject_width_not_divisible_by_four(make):
    with pytest.raises(ValueError, match="that 4 divides, not 6"):
        make(2, 2, 6)

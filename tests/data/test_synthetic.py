import torch

from ldm.data.synthetic import SHAPES, render


def test_render_is_the_formula_of_each_shape():
    """Twice each of ten shapes, from their signed distances in float64."""
    size, labels = 24, torch.arange(20) % 10
    made = render(labels, size, seed=5)[:, 0]
    u = torch.rand(20, 4, generator=torch.Generator().manual_seed(5)).double()
    for image, label, (down, right, part, grey) in zip(made, labels.tolist(), u.tolist(), strict=True):
        r = size * (0.2 + 0.15 * part)
        y, x = torch.meshgrid(*(torch.arange(size).double() + 0.5 for _ in range(2)), indexing="ij")
        y, x = y - size * (0.4 + 0.2 * down), x - size * (0.4 + 0.2 * right)
        across, long = x.abs(), y.abs()
        bar, column = torch.maximum(long - r / 3, across - r), torch.maximum(across - r / 3, long - r)
        distance = {
            "disc": (x**2 + y**2).sqrt() - r,
            "ring": ((x**2 + y**2).sqrt() - r).abs() - r / 6,
            "square": torch.maximum(across, long) - r,
            "frame": (torch.maximum(across, long) - r).abs() - r / 6,
            "cross": torch.minimum(bar, column),
            "bar": bar,
            "column": column,
            "diamond": across + long - r,
            "triangle": torch.maximum(across - (y + r) / 2, y - r),
            "checkers": torch.maximum(torch.maximum(across, long) - r, -x * y / r),
        }[SHAPES[label]]
        expected = (0.5 - distance).clamp(0, 1) * (160 + 95 * grey)
        assert (image.double() - expected).abs().max() < 0.51, SHAPES[label]  # rounded to a whole level

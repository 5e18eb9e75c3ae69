"""The data: one to four discs or squares, drawn when the data set is built."""

import torch

from ldm.data.memory import InMemoryDataset
from ldm.tensors import derive_seed

NUMBERS, SHAPES = ("one", "two", "three", "four"), ("disc", "square")


class Shapes(InMemoryDataset):
    """White shapes on black, at most one in each quadrant: (1, size, size); a class for each number and shape."""

    def __init__(self, split: str, num: int = 4000, size: int = 32, seed: int = 0, flip: bool = True):
        generator = torch.Generator().manual_seed(derive_seed(seed, split))
        label = torch.arange(num) % 8
        corner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]) * size / 2
        centre = corner + size / 4 + (torch.rand(num, 4, 2, generator=generator) - 0.5) * size / 8
        radius = size * (0.1 + 0.06 * torch.rand(num, 4, generator=generator))
        is_drawn = torch.rand(num, 4, generator=generator).argsort(1) <= label[:, None] % 4  # which of the quadrants
        pixel = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))  # (2, size, size)
        offset = (pixel - centre[..., None, None]).abs()  # (num, 4, 2, size, size)
        distance = torch.where((label < 4)[:, None, None, None], offset.norm(dim=2), offset.amax(2))
        images = ((distance < radius[..., None, None]) & is_drawn[..., None, None]).any(1)
        names = [f"{number} {shape}{'s' * (number != 'one')}" for shape in SHAPES for number in NUMBERS]
        captions = {name: [name, f"a picture of {name}", f"{name} on black"] for name in names}
        super().__init__(f"shapes-{split}", images[:, None].byte() * 255, label, captions, seed, flip)

import torch
from helpers import read_image

from ldm.io.atoms import Atoms, to_sample
from ldm.media.medium import load_medium

CARBON_MONOXIDE = to_sample(Atoms(torch.tensor([[0.0, 0.5, 0.0], [0.0, -0.5, 0.1]]), torch.tensor([1, 3])))


def test_atoms_are_written_as_xyz_and_drawing(tmp_path):
    medium = load_medium("atoms")
    xyz, png = medium.write(tmp_path / "000003", CARBON_MONOXIDE, {"prompt": "a gas"})
    lines = xyz.read_text().splitlines()
    assert (xyz.name, lines[:2], len(lines)) == ("000003.xyz", ["2", "a gas"], 4)
    assert lines[2] == "C 0.00000 0.50000 -0.05000"
    drawn = read_image(png)
    middle = drawn[:, 100]  # from above: carbon is dark, oxygen is red
    assert middle[90].tolist() == [0x40] * 3
    assert middle[110].tolist() == [0xFF, 0x0D, 0x0D]
    empty = torch.full_like(CARBON_MONOXIDE, -1.0)
    assert medium.write(tmp_path / "000004", empty, {})[0].read_text() == "0\n\n"
    sheet = medium.sheet([CARBON_MONOXIDE, empty], 2)
    assert bool((sheet[:, :, 202:] == 1).all())
    assert torch.equal(((sheet[:, 2:202, 2:202] + 1) * 127.5).round().byte().permute(1, 2, 0), drawn.byte())
    assert not medium.fault((8, 29))
    assert "(3, 29) are no atoms" in medium.fault((3, 29))

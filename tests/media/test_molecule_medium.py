import torch
from helpers import read_image
from PIL import Image

from ldm.io.molecules import LENGTH, SELFIES, SMILES, read_molecule, to_sample
from ldm.media import molecule
from ldm.media.medium import load_medium

ETHANOL = to_sample(torch.tensor(SMILES.encode(read_molecule("OCC"))), SMILES)
BROKEN = to_sample(torch.tensor([SMILES.symbols.index("(")] + [0] * (LENGTH - 1)), SMILES)


def test_molecule_is_written_as_smiles_and_drawing(tmp_path):
    medium = load_medium("molecule")
    noisy = ETHANOL + 0.5 * torch.rand(ETHANOL.shape, generator=torch.Generator().manual_seed(0))  # not exactly one-hot
    smi, png = medium.write(tmp_path / "000003", noisy, {"prompt": "a molecule"})
    assert (smi.name, smi.read_text()) == ("000003.smi", "CCO\n")
    with Image.open(png) as file:
        assert file.text == {"prompt": "a molecule"}
    drawn = read_image(png)
    assert drawn.shape == (molecule.SIDE, molecule.SIDE, 3)
    red = (drawn[..., 0] > 200) & (drawn[..., 1] < 60)
    assert 20 < int(red.sum()) < 2000  # the oxygen
    smi, png = medium.write(tmp_path / "000004", BROKEN, {})
    assert smi.read_text() == "(\n"  # as it was drawn
    assert int((read_image(png) < 100).sum()) > 20  # words, and no structure


def test_molecule_sheet_draws_all_and_samples_of_either_vocabulary():
    medium = load_medium("molecule")
    sheet = medium.sheet([ETHANOL, BROKEN, ETHANOL], 2)
    side = molecule.SIDE + 2
    assert sheet.shape == (3, 2 * side + 2, 2 * side + 2)
    assert sheet.abs().max() == 1
    first, third = sheet[:, 2:side, 2:side], sheet[:, side + 2 : -2, 2:side]
    assert torch.equal(first, third)
    assert bool((sheet[:, side + 2 :, side + 2 :] == 1).all())  # nothing there
    ethane = to_sample(torch.tensor(SELFIES.encode(read_molecule("CC"))), SELFIES)
    assert not torch.equal(medium.sheet([ethane], 1)[:, 2:side, 2:side], first)
    assert not medium.is_picture
    assert [medium.fault((len(v.symbols), LENGTH)) for v in (SELFIES, SMILES)] == ["", ""]
    assert "(1, 28, 28) are no molecules" in medium.fault((1, 28, 28))

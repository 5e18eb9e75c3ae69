import pytest
import torch

from ldm.errors import UserError
from ldm.io.atoms import MAX_ATOMS, REACH, Atoms, from_sample, random_rotation, to_sample

WATER = Atoms(torch.tensor([[0.0, 0.0, 0.4], [0.76, 0.0, -0.2], [-0.76, 0.0, -0.2]]), torch.tensor([3, 0, 0]))


def test_atoms_and_samples_are_inverses():
    sample = to_sample(WATER)
    assert sample.shape == (8, MAX_ATOMS)
    assert sample.abs().max() == 1
    assert sample[:3, 1].tolist() == pytest.approx([0.76 / REACH, 0, -0.2 / REACH])
    assert sample[3:, 0].tolist() == [-1, -1, -1, 1, -1]
    assert bool((sample[:3, 3:] == 0).all())
    assert bool((sample[3:, 3:] == -1).all())
    back = from_sample(sample[:, torch.randperm(MAX_ATOMS, generator=torch.Generator().manual_seed(0))])  # a set
    order = back.elements.argsort(descending=True)
    assert back.elements[order].tolist() == [3, 0, 0]
    torch.testing.assert_close(back.positions.norm(dim=1).sort().values, WATER.positions.norm(dim=1).sort().values)
    moved = sample.clone()
    moved[0] += 0.25  # padding as well
    torch.testing.assert_close(from_sample(moved).positions, WATER.positions)
    assert WATER.to_xyz("a\nword").splitlines()[:3] == ["3", "a word", "O 0.00000 0.00000 0.40000"]
    assert from_sample(torch.full((8, MAX_ATOMS), -1.0)).to_xyz() == "0\n\n"


@pytest.mark.parametrize(
    "positions",
    [torch.zeros(0, 3), torch.zeros(MAX_ATOMS + 1, 3), torch.tensor([[0, 0, 9.0]]), torch.tensor([[torch.nan] * 3])],
)
def test_atoms_that_do_not_fit_are_one_line(positions):
    with pytest.raises(UserError, match="expected 1 to 29, within 8 angstrom"):
        to_sample(Atoms(positions, torch.zeros(len(positions), dtype=torch.long)))


def test_other_samples_are_refused():
    with pytest.raises(UserError, match=r"\(27, 56\) are no atoms; expected \(8, 29\)"):
        from_sample(torch.zeros(27, 56))


def test_rotations_are_proper_and_uniform():
    """R R' = 1 and det R = 1; of uniform rotations the mean is 0 and the mean square of each entry 1/3."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.stack([random_rotation(generator) for _ in range(3000)]).double()
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).double().expand(3000, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(3000).double(), atol=1e-6, rtol=0)
    assert turns.mean(0).abs().max() < 5 * (1 / 3 / 3000) ** 0.5
    assert (turns.square().mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / 3000) ** 0.5

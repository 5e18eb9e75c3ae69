import pytest
import torch

from ldm.conditioner.vector import Vector
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise

NAN = float("nan")


def test_vector_is_standardised_and_marks_what_is_missing():
    conditioner = Vector(mean=[1.0, 2.0], std=[2.0, 0.5])
    cond = conditioner({"vector": torch.tensor([[3.0, 1.0], [NAN, 3.0]])})
    assert cond.vector.tolist() == [[1, -2, 1, 1], [0, 2, 0, 1]]
    assert conditioner.vector_dim == 4
    null = conditioner.null({"vector": torch.ones(2, 2)}).vector
    assert torch.equal(null, torch.zeros(2, 4))
    assert torch.equal(conditioner({"vector": torch.full((2, 2), NAN)}).vector, null)
    assert not conditioner.state_dict()


def test_vector_drops_numbers_in_training_only_by_key():
    conditioner = Vector(mean=[0.0, 0.0], std=[1.0, 1.0], drop=0.25).train()
    batch = {"vector": torch.ones(4000, 2), "noise": KeyedNoise(3, range(4000))}
    cond = conditioner(batch).vector
    assert torch.equal(cond[:, :2], cond[:, 2:])  # a number and its mark
    assert ((1 - cond[:, 2:].mean(0)) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    both = (cond[:, 2:].sum(1) == 0).double().mean()
    assert abs(both - 0.25**2) < 4 * (0.0625 * 0.9375 / 4000) ** 0.5  # independently
    part = conditioner({"vector": torch.ones(3, 2), "noise": KeyedNoise(3, [7, 0, 3999])}).vector
    assert torch.equal(part, cond[[7, 0, 3999]])
    assert bool((conditioner.eval()(batch).vector == 1).all())


def test_vector_rejects_other_lengths_and_options():
    with pytest.raises(ConfigError, match=r"vector of \(2, 3\): expected 2 numbers for each row"):
        Vector([0.0, 0.0], [1.0, 1.0])({"vector": torch.ones(2, 3)})
    with pytest.raises(ConfigError, match="2 of mean, 1 of std; expected as many, std above 0"):
        Vector([0.0, 0.0], [1.0])
    with pytest.raises(ConfigError, match="expected as many, std above 0"):
        Vector([0.0], [0.0])
    with pytest.raises(ConfigError, match=r"conditioner.drop=1.5: expected a probability"):
        Vector([0.0], [1.0], drop=1.5)

import pytest
import torch

from ldm.conditioner.label import Label, LabelVector
from ldm.conditioner.none import Unconditional

BATCH = {"label": torch.tensor([3, 0, 3])}


@pytest.mark.parametrize(
    ("conditioner", "field", "shape"), [(Label, "context", (3, 1, 8)), (LabelVector, "vector", (3, 8))]
)
def test_label_selects_embedding_row(conditioner, field, shape):
    made = conditioner(4, dim=8)
    told, null = getattr(made(BATCH), field), getattr(made.null(BATCH), field)
    assert told.shape == null.shape == shape
    assert torch.equal(told.flatten(1), made.embedding.weight[[3, 0, 3]])
    assert torch.equal(null.flatten(1), made.embedding.weight[[4, 4, 4]])
    assert (made.context_dim, made.vector_dim) == ((8, None) if field == "context" else (None, 8))
    (told.sum() + null.sum()).backward()
    assert made.embedding.weight.grad[:, 0].tolist() == [1, 0, 0, 2, 3]


@pytest.mark.parametrize("conditioner", [Label, LabelVector])
@pytest.mark.parametrize("label", [-2, 4])  # 4 is the null row, which is not to be asked for by accident
def test_label_rejects_out_of_range(conditioner, label):
    with pytest.raises(ValueError, match=f"label={label}: expected 0 to 3"):
        conditioner(4, dim=8)({"label": torch.tensor([0, label])})


@pytest.mark.parametrize(("conditioner", "field"), [(Label, "context"), (LabelVector, "vector")])
def test_label_minus_one_is_null(conditioner, field):
    made = conditioner(4, dim=8)
    cond, null = getattr(made({"label": torch.tensor([-1, 0])}), field), getattr(made.null(BATCH), field)
    assert torch.equal(cond[0], null[0])
    assert torch.equal(cond[1].flatten(), made.embedding.weight[0])


def test_unconditional_equals_its_null():
    nothing = Unconditional()
    cond = nothing(BATCH).where(torch.tensor([True, False, True]), nothing.null(BATCH))
    assert cond == nothing(BATCH)
    assert nothing.context_dim is None
    assert nothing.vector_dim is None

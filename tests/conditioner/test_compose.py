import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.conditioner.compose import Compose
from ldm.conditioner.label import Label, LabelVector


class Fixed(nn.Module):
    """Tells two tokens of width 6, the second masked, a vector of width 2, a map and a hint; zeros for null."""

    keys = ("caption",)
    context_dim, vector_dim, concat_channels = 6, 2, 1

    def forward(self, batch):
        return Condition(
            torch.ones(2, 2, 6),
            torch.tensor([[True, False]] * 2),
            torch.ones(2, 2),
            torch.ones(2, 1, 4, 4),
            (torch.ones(2, 3, 8, 8),),
        )

    def null(self, batch):
        return self(batch).map(torch.zeros_like)


BATCH = {"label": torch.tensor([1, 2]), "caption": ["a", "b"]}


def test_compose_joins_conditions():
    both = Compose(label=Label(3, dim=4), fixed=Fixed(), style=LabelVector(3, dim=5))
    assert both.keys == ("label", "caption")
    assert (both.context_dim, both.vector_dim, both.concat_channels) == (6, 7, 1)
    cond, label = both(BATCH), both.conditioners["label"]
    assert torch.equal(cond.context[:, :1], both.widen["label"](label(BATCH).context))
    assert torch.equal(cond.context[:, 1:], torch.ones(2, 2, 6))
    assert cond.mask.tolist() == [[True, True, False]] * 2
    assert torch.equal(cond.vector, torch.cat([torch.ones(2, 2), both.conditioners["style"](BATCH).vector], 1))
    assert cond.concat.shape == (2, 1, 4, 4)
    assert len(cond.hint) == 1


def test_compose_null_joins_nulls():
    both = Compose(label=Label(3, dim=4), fixed=Fixed())
    null = both.null(BATCH)
    assert torch.equal(null.context[:, :1], both.widen["label"](both.conditioners["label"].null(BATCH).context))
    assert not null.vector.any()
    both(BATCH).where(torch.tensor([True, False]), null)


def test_compose_does_not_project_equal_widths_or_add_masks():
    two = Compose(a=Label(3, dim=4), b=Label(3, dim=4))
    assert not two.widen
    cond = two(BATCH)
    assert cond.context.shape == (2, 2, 4)
    assert cond.mask is None
    assert cond.vector is None
    assert two.vector_dim is None


def test_compose_parameters_are_conditioners_and_projections():
    names = {name.split(".")[0] for name, _ in Compose(label=Label(3, dim=4), fixed=Fixed()).named_parameters()}
    assert names == {"conditioners", "widen"}


def test_compose_requires_a_conditioner():
    with pytest.raises(ValueError, match="at least one conditioner"):
        Compose()

import pytest
import torch

from ldm.condition import Condition, expand_spatial
from ldm.errors import ConfigError


def full(b: int, length: int = 3, value: float = 1.0) -> Condition:
    return Condition(
        context=torch.full((b, length, 2), value) * torch.arange(1, b + 1)[:, None, None],
        mask=torch.ones(b, length, dtype=torch.bool),
        vector=torch.full((b, 5), value),
        concat=torch.full((b, 1, 2, 2), value),
        hint=(torch.full((b, 3, 4, 4), value), torch.full((b, 3, 8, 8), value)),
    )


def test_cat_concatenates_every_field():
    both = full(2).cat(full(3, value=-1.0))
    assert both.context.shape == (5, 3, 2)
    assert both.vector[:, 0].tolist() == [1, 1, -1, -1, -1]
    assert both.concat.shape == (5, 1, 2, 2)
    assert [h.shape[0] for h in both.hint] == [5, 5]
    assert both.mask.all()


def test_cat_pads_and_masks_shorter_context():
    both = full(1, 2).cat(full(1, 4, value=2.0))
    assert both.context.shape == (2, 4, 2)
    assert both.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert not both.context[0, 2:].any()
    assert torch.equal(both.context[1], full(1, 4, value=2.0).context[0])


def test_cat_adds_mask_only_when_needed():
    a, b = Condition(context=torch.ones(1, 3, 2)), Condition(context=torch.ones(1, 3, 2))
    assert a.cat(b).mask is None
    masked = Condition(context=torch.ones(1, 3, 2), mask=torch.tensor([[True, False, False]]))
    assert a.cat(masked).mask.tolist() == [[True] * 3, [True, False, False]]
    assert a.cat(Condition(context=torch.ones(1, 2, 2))).mask.tolist() == [[True] * 3, [True, True, False]]


def test_cat_accepts_several():
    assert full(1).cat(full(2), full(3)).vector.shape == (6, 5)


def test_cat_rejects_different_fields():
    with pytest.raises(ValueError, match="different fields"):
        Condition(vector=torch.ones(1, 2)).cat(Condition(context=torch.ones(1, 2, 2)))
    with pytest.raises(ValueError, match="different fields"):
        Condition(hint=(torch.ones(1, 3, 2, 2),)).cat(Condition())


def test_where_selects_rows():
    keep = torch.tensor([True, False, True])
    mixed = full(3, 2, 1.0).where(keep, full(3, 4, -1.0))
    assert mixed.vector[:, 0].tolist() == [1, -1, 1]
    assert mixed.context[:, 0, 0].tolist() == [1, -2, 3]
    assert mixed.mask.sum(1).tolist() == [2, 4, 2]
    assert mixed.hint[1][:, 0, 0, 0].tolist() == [1, -1, 1]
    nothing = Condition().where(keep, Condition())
    assert nothing == Condition()


def test_where_all_true_is_identity():
    a, b = full(3), full(3, value=-1.0)
    kept = a.where(torch.ones(3, dtype=torch.bool), b)
    assert torch.equal(kept.context, a.context)
    assert torch.equal(a.where(torch.zeros(3, dtype=torch.bool), b).context, b.context)


def test_index_selects_rows_of_every_field():
    some = full(4).index([3, 1])
    assert some.context[:, 0, 0].tolist() == [4, 2]
    assert some.hint[0].shape[0] == 2
    assert full(4).index(slice(1, 3)).vector.shape == (2, 5)


def test_to_casts_numbers_but_not_mask():
    cast = full(2).to(torch.float64)
    assert cast.context.dtype == cast.vector.dtype == cast.hint[0].dtype == torch.float64
    assert cast.mask.dtype == torch.bool


def test_cat_does_not_modify_inputs():
    a, b = full(1, 2), full(1, 4)
    a.cat(b)
    assert a.context.shape == (1, 2, 2)
    assert a.mask.shape == (1, 2)


def test_cat_concatenates_labels_that_all_have():
    a, b = (Condition(vector=torch.ones(2, 1), label=torch.tensor(labels)) for labels in ([3, 1], [4, 1]))
    assert a.cat(b).label.tolist() == [3, 1, 4, 1]
    assert a.cat(Condition(vector=torch.ones(1, 1))).label is None
    assert Condition(vector=torch.ones(1, 1)).cat(a).label is None


def test_concat_of_one_cell_is_expanded_to_the_latents():
    cell = Condition(concat=torch.arange(2.0).reshape(2, 1, 1, 1))
    wide = cell.expand_concat(3, 4)
    assert torch.equal(wide.concat, cell.concat.expand(2, 1, 3, 4))
    assert wide.expand_concat(3, 4) is wide
    assert Condition().expand_concat(3, 4) == Condition()
    with pytest.raises(ConfigError, match="the condition is for latents of 3x4, those to be sampled are 4x3"):
        wide.expand_concat(4, 3)


def test_one_cell_takes_the_size_of_the_others():
    """The null of a spatial condition is one cell; nulls alone stay as they are."""
    cell, wide, whole = torch.full((2, 1, 1), 5.0), torch.ones(2, 1, 4), torch.ones(2, 1, 3, 4)
    expanded = expand_spatial([cell, wide])
    assert torch.equal(expanded[0], cell.expand(-1, -1, 4))
    assert torch.equal(expanded[1], wide)
    assert [part.shape[2:] for part in expand_spatial([cell[..., None], whole])] == [(3, 4), (3, 4)]
    assert [part.shape for part in expand_spatial([cell, cell])] == [cell.shape] * 2
    assert expand_spatial([None, None]) == [None, None]

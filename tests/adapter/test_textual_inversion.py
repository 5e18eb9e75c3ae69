"""Textual inversion: nothing at first, the word alone learns, and only captions that have it hear it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.adapter.textual_inversion import TextualInversion, replace_embeddings
from ldm.condition import Condition
from ldm.conditioner.tokens import TextFeatures

WORDS = ["", "a", "cat", "zor", "bo", "dog", "hat"]


class Encoder(nn.Module):
    """Words as pieces; a text is the running mean of its pieces' vectors."""

    length, context_dim, vector_dim = 6, 4, 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(len(WORDS), 4).requires_grad_(False)

    def token_ids(self, text):
        return [WORDS.index(word) for word in text.replace("zorbo", "zor bo").split()]

    def features(self, texts, length):
        every = [self.token_ids(text) for text in texts]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in every], batch_first=True)
        embedded = self.embedding(ids)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(one)] for one in every])
        return TextFeatures(embedded.cumsum(1), mask, (embedded * mask[..., None]).sum(1))


@pytest.fixture
def model():
    encoder = Encoder()
    told = SimpleNamespace(
        keys=("caption",), context_dim=4, vector_dim=4, cache=SimpleNamespace(encoder=encoder, length=6)
    )

    class Told(nn.Module):
        keys, context_dim, vector_dim, cache = ("caption",), 4, 4, told.cache

        def forward(self, batch):
            features = encoder.features(batch["caption"], 6)
            return Condition(features.context, features.mask, features.vector)

    return SimpleNamespace(conditioner=Told(), requires_grad_=lambda flag: None)


def test_textual_inversion_starts_at_initializer_and_trains_alone(model):
    TextualInversion("zorbo").apply_to(model)
    told, encoder = model.conditioner, model.conditioner.cache.encoder
    assert told.vectors.shape == (2, 4)
    captions = ["a zorbo hat", "dog"]
    before, cond = encoder.features(captions, 6), told({"caption": captions})
    assert torch.equal(cond.context, before.context)
    assert cond.vector.norm(dim=1).tolist() == pytest.approx([2.0, 2.0])
    cond.context.sum().backward()
    assert told.vectors.grad.abs().sum() > 0
    assert encoder.embedding.weight.grad is None
    with torch.no_grad():
        told.vectors += 1
    after = told({"caption": captions}).context
    assert torch.allclose(
        after[0] - before.context[0],
        torch.tensor([0.0, 1.0, 2.0, 2.0])[:, None].expand(4, 4)[: after.shape[1]],
        atol=1e-6,
    )
    assert torch.equal(after[1], before.context[1])
    assert not encoder.embedding._forward_hooks
    told.vectors.grad = None
    other = told({"caption": ["a dog"]}).context
    assert torch.equal(other, encoder.features(["a dog"], 6).context)
    other.sum().backward()
    assert told.vectors.grad.abs().sum() == 0
    assert not told.eval()({"caption": ["a dog"]}).context.requires_grad


def test_textual_inversion_supports_several_tokens_and_scale(model):
    TextualInversion("zorbo", initializer_token="cat").apply_to(model, 0.5)
    table = model.conditioner.cache.encoder.embedding.weight
    assert torch.equal(model.conditioner.vectors, table[2].expand(2, 4))
    with torch.no_grad():
        model.conditioner.vectors += 1
    TextualInversion("hat").apply_to(model)
    with torch.no_grad():
        model.conditioner.vectors -= 3
    context = model.conditioner({"caption": ["zorbo hat"]}).context[0]
    steps = torch.stack([table[2] + 0.5, table[2] + 0.5, table[6] - 3])
    assert torch.allclose(context, steps.cumsum(0), atol=1e-6)


def test_replace_embeddings_counts_consecutive_pieces():
    ids = torch.tensor([[3, 4, 3, 2, 4], [4, 3, 3, 4, 3]])
    vectors = torch.full((2, 1), 9.0)
    found = replace_embeddings(torch.zeros(2, 5, 1), ids, [3, 4], vectors)[..., 0] > 0
    assert found.tolist() == [[True, True, False, False, False], [False, False, True, True, False]]
    assert replace_embeddings(torch.zeros(2, 1, 1), ids[:, :1], [3, 4], vectors).sum() == 0


def test_textual_inversion_rejects_model_without_text(model):
    model.conditioner = SimpleNamespace(keys=("label",))
    with pytest.raises(ValueError, match="whose only conditioner is minilm or clip"):
        TextualInversion("zorbo").apply_to(model)


def test_textual_inversion_vector_has_the_norm_of_unit_variance(model):
    TextualInversion("zorbo").apply_to(model)
    model.conditioner.vector_dim = 9
    vector = model.conditioner({"caption": ["zorbo hat", "a zorbo"]}).vector
    torch.testing.assert_close(vector.norm(dim=1), torch.full((2,), 3.0))


def test_vectors_that_sum_to_zero_leave_the_condition_finite(model):
    TextualInversion("zorbo").apply_to(model)
    told = model.conditioner.train()
    nn.init.zeros_(told.vectors)
    cond = told({"caption": ["a hat"]})
    assert cond.context.isfinite().all()
    cond.context.sum().backward()
    assert not told.vectors.grad.any()

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch

from ldm.conditioner.minilm import MiniLM
from ldm.io.download import MINILM, AssetNotFoundError, sha256

RECORDED = json.loads(Path(__file__).with_name("minilm.json").read_text(encoding="utf-8"))


def test_minilm_matches_transformers(minilm):
    context, mask, vector = minilm([row["text"] for row in RECORDED])
    assert context.dtype == vector.dtype == torch.float32
    for row, hidden, real, mean in zip(RECORDED, context, mask, vector, strict=True):
        assert real.sum() == len(row["ids"])
        torch.testing.assert_close(hidden[real][:, ::64], torch.tensor(row["hidden"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(hidden[real].norm(dim=1), torch.tensor(row["norm"]), atol=1e-4, rtol=0)
        torch.testing.assert_close(mean[::16], torch.tensor(row["mean"]), atol=1e-5, rtol=0)


def test_minilm_token_ids_match_transformers(minilm):
    assert [minilm.tokenizer.encode(row["text"]).ids for row in RECORDED] == [row["ids"] for row in RECORDED]


def test_minilm_is_independent_of_padding(minilm):
    alone = minilm(["a bag"])
    beside = minilm(["a bag", "a photo of an ankle boot with a high heel"])
    torch.testing.assert_close(beside.context[:1][:, : alone.context.shape[1]], alone.context, atol=1e-5, rtol=0)
    torch.testing.assert_close(beside.vector[:1], alone.vector, atol=1e-5, rtol=0)


def test_minilm_is_unchanged_by_autocast(minilm):
    with torch.autocast("cpu", torch.bfloat16):
        low = minilm(["a bag"])
    assert torch.equal(low.context, minilm(["a bag"]).context)


def test_minilm_truncates_long_text_with_warning(minilm, caplog):
    before = minilm.truncation.texts, minilm.truncation.dropped
    with caplog.at_level(logging.WARNING):
        context, mask, _ = minilm(["bag " * 300])
    assert context.shape == (1, 256, 384)
    assert mask.all()
    assert "302 tokens cut to 256, 46 tokens dropped" in caplog.text
    assert (minilm.truncation.texts, minilm.truncation.dropped) == (before[0] + 1, before[1] + 46)
    end, whole = minilm(["bag bag"], length=3), minilm(["bag"])
    assert torch.equal(end.context, whole.context)  # the end mark stays


def test_minilm_is_frozen(minilm):
    assert not any(p.requires_grad for p in minilm.parameters())
    assert not minilm.training
    assert not minilm(["a bag"]).context.requires_grad


def test_minilm_identity_is_hash_of_weights(minilm):
    assert minilm.identity == MINILM["model.safetensors"] == sha256(minilm.weights)


def test_minilm_identity_of_own_folder_is_hash_of_its_weights(tmp_path, minilm, monkeypatch):
    monkeypatch.setattr(MiniLM, "_load", lambda self: None)
    (tmp_path / "tokenizer.json").write_bytes((minilm.weights.parent / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert MiniLM(tmp_path).identity == hashlib.sha256(b"other weights").hexdigest()


def test_minilm_rejects_wrong_files(tmp_path, minilm):
    from safetensors.torch import load_file, save_file

    with pytest.raises(AssetNotFoundError, match=r"model\.safetensors and tokenizer\.json not in"):
        MiniLM(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((minilm.weights.parent / "tokenizer.json").read_bytes())
    save_file({"embeddings.LayerNorm.weight": torch.ones(384)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not all-MiniLM-L6-v2: .* names differ"):
        MiniLM(tmp_path)
    save_file({name: torch.ones(7) for name in load_file(minilm.weights)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not all-MiniLM-L6-v2: .*shape"):
        MiniLM(tmp_path)


def test_minilm_features_pass_gradients_to_embedding(minilm):
    """Gradients reach what the embedding gives, through features and not through forward; nothing else is different."""
    told = []

    def marked(module, args, out):
        told.append(out.detach().requires_grad_())
        return told[-1]

    hook = minilm.embedding.register_forward_hook(marked)
    try:
        minilm.features(["a bag"]).context.sum().backward()
        assert told[0].grad.abs().sum() > 0
        assert not minilm(["a bag"]).context.requires_grad
    finally:
        hook.remove()
    assert minilm.token_ids("a bag") == minilm.tokenizer.encode("a bag").ids[1:-1]

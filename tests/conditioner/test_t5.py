"""T5 through transformers: the features of its own forward, by a folder alone, and one line without it."""

import logging

import pytest
import torch

from ldm.conditioner.t5 import T5
from ldm.conditioner.text import Text
from ldm.io.download import AssetNotFoundError

WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁bag", "▁photo", "▁of", "▁ankle", "▁boot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 of two small layers that knows nine words, as transformers saves one."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    place = tmp_path_factory.mktemp("t5")
    words = Tokenizer(Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=2))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(place)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(
        place
    )
    return place


def test_t5_matches_transformers(folder):
    from transformers import AutoTokenizer, T5EncoderModel

    texts = ["a photo of a bag", "boot"]
    context, mask, vector = T5(str(folder))(texts)
    theirs, words = T5EncoderModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state
    assert mask.tolist() == ids["attention_mask"].bool().tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    torch.testing.assert_close(context[mask], expected[mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(vector[1], expected[1, :2].mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_loads_float32_for_either_dtype_argument(folder, tmp_path, monkeypatch, stored):
    """transformers 4.50 knows no `dtype` and calls the file damaged if it is given one, transformers 5 knows no
    `torch_dtype`.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    theirs = T5EncoderModel.from_pretrained(folder).to(stored)
    theirs.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    load = T5EncoderModel.from_pretrained.__func__

    def without_types(cls, source, **options):
        assert not options.keys() & {"dtype", "torch_dtype"}
        return load(cls, source, **options)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", classmethod(without_types))
    net = T5(str(tmp_path)).net
    assert all(p.dtype == torch.float32 for p in net.parameters())
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in net.state_dict().items())


def test_t5_through_text_conditioner(folder, caplog):
    text = Text(T5(str(folder)), max_length=4)
    with caplog.at_level(logging.WARNING):
        cond = text({"caption": ["a photo of a bag", "boot"]})
    assert "text of 6 tokens cut to 4, 2 tokens dropped" in caplog.text
    assert cond.context.shape == (2, 4, text.context_dim)
    assert cond.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert text.null({"label": torch.zeros(2)}).mask[0, 0]
    assert text.tokenize("a photo of") == ["a", "photo", "of"]
    assert len(text.identity) == 64
    assert not list(text.parameters())


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (None, AssetNotFoundError, "model=null"),
        ("no/such/folder", AssetNotFoundError, "no/such/folder: no such folder"),
        ("google/flan-t5-none", AssetNotFoundError, "is not in the Hugging Face hub's cache"),
    ],
)
def test_t5_reports_missing_weights(model, error, said):
    with pytest.raises(error, match=said) as found:
        T5(model)
    assert "\n" not in str(found.value)


def test_t5_reads_folder_of_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert T5(f"~/{folder.name}").context_dim == 16


def test_t5_asks_hub_only_for_name_and_when_allowed(folder, monkeypatch):
    from transformers import T5EncoderModel

    asked = []

    def refuse(source, local_files_only, **options):
        asked.append((source, local_files_only))
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", refuse)
    with pytest.raises(
        AssetNotFoundError, match=r"not fetched \(no route to the hub\): fetch it with hub=true, or name"
    ):
        T5("google/flan-t5-base")
    with pytest.raises(AssetNotFoundError, match=r"not fetched \(no route to the hub\): name a folder, model=FOLDER"):
        T5("google/flan-t5-base", hub=True)
    with pytest.raises(ValueError, match="damaged, or not T5's: no route to the hub"):
        T5(str(folder), hub=True)
    assert asked == [("google/flan-t5-base", True), ("google/flan-t5-base", False), (str(folder), True)]


def test_t5_reports_damaged_folder(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"copy: damaged, or not T5's") as found:
        T5(str(copy))
    assert "\n" not in str(found.value)


def test_t5_fingerprint_tells_what_decides_features(folder):
    t5 = T5(str(folder))
    before = t5.fingerprint
    assert before == T5(str(folder)).fingerprint
    t5.tokenizer.add_tokens(["ring"])
    assert t5.fingerprint != before
    other = T5(str(folder))
    other.net.shared.weight[0, 0] += 1
    assert other.fingerprint != before


def test_t5_rejects_incomplete_weights(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"copy: not T5's weights, 1 are missing"):
        T5(str(copy))

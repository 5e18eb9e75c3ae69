"""Small text and image encoders with random weights, in the place of those that are downloaded."""

import json
from functools import cache
from pathlib import Path

import torch

from ldm.conditioner.minilm import Bert, MiniLM
from ldm.data.synthetic import SHAPES

WORDS = ("a", "photo", "of", "white", "on", "black", "one", "some", "size", "prior", "subject", *SHAPES)
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class TinyMiniLM(MiniLM):
    """MiniLM's code with one layer of 16 channels. path: a folder of `write_towers`."""

    context_dim = vector_dim = 16

    def _load(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.bert = Bert(self.tokenizer.get_vocab_size(), 512, 16, 2, 32, 1)


def write_towers(folder: Path) -> Path:
    """Write clip.json, a small CLIP's config, and the folders t5 and bert, which know the words of the synthetic data.

    bert: tokenizer.json, and an empty model.safetensors, whose hash is the identity of TinyMiniLM.
    """
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import Unigram, WordPiece
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip.json").write_text(json.dumps(CLIP))
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in WORDS)]
    t5 = Tokenizer(Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    words = PreTrainedTokenizerFast(tokenizer_object=t5, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    words.save_pretrained(folder / "t5")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        T5EncoderModel(config).save_pretrained(folder / "t5")
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    bert = Tokenizer(WordPiece({word: i for i, word in enumerate((*marks, *WORDS))}, unk_token="[UNK]"))
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    (folder / "bert").mkdir(exist_ok=True)
    bert.save(str(folder / "bert" / "tokenizer.json"))
    (folder / "bert" / "model.safetensors").touch()
    return folder


@cache
def conditioner_overrides(option: str, folder: Path, prefix: str = "conditioner") -> tuple[str, ...]:
    """Return the overrides by which a conditioner that needs a download is built from the files of `write_towers`."""
    encoder = f"{prefix}.encoder"
    return {
        "clip": (f"{encoder}.model={folder}/clip.json", f"{encoder}.random=true"),
        "clip_context": (f"{encoder}.model={folder}/clip.json", f"{encoder}.random=true"),
        "clip_image": (f"{prefix}.model={folder}/clip.json", f"{prefix}.random=true"),
        "retrieval": (f"{prefix}.model={folder}/clip.json", f"{prefix}.random=true"),
        "t5": (f"{encoder}.model={folder}/t5",),
        "minilm": (f"{encoder}._target_=towers.TinyMiniLM", f"{encoder}.path={folder}/bert"),
        "wordpiece": (f"{prefix}.vocabulary={folder}/bert/tokenizer.json", f"{prefix}.dim=16", f"{prefix}.layers=1"),
    }.get(option, ())

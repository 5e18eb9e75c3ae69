"""CLIP's text tower by its config: open_clip's model names, transformers' config.json, and the words that both cut prompts into."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.interop.pipeline import require_values
from ldm.io import atomic
from ldm.io.download import cache_dir
from ldm.io.extras import extra
from ldm.io.parse import parse_json

NAMED = ("ViT-L-14-quickgelu", "ViT-H-14", "ViT-bigG-14")  # of Stable Diffusion 1, 2 and XL
REQUIRED_VALUES = {
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}  # what transformers' config must say for open_clip's tower to compute the same
ACT = {"quick_gelu": True, "gelu": False}
END = 49407  # the end-of-text token, whose state is pooled


def open_clip_config(model: str) -> dict[str, Any]:
    """open_clip's config of a model, by name or of a .json file. Raises UserError for a name that it does not have."""
    if model.endswith(".json"):
        try:
            return dict(parse_json(Path(model).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"model={model} is no JSON object ({error}); expected a config of open_clip") from None
    with extra("clip", f"CLIP {model}"):
        import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"model={model}: open_clip has no such model; open_clip.list_models() names them")
    return config


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of an open_clip config decides its text tower."""
    text = config["text_cfg"]
    numbers = {name: text[name] for name in ("width", "heads", "layers", "context_length", "vocab_size")}
    quick = bool(config.get("quick_gelu", False))
    return {**numbers, "mlp_ratio": text.get("mlp_ratio", 4.0), "quick_gelu": quick, "embed_dim": config["embed_dim"]}


def to_transformers(config: Mapping[str, Any], depth: int, pad: int) -> dict[str, Any]:
    """transformers' CLIPTextModel config of an open_clip config; depth: layers kept.  pad: the token after the end."""
    one = shape(config)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": one["vocab_size"],
        "hidden_size": one["width"],
        "intermediate_size": int(one["width"] * one["mlp_ratio"]),
        "num_hidden_layers": depth,
        "num_attention_heads": one["heads"],
        "max_position_embeddings": one["context_length"],
        "projection_dim": one["embed_dim"],
        "hidden_act": "quick_gelu" if one["quick_gelu"] else "gelu",
        **REQUIRED_VALUES,
        **{"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": pad},
    }


def of_transformers(given: Mapping[str, Any]) -> dict[str, Any]:
    """An open_clip config, with an image tower too small to matter, of transformers' CLIPTextModel config. Raises UserError."""
    require_values(given, REQUIRED_VALUES, "text_encoder/config.json")
    act = given.get("hidden_act", "quick_gelu")
    if act not in ACT:
        raise UserError(f"text_encoder/config.json: hidden_act={act}: expected one of {', '.join(ACT)}")
    width = given.get("hidden_size", 512)
    text = {
        "width": width,
        "heads": given.get("num_attention_heads", 8),
        "layers": given.get("num_hidden_layers", 12),
        "context_length": given.get("max_position_embeddings", 77),
        "vocab_size": given.get("vocab_size", END + 1),
        "mlp_ratio": given.get("intermediate_size", 4 * width) / width,
    }
    image = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 16, "head_width": 16}
    projection = given.get("projection_dim", 512)
    return {"embed_dim": projection, "vision_cfg": image, "text_cfg": text, "quick_gelu": ACT[act]}


def known_open_clip_name(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """(open_clip's name, layer to read) of a text tower of Stable Diffusion; None for another tower.

    A folder of Stable Diffusion 2 holds 23 of its tower's 24 layers and reads the last: open_clip's layer -2.
    """
    wanted = shape(config)
    for name in NAMED:
        one = shape(open_clip_config(name))
        if {**one, "embed_dim": 0} == {**wanted, "embed_dim": 0}:
            return name, -1
        if {**one, "embed_dim": 0, "layers": one["layers"] - 1} == {**wanted, "embed_dim": 0}:
            return name, -2
    return None


def write_config(config: Mapping[str, Any]) -> str:
    """The file in the cache that holds this open_clip config, named by what it says: what `model` of our CLIP may be."""
    text = json.dumps(config, indent=1, sort_keys=True)
    path = cache_dir() / "clip" / f"clip-{sha256(text.encode()).hexdigest()[:12]}.json"
    atomic.write_text(path, text)
    return str(path)


def tokenizer_files(pad: int, length: int) -> dict[str, str]:
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json of transformers' CLIPTokenizer; pad: after the end."""
    from open_clip.tokenizer import SimpleTokenizer

    cut = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in cut.encoder.items()}
    merges = sorted(cut.bpe_ranks, key=cut.bpe_ranks.__getitem__)
    padding = next(token for token, number in vocabulary.items() if number == pad)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": padding,
    }
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n",
        "tokenizer_config.json": json.dumps({**options, **special}, indent=1),
        "special_tokens_map.json": json.dumps(special, indent=1),
    }

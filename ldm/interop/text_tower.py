"""The text tower and tokenizer of a diffusers pipeline: CLIP's, or the transformer of LDM's text-to-image model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import bert, clip_config, config_nodes, text, weights_file
from ldm.interop.pipeline import Pipeline, require_values
from ldm.io.atomic import CorruptFileError
from ldm.io.download import minilm
from ldm.io.parse import parse_json

# Values that an LDMBertModel must have for ours to be equivalent.
BERT = {"activation_function": "gelu", "scale_embedding": False}
UNCASED = 30_522  # size of BERT's own vocabulary


@dataclass(frozen=True)
class ExportedTextTower:
    """A text tower in diffusers' format.

    config, state: of its folder.  words: files of the tokenizer's folder.  dim: of a token.
    listed: entries of tower and tokenizer in model_index.json.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    words: dict[str, str]
    dim: int
    listed: tuple[list[str], list[str]]


@dataclass(frozen=True)
class ImportedTextTower:
    """A text tower in our format: the conditioner's node and its weights; those of a CLIP tower are separate."""

    node: config_nodes.Node
    text: dict[str, Tensor] = field(default_factory=dict)
    conditioner_state: dict[str, Tensor] = field(default_factory=dict)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a part's config.  Raises UserError if it is missing, CorruptFileError if it is not a JSON object."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a complete pipeline folder of diffusers")
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); download it again") from None


def export_clip(pipeline: Pipeline) -> ExportedTextTower:
    """Convert to transformers' CLIPTextModel and CLIPTokenizer."""
    node = config_nodes.encoder_of(pipeline.config["conditioner"])
    config = clip_config.open_clip_config(node["model"])
    depth = config["text_cfg"]["layers"] + node["layer"] + 1
    tower_config = clip_config.to_transformers(config, depth, node["pad_token_id"])
    words = clip_config.tokenizer_files(node["pad_token_id"], config["text_cfg"]["context_length"])
    listed = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]
    return ExportedTextTower(
        tower_config, text.export_text(pipeline.text, depth), words, config["text_cfg"]["width"], listed
    )


def import_clip(folder: Path, tokenizer: Path) -> ImportedTextTower:
    """Convert a CLIPTextModel and its tokenizer to our conditioner."""
    options = read_config(folder)
    config, state = (
        clip_config.of_transformers(options.get("text_config", options)),
        text.import_text(weights_file.read_weights(folder)),
    )
    special = read_config(tokenizer, "special_tokens_map.json").get("pad_token", "<|endoftext|>")
    pad = clip_config.END if (special["content"] if isinstance(special, dict) else special) == "<|endoftext|>" else 0
    name, layer = clip_config.known_open_clip_name(config) or (clip_config.write_config(config), -1)
    return ImportedTextTower(config_nodes.clip(name, layer, pad, config["text_cfg"]["context_length"]), text=state)


def inpainting_of(folder: Path, tokenizer: Path) -> ImportedTextTower:
    """Convert as `import_clip` does, for a model that also takes mask and masked image."""
    tower = import_clip(folder, tokenizer)
    return replace(tower, node=config_nodes.inpainting(tower.node))


def export_wordpiece(pipeline: Pipeline) -> ExportedTextTower:
    """Convert to diffusers' LDMBertModel and transformers' BertTokenizer."""
    node = pipeline.config["conditioner"]
    file = Path(node["vocabulary"]).expanduser() if node["vocabulary"] else minilm() / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tower_config = {
        **{"_class_name": "LDMBertModel", "architectures": ["LDMBertModel"], "model_type": "ldmbert", **BERT},
        **{
            "vocab_size": len(vocabulary),
            "max_position_embeddings": node["max_length"],
            "d_model": node["dim"],
            "pad_token_id": 0,
        },
        **{"encoder_layers": node["layers"], "encoder_ffn_dim": 4 * node["dim"]},
        **{"encoder_attention_heads": node["num_heads"], "head_dim": node["num_head_channels"]},
    }
    options = {"tokenizer_class": "BertTokenizer", "model_max_length": node["max_length"], "do_lower_case": True}
    words = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n",
        "tokenizer.json": json.dumps({**tokenizer, "padding": None, "truncation": None}, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(options, indent=1),
    }
    state = bert.export_ldmbert(pipeline.conditioner)
    if "to_logits.weight" not in state:  # unused, but part of diffusers' model
        state |= {
            "to_logits.weight": state["model.embed_tokens.weight"] * 0,
            "to_logits.bias": state["model.embed_tokens.weight"][:, 0] * 0,
        }
    return ExportedTextTower(
        tower_config,
        state,
        words,
        node["dim"],
        (["latent_diffusion", "LDMBertModel"], ["transformers", "BertTokenizer"]),
    )


def import_wordpiece(folder: Path, tokenizer: Path) -> ImportedTextTower:
    """Convert an LDMBertModel and its tokenizer to our conditioner.

    The vocabulary is BERT's own or in a tokenizer.json; raises UserError otherwise.
    """
    options = read_config(folder)
    require_values(options, BERT, "bert/config.json")
    dim, tokens = options["d_model"], options.get("vocab_size", UNCASED)
    require_values(options, {"encoder_ffn_dim": 4 * dim}, "bert/config.json")
    vocabulary = tokenizer / "tokenizer.json"
    if tokens != UNCASED and not vocabulary.is_file():
        raise UserError(
            f"{vocabulary}: no such file; expected one for a vocabulary of {tokens} words, "
            f"because BERT's own has {UNCASED}"
        )
    node = {
        "_target_": "ldm.conditioner.transformer.WordPiece",
        **{
            "dim": dim,
            "layers": options["encoder_layers"],
            "num_heads": options["encoder_attention_heads"],
            "num_head_channels": options["head_dim"],
        },
        **{
            "max_length": options.get("max_position_embeddings", 77),
            "keep_logits_head": True,
            "vocabulary": None if tokens == UNCASED else str(vocabulary),
        },
    }
    return ImportedTextTower(node, conditioner_state=bert.import_ldmbert(weights_file.read_weights(folder)))


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class of diffusers.

    stage, text_folder: folders of first stage and text tower.  write, read: convert the tower.
    more: further entries of model_index.json.
    """

    name: str
    stage: str
    text_folder: str
    write: Callable[[Pipeline], ExportedTextTower]
    read: Callable[[Path, Path], ImportedTextTower]
    more: Mapping[str, Any] = field(default_factory=dict)


NONE = [None, None]
SAFETY = {"feature_extractor": NONE, "image_encoder": NONE, "safety_checker": NONE, "requires_safety_checker": False}
CLIP, MASKED = "ldm.conditioner.clip.CLIP", "ldm.conditioner.spatial.MaskedImage"
KINDS = {  # by the classes of our conditioners, or of their encoders
    (CLIP,): PipelineKind("StableDiffusionPipeline", "vae", "text_encoder", export_clip, import_clip, SAFETY),
    (CLIP, MASKED): PipelineKind(
        "StableDiffusionInpaintPipeline", "vae", "text_encoder", export_clip, inpainting_of, SAFETY
    ),
    ("ldm.conditioner.transformer.WordPiece",): PipelineKind(
        "LDMTextToImagePipeline", "vqvae", "bert", export_wordpiece, import_wordpiece
    ),
}


def kind_of(conditioner: Mapping[str, Any]) -> PipelineKind:
    """Return the pipeline class for a conditioner's node.  Raises UserError if there is none."""
    targets = sorted(str((part.get("encoder") or part).get("_target_")) for part in config_nodes.parts_of(conditioner))
    if tuple(targets) not in KINDS:
        raise UserError(
            f"conditioner={', '.join(targets)}: to=diffusers expects a CLIP text tower, alone or with a masked image, "
            "or WordPiece"
        )
    return KINDS[tuple(targets)]

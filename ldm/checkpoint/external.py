"""External models: pipelines of diffusers, checkpoints of CompVis and Stability, DiT and SiT, and files exported by
ldm.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.checkpoint.latent_space import LatentSpace
from ldm.config import build, trust
from ldm.errors import UserError
from ldm.interop import checkpoint, compvis_config, config_nodes, dit_file, folder, single_file, weights_file
from ldm.interop.keymap import load_strict
from ldm.interop.pipeline import Pipeline
from ldm.io.parse import parse_yaml

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion
    from ldm.runs.data_card import DataCard


IGNORED_TEXT_KEYS = ("logit_scale", "attn_mask", "text_projection")  # not used when the text tower's tokens are read


def open_pipeline(run: str | Path, kind: str = "ema", yaml: str | Path | None = None) -> Pipeline:
    """Read the pipeline in a folder of diffusers or in a file, and validate its config as one from the command line is.

    kind: ema or raw, for a checkpoint with both.  yaml: CompVis' config of a checkpoint; by default the .yaml of the
    same name beside it; Stable Diffusion 1 needs none.
    Raises UserError or CorruptFileError naming the file.
    """
    path = Path(run).expanduser()
    pipeline = folder.load(path) if path.is_dir() else open_single_file(path, kind, yaml)
    trust.sanitize_config(pipeline.config, path)
    return pipeline


def open_single_file(path: Path, kind: str, yaml: str | Path | None) -> Pipeline:
    """Read the pipeline in a single file, see `open_pipeline`."""
    state, metadata = weights_file.read_weights(path, kind), weights_file.metadata(path)
    if single_file.KEY in metadata:
        return single_file.load(state, metadata[single_file.KEY], path)
    config_file = Path(yaml).expanduser() if yaml else path.with_suffix(".yaml")
    try:
        if dit_file.is_dit(state):
            return dit_file.load_dit(state, path)
        if yaml or config_file.is_file():
            compvis = read_compvis_yaml(config_file)
            config: dict[str, Any] | None = compvis_config.from_compvis(compvis)
            size = int(compvis["model"]["params"].get("image_size", 64))
        else:
            config, size = checkpoint.detect_sd1(state), 64
        if config is None:
            raise UserError(
                f"nothing says what model it is; put its yaml beside it as {config_file.name}, "
                "or name it, config=FILE.yaml"
            )
        if config["autoencoder"] is None:
            raise UserError(f"{config_file} has no first_stage_config; expected a whole pipeline")
        return checkpoint.load(state, config, size * config["autoencoder"]["factor"], kind)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_compvis_yaml(path: Path) -> dict[str, Any]:
    """Read CompVis' config of a model as plain data. Raises UserError for a missing file or one of other content."""
    if not path.is_file():
        raise UserError(f"config={path}: no such file; expected the yaml of a CompVis model")
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config={path} is no yaml ({str(error)[:120]})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "params" not in config["model"]:
        raise UserError(f"config={path} has no model.params; expected the yaml of a CompVis model")
    return config


def build_from_pipeline(pipeline: Pipeline) -> "LatentDiffusion":
    """Build the model of a pipeline, on the CPU.

    Raises UserError for weights that are not of the config's architecture.
    """
    cfg = trust.sanitize_config(pipeline.config, "the pipeline")
    if pipeline.text:
        # the encoder's weights come with the pipeline
        config_nodes.encoder_of(cfg.conditioner).update({"weights": None, "random": True})
    card = data_card(pipeline.data)
    with trust.construction_errors("the pipeline"):
        autoencoder = build.build_autoencoder(cfg.autoencoder, card.shape[0])
        load_strict(autoencoder, pipeline.autoencoder, "first stage")
        model = build.build_model(cfg, autoencoder, card)
    load_strict(model.denoiser.net, pipeline.net, "U-Net")
    if pipeline.text:
        load_text_tower(text_tower(model), pipeline)
    else:
        load_strict(model.conditioner, pipeline.conditioner, "conditioner")
    return model.eval()


def data_card(data: dict[str, Any]) -> "DataCard":
    """Return a pipeline's data card. Raises UserError for fields that are not a DataCard's."""
    from ldm.runs.data_card import DataCard

    try:
        return DataCard.from_dict(data)
    except UserError:  # a medium that it may not name
        raise
    except ValueError as error:
        raise UserError(f"the file's header does not describe its data ({error}); export it again") from None


class PipelineInfo(NamedTuple):
    """The description of a pipeline.  space: the name of its latent space."""

    config: dict[str, Any]
    card: "DataCard"
    space: str


def pipeline_info(run: str | Path, kind: str = "ema") -> PipelineInfo:
    """Describe the pipeline that `open_pipeline` returns; it is read once as long as the files do not change."""
    path = Path(run).expanduser().absolute()
    first_stage = (path.parent / dit_file.STAGE).glob("*")
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".yaml"), *sorted(first_stage)]
    return _describe(path, kind, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=4)
def _describe(path: Path, kind: str, changed: tuple[int, ...]) -> PipelineInfo:
    pipeline = open_pipeline(path, kind)
    card = data_card(pipeline.data)
    with trust.construction_errors(path):
        autoencoder = build.build_autoencoder(trust.sanitize_config(pipeline.config, path).autoencoder, card.shape[0])
        load_strict(autoencoder, pipeline.autoencoder, "first stage")
    space = LatentSpace.from_autoencoder(autoencoder, pipeline.config["autoencoder"])
    return PipelineInfo(pipeline.config, card, space.name)


def text_tower(model: "LatentDiffusion") -> Any:
    """Return a model's CLIP text tower, whose parameters have open_clip's names, or None."""
    for part in model.conditioner.modules():
        clip = getattr(getattr(getattr(part, "cache", None), "encoder", None), "clip", None)
        if clip is not None:
            return getattr(clip, "text", clip)
    return None


def load_text_tower(tower: Any, pipeline: Pipeline) -> None:
    """Load a pipeline's text tower in place.

    The layers after the one whose output is used may be missing, as the last one of Stable Diffusion 2 is.
    """
    last = len(tower.transformer.resblocks) + 1 + config_nodes.encoder_of(pipeline.config["conditioner"])["layer"]
    beyond = tuple(f"transformer.resblocks.{n}." for n in range(last, len(tower.transformer.resblocks)))
    unread = [name for name in tower.state_dict() if name.startswith(beyond)]
    load_strict(tower, pipeline.text, "text tower", (*IGNORED_TEXT_KEYS, *unread))

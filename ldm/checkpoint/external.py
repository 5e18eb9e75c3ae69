"""Models that train.py did not make: pipelines of diffusers, checkpoints of CompVis and Stability, DiT and SiT, and our own files."""

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


IGNORED_TEXT_KEYS = ("logit_scale", "attn_mask", "text_projection")  # of a text tower, by those who hear its tokens


def open_pipeline(run: str | Path, kind: str = "ema", yaml: str | Path | None = None) -> Pipeline:
    """The pipeline in a folder of diffusers or in a file; its config is checked as one from the command line is.

    kind: ema or raw, where a checkpoint holds both.  yaml: CompVis' config of a checkpoint; by default the .yaml of the same name beside
    it; Stable Diffusion 1 needs none.  Raises UserError, CorruptFileError naming the file.
    """
    path = Path(run).expanduser()
    pipeline = folder.load(path) if path.is_dir() else open_single_file(path, kind, yaml)
    trust.sanitize_config(pipeline.config, path)
    return pipeline


def open_single_file(path: Path, kind: str, yaml: str | Path | None) -> Pipeline:
    """As opened, for a single file."""
    state, said = weights_file.read_weights(path, kind), weights_file.metadata(path)
    if single_file.KEY in said:
        return single_file.load(state, said[single_file.KEY], path)
    beside = Path(yaml).expanduser() if yaml else path.with_suffix(".yaml")
    try:
        if dit_file.is_dit(state):
            return dit_file.load_dit(state, path)
        if yaml or beside.is_file():
            given = read_compvis_yaml(beside)
            found: dict[str, Any] | None = compvis_config.from_compvis(given)
            size = int(given["model"]["params"].get("image_size", 64))
        else:
            found, size = checkpoint.detect_sd1(state), 64
        if found is None:
            raise UserError(
                f"nothing says what model it is; put its yaml beside it as {beside.name}, or name it, config=FILE.yaml"
            )
        if found["autoencoder"] is None:
            raise UserError(f"{beside} has no first_stage_config; expected a whole pipeline")
        return checkpoint.load(state, found, size * found["autoencoder"]["factor"], kind)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_compvis_yaml(path: Path) -> dict[str, Any]:
    """A yaml file as plain data. Raises UserError for one that is not there or no model config of CompVis."""
    if not path.is_file():
        raise UserError(f"config={path}: no such file; expected the yaml of a CompVis model")
    try:
        given = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config={path} is no yaml ({str(error)[:120]})") from None
    if not isinstance(given, dict) or not isinstance(given.get("model"), dict) or "params" not in given["model"]:
        raise UserError(f"config={path} has no model.params; expected the yaml of a CompVis model")
    return given


def build_from_pipeline(pipeline: Pipeline) -> "LatentDiffusion":
    """The model of a pipeline, on the CPU. Raises UserError for weights that are not of the config's architecture."""
    cfg = trust.sanitize_config(pipeline.config, "the pipeline")
    if pipeline.text:
        config_nodes.encoder_of(cfg.conditioner).update(
            {"weights": None, "random": True}
        )  # they come with the pipeline
    card = data_card(pipeline.data)
    with trust.construction_errors("the pipeline"):
        autoencoder = build.build_autoencoder(cfg.autoencoder, card.channels)
        load_strict(autoencoder, pipeline.autoencoder, "first stage")
        model = build.build_model(cfg, autoencoder, card)
    load_strict(model.denoiser.net, pipeline.net, "U-Net")
    if pipeline.text:
        load_text_tower(text_tower(model), pipeline)
    else:
        load_strict(model.conditioner, pipeline.conditioner, "conditioner")
    return model.eval()


def data_card(data: dict[str, Any]) -> "DataCard":
    """A pipeline's data. Raises UserError for fields that are not a DataCard's."""
    from ldm.runs.data_card import DataCard

    try:
        return DataCard.from_dict(data)
    except ValueError as error:
        raise UserError(f"the file's header does not describe its data ({error}); export it again") from None


class PipelineInfo(NamedTuple):
    """What may be known of a pipeline without its weights.  space: the name of its latent space."""

    config: dict[str, Any]
    card: "DataCard"
    space: str


def pipeline_info(run: str | Path, kind: str = "ema") -> PipelineInfo:
    """The description of what `opened` gives; read once as long as the files do not change."""
    path = Path(run).expanduser().absolute()
    beside = (path.parent / dit_file.STAGE).glob("*")
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".yaml"), *sorted(beside)]
    return _described(path, kind, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=4)
def _described(path: Path, kind: str, changed: tuple[int, ...]) -> PipelineInfo:
    pipeline = open_pipeline(path, kind)
    card = data_card(pipeline.data)
    with trust.construction_errors(path):
        autoencoder = build.build_autoencoder(trust.sanitize_config(pipeline.config, path).autoencoder, card.channels)
        load_strict(autoencoder, pipeline.autoencoder, "first stage")
    return PipelineInfo(
        pipeline.config, card, LatentSpace.from_autoencoder(autoencoder, pipeline.config["autoencoder"]).name
    )


def text_tower(model: "LatentDiffusion") -> Any:
    """The module of a model's CLIP text tower, under open_clip's names; None where it has none."""
    for part in model.conditioner.modules():
        clip = getattr(getattr(getattr(part, "cache", None), "encoder", None), "clip", None)
        if clip is not None:
            return getattr(clip, "text", clip)
    return None


def load_text_tower(tower: Any, pipeline: Pipeline) -> None:
    """Load a pipeline's text tower; the layers behind the one that is read may be missing, as the last of Stable Diffusion 2's is."""
    last = len(tower.transformer.resblocks) + 1 + config_nodes.encoder_of(pipeline.config["conditioner"])["layer"]
    beyond = tuple(f"transformer.resblocks.{n}." for n in range(last, len(tower.transformer.resblocks)))
    unread = [name for name in tower.state_dict() if name.startswith(beyond)] if beyond else []
    load_strict(tower, pipeline.text, "text tower", (*IGNORED_TEXT_KEYS, *unread))

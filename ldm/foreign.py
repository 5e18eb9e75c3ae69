"""Models that train.py did not make: pipelines of diffusers, checkpoints of CompVis and Stability, DiT and SiT, and our own files."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm import admit, build
from ldm.adapter import lora
from ldm.errors import UserError
from ldm.interop import checkpoint, config, dit_file, folder, nodes, read, single
from ldm.interop import text as text_names
from ldm.interop.keymap import fit
from ldm.interop.pipeline import Pipeline
from ldm.parse import yaml_of
from ldm.space import Space

if TYPE_CHECKING:
    from ldm.load import DataCard
    from ldm.model import LatentDiffusion

FILES = (".safetensors", ".ckpt", ".pt", ".bin")
UNREAD = ("logit_scale", "attn_mask", "text_projection")  # of a text tower, by those who hear its tokens


def is_foreign(run: str | Path) -> bool:
    """Whether `run` names a pipeline folder of diffusers, or a weights file outside a run folder."""
    path = Path(run).expanduser()
    if path.is_dir():
        return folder.is_folder(path)
    inside = any((above / "config.yaml").is_file() and (above / "data.json").is_file() for above in path.absolute().parents)
    return path.is_file() and path.suffix in FILES and not inside


def opened(run: str | Path, kind: str = "ema", yaml: str | Path | None = None) -> Pipeline:
    """The pipeline in a folder of diffusers or in a file; its config is checked as one from the command line is.

    kind: ema or raw, where a checkpoint holds both.  yaml: CompVis' config of a checkpoint; by default the .yaml of the same name beside
    it; Stable Diffusion 1 needs none.  Raises UserError, DamagedError naming the file.
    """
    path = Path(run).expanduser()
    pipeline = folder.load(path) if path.is_dir() else of_file(path, kind, yaml)
    admit.config(pipeline.config, path)
    return pipeline


def of_file(path: Path, kind: str, yaml: str | Path | None) -> Pipeline:
    """As opened, for a single file."""
    state, said = read.weights(path, kind), read.metadata(path)
    if single.KEY in said:
        return single.load(state, said[single.KEY], path)
    beside = Path(yaml).expanduser() if yaml else path.with_suffix(".yaml")
    try:
        if dit_file.is_dit(state):
            return dit_file.load(state, path)
        if yaml or beside.is_file():
            given = of_yaml(beside)
            found: dict[str, Any] | None = config.from_compvis(given)
            size = int(given["model"]["params"].get("image_size", 64))
        else:
            found, size = checkpoint.sd1(state), 64
        if found is None:
            raise UserError(f"nothing says what model it is; put its yaml beside it as {beside.name}, or name it, config=FILE.yaml")
        if found["autoencoder"] is None:
            raise UserError(f"{beside} has no first_stage_config; expected a whole pipeline")
        return checkpoint.load(state, found, size * found["autoencoder"]["factor"], kind)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def of_yaml(path: Path) -> dict[str, Any]:
    """A yaml file as plain data. Raises UserError for one that is not there or no model config of CompVis."""
    if not path.is_file():
        raise UserError(f"config={path}: no such file; expected the yaml of a CompVis model")
    try:
        given = yaml_of(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config={path} is no yaml ({str(error)[:120]})") from None
    if not isinstance(given, dict) or not isinstance(given.get("model"), dict) or "params" not in given["model"]:
        raise UserError(f"config={path} has no model.params; expected the yaml of a CompVis model")
    return given


def model_of(pipeline: Pipeline) -> "LatentDiffusion":
    """The model of a pipeline, on the CPU. Raises UserError for weights that are not of the config's architecture."""
    cfg = admit.config(pipeline.config, "the pipeline")
    if pipeline.text:
        nodes.encoder_of(cfg.conditioner).update({"weights": None, "random": True})  # they come with the pipeline
    card = card_of(pipeline.data)
    with admit.building("the pipeline"):
        autoencoder = build.autoencoder(cfg.autoencoder, card.channels)
        fit(autoencoder, pipeline.autoencoder, "first stage")
        model = build.model(cfg, autoencoder, card)
    fit(model.denoiser.net, pipeline.net, "U-Net")
    if pipeline.text:
        load_text(tower_of(model), pipeline)
    else:
        fit(model.conditioner, pipeline.conditioner, "conditioner")
    return model.eval()


def card_of(data: dict[str, Any]) -> "DataCard":
    """A pipeline's data. Raises UserError for fields that are not a DataCard's."""
    from ldm.load import DataCard

    try:
        return DataCard.described(data)
    except ValueError as error:
        raise UserError(f"the file's header does not describe its data ({error}); export it again") from None


class Described(NamedTuple):
    """What may be known of a pipeline without its weights.  space: the name of its latent space."""

    config: dict[str, Any]
    card: "DataCard"
    space: str


def described(run: str | Path, kind: str = "ema") -> Described:
    """The description of what `opened` gives; read once as long as the files do not change."""
    path = Path(run).expanduser().absolute()
    beside = (path.parent / dit_file.STAGE).glob("*")
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".yaml"), *sorted(beside)]
    return _described(path, kind, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=4)
def _described(path: Path, kind: str, changed: tuple[int, ...]) -> Described:
    pipeline = opened(path, kind)
    card = card_of(pipeline.data)
    with admit.building(path):
        autoencoder = build.autoencoder(admit.config(pipeline.config, path).autoencoder, card.channels)
        fit(autoencoder, pipeline.autoencoder, "first stage")
    return Described(pipeline.config, card, Space.of(autoencoder, pipeline.config["autoencoder"]).name)


def tower_of(model: "LatentDiffusion") -> Any:
    """The module of a model's CLIP text tower, under open_clip's names; None where it has none."""
    for part in model.conditioner.modules():
        clip = getattr(getattr(getattr(part, "kept", None), "encoder", None), "clip", None)
        if clip is not None:
            return getattr(clip, "text", clip)
    return None


def load_text(tower: Any, pipeline: Pipeline) -> None:
    """Load a pipeline's text tower; the layers behind the one that is read may be missing, as the last of Stable Diffusion 2's is."""
    last = len(tower.transformer.resblocks) + 1 + nodes.encoder_of(pipeline.config["conditioner"])["layer"]
    beyond = tuple(f"transformer.resblocks.{n}." for n in range(last, len(tower.transformer.resblocks)))
    unread = [name for name in tower.state_dict() if name.startswith(beyond)] if beyond else []
    fit(tower, pipeline.text, "text tower", (*UNREAD, *unread))


def pipeline_of(run: str | Path, kind: str = "ema", yaml: str | Path | None = None) -> Pipeline:
    """The pipeline that `run` names: a run folder of train.py, or anything that `opened` takes."""
    if is_foreign(run):
        return opened(run, kind, yaml)
    from ldm import load

    model = load.load(run, kind).cpu()
    if hasattr(model.denoiser.net, "controls"):
        raise UserError(f"run={run} has a ControlNet, which no pipeline holds: expected to=controlnet, or its base")
    net = lora.merge(model.denoiser.net)
    given = build.plain(load.config_of(load.run_folder(run)))
    chosen = {name: given[name] for name in ("net", "autoencoder", "conditioner", "schedule", "prediction", "seed")}
    chosen |= {"learned_variance": True} if given.get("learned_variance") else {}
    tower = tower_of(model)
    text = {} if tower is None else {name: value for name, value in tower.state_dict().items() if name not in text_names.NOT_TEXT}
    state = model.autoencoder.state_dict()
    data = asdict(load.load_data_card(load.run_folder(run)))
    return Pipeline(chosen, net.state_dict(), state, data, text, model.conditioner.state_dict())

"""A request of sample.py as a typed object, made from a config or from an image file that is to be reproduced.

This is the one module of sampling that reads the composed config of conf/sample.yaml.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ldm.checkpoint.load import ModelSource, open_model
from ldm.checkpoint.vocoder import with_vocoder
from ldm.config import trust
from ldm.config.build import build_dataset, build_degraded_dataset, to_container
from ldm.config.tree import map_strings
from ldm.errors import UserError
from ldm.media import medium as media
from ldm.media.medium import Medium, load_medium
from ldm.runs import identity
from ldm.sampling import control
from ldm.sampling.adapters import AdapterSpec, parse_adapter_specs
from ldm.sampling.inputs import InputFiles, InputSpec
from ldm.sampling.prompts import captions_and_labels
from ldm.sampling.record import read_reproduction_record
from ldm.sampling.sizes import check_shape, given_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.guidance import Guidance
    from ldm.diffusion.sampler import Sampler
    from ldm.sampling.tasks import Task

IGNORED_IN_NAME = (  # keys that do not enter the name of the default output folder
    "run",
    "num",
    "batch_size",
    "save",
    "trainer",
    "output_dir",
    "medium",
    "vocoder",
    "metrics",
    "reproduce",
)
NOT_RECORDED = (
    "reproduce",
    "output_dir",
    "save",
    "trainer",
    "medium",
    "vocoder",
)  # keys that an image file does not record


@dataclass(frozen=True)
class SampleRequest:
    """A checked request for images, complete before a model is loaded.

    Image i, for each i in `rows`, has the seed `seed + i`; the images of `saved_rows` are saved. Objects (sampler,
    guidance, task, timestep_spacing) have their options bound.

    run, source: the model, as named by the user, and its source.  weights: ema, raw, or ema:0.15 (post-hoc EMA).
    prompts: i -> (caption, class), the class None where the prompts do not name one; empty if held-out data give the
    conditions.
    negative: the caption that guidance leads away from.  keep_conditions: the conditions that guidance does not drop.
    text_option: the option that gave the prompts, as `prompt=...`, if they have no classes.
    inputs: name in the batch -> reader of the user's files.  hints: name -> extractor, for hints that are not read from
    files.
    sizes: original_size and crop in pixels, those that the user gave.
    held_out: the held-out data of the run, or None.
    classifier_run, weak_run: the runs that guidance evaluates besides the model, or None.
    tile: side in latent cells of the tiles for large images, or None.
    metrics, reconstruction_metrics: config nodes of the evaluation.
    output_dir: the folder that files are written to.  save: all, grid, npz or none.
    medium: writes and shows the samples: the one that the user named, or that of the run's data.
    reproduce, record: the image file to reproduce and the record in it, or None.
    options: the complete request as plain data, which output files record and which names the default output folder.
    """

    run: str
    source: ModelSource
    weights: str
    adapters: Sequence[AdapterSpec]
    seed: int
    rows: Sequence[int]
    saved_rows: Sequence[int]
    prompts: Mapping[int, tuple[str, int | None]]
    negative: str | None
    text_option: str | None
    keep_conditions: Sequence[str]
    inputs: Mapping[str, InputFiles]
    hints: Mapping[str, Any]
    sizes: Mapping[str, Sequence[int]]
    held_out: Any
    sampler: "Sampler"
    guidance: "Guidance"
    task: "Task"
    timestep_spacing: "Callable[..., Tensor]"
    classifier_run: str | None
    weak_run: str | None
    steps: int
    batch_size: int
    precision: str
    tile: int | None
    metrics: Any
    reconstruction_metrics: Any
    save: str
    medium: Medium
    output_dir: Path
    reproduce: str | None
    record: Mapping[str, Any] | None
    options: Mapping[str, Any]

    @staticmethod
    def from_config(cfg: Any) -> "SampleRequest":
        """Check a composed conf/sample.yaml and return its request. Raises UserError."""
        return new_request(cfg) if cfg.reproduce is None else repeat_request(cfg)

    @property
    def fault(self) -> str:
        """Return why the medium cannot show samples of the run's shape, "" if it can."""
        return self.medium.fault(self.source.data_card.shape)

    @property
    def is_image(self) -> bool:
        """Return whether the samples are images, which have 256 levels."""
        return self.medium.name == media.DEFAULT and not self.fault

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the conditions and inputs of the given images, as the batch of a task."""
        import torch

        batch: dict[str, Any] = {"index": list(rows)}
        if self.held_out is not None:
            batch |= self.held_out.batch([(0, i) for i in rows])
        if self.prompts:
            batch["caption"] = [self.prompts[i][0] for i in rows]
            labels = [self.prompts[i][1] for i in rows]
            if None not in labels:
                batch["label"] = torch.tensor(labels)
        if self.negative is not None:
            batch["negative"] = [self.negative] * len(rows)
        batch |= {name: torch.tensor([size] * len(rows)) for name, size in self.sizes.items()}
        batch |= {name: source(rows) for name, source in self.inputs.items()}
        return {name: extractor(batch[extractor.reads]) for name, extractor in self.hints.items()} | batch

    def reproduction_record(self, batch: Mapping[str, Any], weights: str) -> dict[str, Any]:
        """Return all that is needed to sample one batch again, paths absolute; an image file records it with its own
        `row`.

        weights: sha256 (hex) of the model's weights, see `hash_model`.
        """
        options, folder = self.options, self.source.folder.absolute()
        named = [self.run, self.classifier_run, *(options[name] for name in self.inputs if name in options["inputs"])]
        named += [*(spec.run for spec in self.adapters), *control.hint_files(options["hints"])]
        paths = {path: str(Path(path).expanduser().absolute()) for path in named if path is not None}
        if not Path(paths[self.run]).is_relative_to(folder):
            paths[self.run] = str(folder)  # run= names a folder of runs, whose newest may be another one later
        return {
            "request": map_strings(identity.drop_keys(options, NOT_RECORDED), lambda text: paths.get(text, text)),
            "rows": batch["index"],
            "told": [self.prompts[i] for i in batch["index"]] if self.prompts else [],
            "inputs": {name: source.digest for name, source in self.inputs.items()},
            "weights": weights,
        }


def new_request(cfg: Any) -> SampleRequest:
    """Return the request of a command line. Raises UserError."""
    if cfg.run is None:
        raise UserError("run=... must be given (see --help)")
    source = open_model(cfg.run)
    card = source.data_card
    for name in ("num", "steps", "batch_size"):
        if cfg[name] < 1:
            raise UserError(f"{name}={cfg[name]}: expected 1 or more")
    if cfg.tile is not None and (not isinstance(cfg.tile, int) or isinstance(cfg.tile, bool) or cfg.tile < 1):
        raise UserError(f"tile={cfg.tile}: expected null, or the side of a tile in latent cells, 1 or more")
    if cfg.save not in ("all", "grid", "npz", "none"):
        raise UserError(f"save={cfg.save}: expected all, grid, npz or none")
    if cfg.labels not in ("balanced", "random"):
        raise UserError(f"labels={cfg.labels}: expected balanced, the same number of each class, or random")
    check_shape(cfg, card.shape)
    texts = [name for name in ("prompt", "prompts", "label") if cfg[name] is not None]
    if len(texts) > 1:
        raise UserError(f"{' and '.join(texts)} were given: expected one of them")
    if not source.has_dataset and (cfg.held_out or "_target_" in cfg.metrics):
        raise UserError(
            f"run={cfg.run} was not trained here, its data are not known: expected metrics=none held_out=false"
        )
    held_out = held_out_dataset(source.config) if cfg.held_out else None
    if held_out is not None and cfg.num > len(held_out):
        raise UserError(f"num={cfg.num}: expected at most {len(held_out)}, the held-out images of the run's data")
    pairs = []
    if held_out is None or texts:
        pairs = captions_and_labels(card, cfg.num, cfg.prompt, cfg.prompts, cfg.label, cfg.labels, cfg.seed)
    rows = range(len(pairs) or cfg.num)
    adapters, inputs, hints = conditioning_inputs(cfg, source)
    return build_request(
        cfg,
        source=source,
        adapters=adapters,
        prompts=dict(enumerate(pairs)),
        inputs=inputs,
        hints=hints,
        held_out=held_out,
        rows=rows,
        saved_rows=rows,
        record=None,
    )


def repeat_request(cfg: Any) -> SampleRequest:
    """Return the request that sampled the image cfg.reproduce: its batch, of which only that image is saved.

    cfg.run, if given, is where the run is now.
    Raises UserError for a file that sample.py did not write, and for inputs that have changed.
    """
    record = read_reproduction_record(Path(cfg.reproduce).expanduser())
    defaults = to_container(cfg)  # for options that the version which wrote the record did not have
    options = {**defaults, **record["request"]} | {name: defaults[name] for name in NOT_RECORDED}
    options |= {"run": cfg.run or options["run"], "metrics": {}}
    recorded = trust.sanitize_config(options, f"reproduce={cfg.reproduce}")
    recorded.batch_size = len(record["rows"])
    with trust.construction_errors(f"reproduce={cfg.reproduce}"):
        source = open_model(recorded.run)
        adapters, inputs, hints = conditioning_inputs(recorded, source)
        for name, files in inputs.items():
            if files.digest != record["inputs"].get(name):
                value = recorded.get(name, recorded.hints)
                raise UserError(f"{name}={value} has changed since {cfg.reproduce} was sampled: restore it")
        return build_request(
            recorded,
            source=source,
            adapters=adapters,
            prompts={row: (pair[0], pair[1]) for row, pair in zip(record["rows"], record["told"], strict=False)},
            inputs=inputs,
            hints=hints,
            held_out=held_out_dataset(source.config) if recorded.held_out else None,
            rows=record["rows"],
            saved_rows=[record["row"]],
            record=record,
        )


def build_request(cfg: Any, **parts: Any) -> SampleRequest:
    """Return the request of a checked config; parts: the fields that do not follow from the config alone."""
    from hydra.utils import instantiate

    options = to_container(cfg)
    medium = load_medium(cfg.medium or parts["source"].data_card.medium)
    if cfg.vocoder is not None:
        medium = with_vocoder(medium, str(cfg.vocoder))
    return SampleRequest(
        run=str(cfg.run),
        weights=cfg.weights,
        seed=cfg.seed,
        negative=cfg.negative,
        text_option=text_option(cfg.prompt, cfg.prompts),
        keep_conditions=tuple(cfg.keep_conditions),
        sizes=given_sizes(options),
        sampler=instantiate(cfg.sampler),
        guidance=instantiate(cfg.guidance),
        task=instantiate(cfg.task),
        timestep_spacing=instantiate(cfg.timestep_spacing),
        classifier_run=cfg.guidance.get("classifier"),
        weak_run=cfg.guidance.get("weak"),
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        precision=str(cfg.precision),
        tile=cfg.tile,
        metrics=cfg.metrics,
        reconstruction_metrics=cfg.reconstruction_metrics,
        save=cfg.save,
        medium=medium,
        output_dir=Path(cfg.output_dir) if cfg.output_dir is not None else default_output_dir(options, parts["source"]),
        reproduce=cfg.reproduce,
        options=options,
        **parts,
    )


def default_output_dir(options: Mapping[str, Any], source: ModelSource) -> Path:
    """Return a folder beside the image to reproduce, or one in the run's folder that is named by seed and options.

    The samples of an external model lie beside its file.
    """
    if options["reproduce"] is not None:
        path = Path(options["reproduce"])
        return path.with_suffix("").with_name(f"{path.stem}-again")
    folder = source.folder if source.folder.is_dir() else source.folder.with_suffix("")
    digest = identity.hash_config(identity.drop_keys(options, IGNORED_IN_NAME))[:8]
    return folder / "samples" / f"{options['seed']}-{digest}"


def text_option(prompt: str | None, prompts: str | None) -> str | None:
    """Return the option that gives captions without classes, as `prompt=...`, or None."""
    if prompt is not None:
        return f"prompt={prompt}"
    return f"prompts={prompts}" if prompts is not None and not str(prompts).endswith(".csv") else None


def conditioning_inputs(
    cfg: Any, source: ModelSource
) -> tuple[list[AdapterSpec], dict[str, InputFiles], dict[str, Any]]:
    """Return the adapters, the readers of all input files and hints, and the extractors of the remaining hints.

    Held-out images stand for files that the task needs and that were not given. Raises UserError.
    """
    from hydra.utils import instantiate

    card = source.data_card
    sides = tuple(cfg.size or card.shape[1:])
    if len(sides) != len(card.shape) - 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        expected = "[height,width] in pixels" if len(card.shape) == 3 else f"{len(card.shape) - 1} sides in a list"
        raise UserError(f"size={cfg.size}: expected {expected}")
    spec = InputSpec(cast(Any, sides), card.shape[0], card.classes)  # for other than two sides, nothing reads it
    files = {
        name: instantiate(node)(spec) for name, node in cfg.inputs.items() if cfg[name] is not None or not cfg.held_out
    }
    options = to_container(cfg)
    adapters = parse_adapter_specs(options["adapters"], str(cfg.run), source)
    extractors = control.hint_extractors(source, adapters)
    available: Collection[str] | None = None if cfg.held_out else options["inputs"]
    read = control.hint_sources(
        extractors, options["hints"], spec, preprocess=cfg.preprocess_hints, available=available
    )
    return adapters, files | read, {name: make for name, make in extractors.items() if name not in read}


def held_out_dataset(config: Any) -> Any:
    """Return the held-out images of a run's data, degraded (low resolution, masks) as the run was trained on."""
    return build_degraded_dataset(config, "test") if "degradation" in config else build_dataset(config, "test")


def load_held_out(run: str | Path) -> Any:
    """Return the held-out images of the data of the run that `run` names, see `held_out_dataset`."""
    return held_out_dataset(open_model(run).config)

"""What was asked of sample.py: which images, told what, made of what; and the same from an image that it made before."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoint.load import load_data_card, load_run_config
from ldm.config import trust
from ldm.config.build import build_dataset, build_degraded_dataset, to_container
from ldm.config.tree import map_strings
from ldm.errors import UserError
from ldm.io.parse import parse_json
from ldm.runs import identity
from ldm.runs.data_card import DataCard
from ldm.runs.folder import find_run, is_external
from ldm.sampling import control
from ldm.sampling.inputs import InputFiles, InputSpec

IGNORED_IN_NAME = (
    "run",
    "num",
    "batch_size",
    "save",
    "trainer",
    "output_dir",
    "metrics",
    "reproduce",
)  # what the default folder's name leaves out


@dataclass(frozen=True)
class SampleRequest:
    """Image i, for i of rows, has seed + i; those of `kept` are kept.

    told[i]: (caption, class), the class None where the words say none.  inputs: name in the batch -> what reads it.  held_out: the run's
    held-out data, or None.  carried: what the image to be made again says of itself.  hints: name -> what makes it of the rest.
    """

    cfg: Any
    folder: Path
    card: DataCard
    prompts: Mapping[int, tuple[str, int | None]]
    inputs: Mapping[str, InputFiles]
    held_out: Any
    rows: Sequence[int]
    saved_rows: Sequence[int]
    record: Mapping[str, Any] | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_config(cfg: Any) -> "SampleRequest":
        """Check what was asked before a model is loaded. Raises UserError."""
        return new_request(cfg) if cfg.reproduce is None else repeat_request(cfg)

    @property
    def output_dir(self) -> Path:
        """Where files go: cfg.output_dir; or beside the image made again; or a folder in the run's, named by what was asked."""
        if self.cfg.output_dir is not None:
            return Path(self.cfg.output_dir)
        if self.cfg.reproduce is not None:
            return Path(self.cfg.reproduce).with_suffix("").with_name(f"{Path(self.cfg.reproduce).stem}-again")
        home = (
            self.folder if self.folder.is_dir() else self.folder.with_suffix("")
        )  # a checkpoint's samples lie beside it
        return (
            home
            / "samples"
            / f"{self.cfg.seed}-{identity.hash_config(identity.drop_keys(to_container(self.cfg), IGNORED_IN_NAME))[:8]}"
        )

    @property
    def text_option(self) -> str | None:
        """The option by which words and nothing else were asked for, or None."""
        words = {
            "prompt": self.cfg.prompt,
            "prompts": None if str(self.cfg.prompts).endswith(".csv") else self.cfg.prompts,
        }
        return next((f"{name}={value}" for name, value in words.items() if value is not None), None)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """What these images are told and made of."""
        import torch

        batch: dict[str, Any] = {"index": list(rows)}
        if self.held_out is not None:
            batch |= self.held_out.batch([(0, i) for i in rows])
        if self.prompts:
            batch["caption"] = [self.prompts[i][0] for i in rows]
            labels = [self.prompts[i][1] for i in rows]
            if None not in labels:
                batch["label"] = torch.tensor(labels)
        if self.cfg.negative is not None:
            batch["negative"] = [self.cfg.negative] * len(rows)
        batch |= {name: source(rows) for name, source in self.inputs.items()}
        return {name: make(batch[make.reads]) for name, make in self.hints.items()} | batch

    def reproduction_record(self, batch: Mapping[str, Any], weights: str) -> dict[str, Any]:
        """All that is needed to make the images of one batch again: a file carries it, with its own `row`."""
        config = to_container(self.cfg)
        given = [
            config["run"],
            config["guidance"].get("classifier"),
            *(config[name] for name in self.inputs if name in config["inputs"]),
        ]
        given += [*(one["run"] for one in config["adapters"]), *control.hint_files(self.cfg)]
        places = {path: str(Path(path).expanduser().absolute()) for path in given if path is not None}
        if not Path(places[config["run"]]).is_relative_to(self.folder.absolute()):
            places[config["run"]] = str(self.folder.absolute())  # the newest of a folder of runs, today
        return {
            "request": map_strings(
                identity.drop_keys(config, ("reproduce", "output_dir", "save", "trainer")),
                lambda text: places.get(text, text),
            ),
            "rows": batch["index"],
            "told": [self.prompts[i] for i in batch["index"]] if self.prompts else [],
            "inputs": {name: source.digest for name, source in self.inputs.items()},
            "weights": weights,
        }


def new_request(cfg: Any) -> SampleRequest:
    """The request of a command line. Raises UserError."""
    if cfg.run is None:
        raise UserError("run=... must be given (see --help)")
    folder = find_run(cfg.run)
    card = load_data_card(folder)
    for name in ("num", "steps", "batch_size"):
        if cfg[name] < 1:
            raise UserError(f"{name}={cfg[name]}: expected 1 or more")
    if cfg.tile is not None and (not isinstance(cfg.tile, int) or isinstance(cfg.tile, bool) or cfg.tile < 1):
        raise UserError(f"tile={cfg.tile}: expected null, or the side of a tile in latent cells, 1 or more")
    if cfg.save not in ("all", "grid", "npz", "none"):
        raise UserError(f"save={cfg.save}: expected all, grid, npz or none")
    if cfg.labels not in ("balanced", "random"):
        raise UserError(f"labels={cfg.labels}: expected balanced, the same number of each class, or random")
    asked = [name for name in ("prompt", "prompts", "label") if cfg[name] is not None]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} were given: expected one of them")
    if is_external(folder) and (cfg.held_out or "_target_" in cfg.metrics):
        raise UserError(
            f"run={cfg.run} was not trained here, its data are not known: expected metrics=none held_out=false"
        )
    data = load_held_out(folder) if cfg.held_out else None
    if data is not None and cfg.num > len(data):
        raise UserError(f"num={cfg.num}: expected at most {len(data)}, the held-out images of the run's data")
    pairs = [] if data is not None and not asked else captions_and_labels(cfg, card)
    rows = range(len(pairs) or cfg.num)
    given = input_sources(cfg, card)
    return SampleRequest(
        cfg, folder, card, dict(enumerate(pairs)), given, data, rows, rows, None, control.hint_makers(cfg, given)
    )


def repeat_request(cfg: Any) -> SampleRequest:
    """The request that made the image cfg.reproduce, for its batch, of which it alone is kept; cfg.run, if given, is where the run is now.

    Raises UserError for a file that is none of ours, and for inputs that are not what they were.
    """
    carried = read_reproduction_record(Path(cfg.reproduce).expanduser())
    since = to_container(cfg)  # what a version of fewer options did not say was as it is by default
    config = {**since, **carried["request"]} | {
        name: since[name] for name in ("reproduce", "output_dir", "save", "trainer")
    }
    config |= {"run": cfg.run or config["run"], "metrics": {}}
    new = trust.sanitize_config(config, f"reproduce={cfg.reproduce}")
    with trust.construction_errors(f"reproduce={cfg.reproduce}"):
        folder = find_run(new.run)
        card = load_data_card(folder)
        sources = input_sources(new, card)
    for name, source in sources.items():
        if source.digest != carried["inputs"].get(name):
            raise UserError(
                f"{name}={new.get(name, new.hints)} is not what it was when {cfg.reproduce} was drawn: put it back"
            )
    pairs = {row: (pair[0], pair[1]) for row, pair in zip(carried["rows"], carried["told"], strict=False)}
    new.batch_size = len(carried["rows"])
    data = load_held_out(folder) if new.held_out else None
    made = control.hint_makers(new, sources)
    return SampleRequest(new, folder, card, pairs, sources, data, carried["rows"], [carried["row"]], carried, made)


def read_reproduction_record(path: Path) -> dict[str, Any]:
    """What Request.memory put into a PNG, with its `row`. Raises UserError."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            carried = parse_json(image.text["reproduce"])  # type: ignore[attr-defined]
        if {"request", "rows", "row", "told", "inputs", "weights"} <= carried.keys() and carried["row"] in carried[
            "rows"
        ]:
            return carried
    except FileNotFoundError:
        raise UserError(f"reproduce={path}: no such file; expected an image that sample.py made") from None
    except Exception as error:  # Pillow's plugins raise what they please
        raise UserError(
            f"reproduce={path}: {' '.join(str(error).split()) or 'unreadable'}; expected an image that sample.py made, whole and unedited"
        ) from None
    raise UserError(
        f"reproduce={path} does not say how it was made; expected an image that sample.py made, whole and unedited"
    )


def input_sources(cfg: Any, card: DataCard) -> dict[str, InputFiles]:
    """Readers of the files that the task needs, unless held-out images stand for them. Raises UserError."""
    from hydra.utils import instantiate

    size = tuple(cfg.size or (card.size, card.size))
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"size={cfg.size}: expected [height,width] in pixels")
    wanted, found = InputSpec((size[0], size[1]), card.channels, card.classes), {}
    for name, node in cfg.inputs.items():
        if cfg[name] is not None or not cfg.held_out:
            found[name] = instantiate(node)(wanted)
    return found | control.hint_sources(cfg, wanted)


def load_held_out(folder: Path) -> Any:
    """The held-out images of a run's data, with the low resolution and the masks that it was trained with."""
    config = load_run_config(folder)
    return build_degraded_dataset(config, "test") if "degradation" in config else build_dataset(config, "test")


def captions_and_labels(cfg: Any, card: DataCard) -> list[tuple[str, int | None]]:
    """(caption, class) for each image."""
    from ldm.tensors import choose, derive_seed

    if cfg.prompt is not None:
        return [(cfg.prompt, None)] * cfg.num
    if cfg.prompts is not None:
        return [pair for pair in read_prompts(Path(cfg.prompts), card) for _ in range(cfg.num)]
    classes = len(card.classes)
    if cfg.label is not None:
        labels = [parse_class(cfg.label, card)] * cfg.num
    else:
        labels = [
            derive_seed(cfg.seed + i, "label") % classes if cfg.labels == "random" else i % classes
            for i in range(cfg.num)
        ]
    return [(choose(card.captions[k], 0, "told", i), k) for i, k in enumerate(labels)]


def read_prompts(path: Path, card: DataCard) -> list[tuple[str, int | None]]:
    """Prompts of a text file, one a line, or of a csv with the columns prompt and label (a class). Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(
            f"prompts={path}: no such file; expected one prompt a line, or a csv with the columns label,prompt"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"prompts={path} is not text in UTF-8; expected one prompt a line") from None
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        if not rows or not {"label", "prompt"} <= rows[0].keys():
            raise UserError(f"prompts={path}: expected the columns label,prompt and at least one row")
        for number, row in enumerate(rows, 2):
            if row["label"] is None or row["prompt"] is None:
                raise UserError(f"prompts={path}, line {number}: expected a label and a prompt")
        return [(row["prompt"], parse_class(row["label"], card)) for row in rows]
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"prompts={path}: the file is empty; expected one prompt a line")
    return [(line, None) for line in lines]


def parse_class(label: str, card: DataCard) -> int:
    """The number of a class given by name or number. Raises UserError listing the classes."""
    if label in card.classes:
        return list(card.classes).index(label)
    if str(label).isdigit() and int(label) < len(card.classes):
        return int(label)
    raise UserError(f"label={label}: expected one of {', '.join(card.classes)}, or 0..{len(card.classes) - 1}")

"""ImageNet, COCO and LSUN in their published layouts, unpacked."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.data.lazy import LazyDataset, class_captions
from ldm.errors import UserError
from ldm.io.parse import parse_json

FOLDERS = {"train": "train", "test": "val"}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class FileSource:
    """A source of image files: their paths, labels, and captions of each, or none at all."""

    paths: Sequence[Path]
    captions: Sequence[Sequence[str]]
    labels: Sequence[int]
    classes: Mapping[str, Sequence[str]]
    root: Path

    def __post_init__(self):
        names = [path.relative_to(self.root).as_posix() for path in self.paths]
        self.captioned = bool(self.captions)
        self.unlabelled = torch.tensor(self.labels) < 0
        self.uncaptioned = (
            torch.tensor([not any(texts) for texts in self.captions]) if self.captions else self.unlabelled
        )
        self.identity = repr((names, list(self.captions), list(self.labels), list(self.classes)))

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Path:
        """Return the image's file."""
        return self.paths[i]

    def texts(self, i: int) -> Sequence[str]:
        """Return the image's captions."""
        return self.captions[i] if self.captions else ()

    def label(self, i: int) -> int:
        """Return the image's class."""
        return self.labels[i]

    def name(self, i: int) -> str:
        """Return the image's path for messages."""
        return str(self.paths[i])


class StandardDataset(LazyDataset):
    """A data set with all samples of a FileSource."""

    def __init__(
        self,
        name: str,
        source: FileSource,
        size: int | Sequence[int],
        channels: int,
        content: str | None,
        seed: int,
        flip: bool,
        crop: str = "centre",
    ):
        super().__init__(name, source, range(len(source)), size, channels, content, seed, flip, crop)


class ImageNet(StandardDataset):
    """ImageNet's classification set (Russakovsky et al. 2015).

    Files: path/train/n01440764/*.JPEG and path/val, or the same in Kaggle's folders.
    Validation images are in class folders too, or loose with Kaggle's LOC_val_solution.csv. Classes get the names in
    LOC_synset_mapping.txt if it exists, else their codes. Raises UserError naming what is missing.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | Sequence[int] = 256,
        channels: int = 3,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
        crop: str = "centre",
    ):
        root = Path(path).expanduser()
        inner = root / "ILSVRC" / "Data" / "CLS-LOC"
        data = inner if inner.is_dir() else root
        train = _folder(data / "train", "a folder for each class, n01440764, ...")
        codes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
        if not codes:
            raise UserError(f"path={path}: no class folders in {train}; expected n01440764, ...")
        number = {code: i for i, code in enumerate(codes)}
        folder = _folder(data / _split_folder(split), "the images of this split")
        solution = root / "LOC_val_solution.csv"
        if split == "test" and not any(entry.is_dir() for entry in folder.iterdir()):
            _file(solution, "it has the classes of the loose images in val")
            try:
                with solution.open(newline="", encoding="utf-8") as file:
                    code_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
            except (csv.Error, ValueError, LookupError, AttributeError) as error:
                raise UserError(f"{solution} is not Kaggle's list of classes ({error}); fetch it again") from None
            files = [(file, code_of[file.stem]) for file in _images(folder) if code_of.get(file.stem) in number]
        else:
            files = [(file, file.parent.name) for code in codes for file in _images(folder / code)]
        mapping = root / "LOC_synset_mapping.txt"
        lines = mapping.read_text(encoding="utf-8").splitlines() if mapping.is_file() else []
        words = {line[:9]: line[10:].split(",")[0] for line in lines}
        classes = class_captions([words.get(code, code) for code in codes])
        if len(classes) < len(codes):  # "crane" and "maillot" are names of two classes each
            classes = class_captions([f"{words[code]} {code}" if code in words else code for code in codes])
        labels = [number[code] for _, code in files]
        source = FileSource([file for file, _ in files], (), labels, classes, root)
        super().__init__(f"{path} ({split})", source, size, channels, content_hash, seed, flip, crop)


class COCO(StandardDataset):
    """COCO's captioned images (Lin et al. 2014).

    Files: path/train2017/*.jpg and path/annotations/captions_train2017.json, and the same for val2017.
    Raises UserError naming what is missing.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | Sequence[int] = 256,
        channels: int = 3,
        year: int = 2017,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        root = Path(path).expanduser()
        part = f"{_split_folder(split)}{year}"
        folder = _folder(root / part, "the images")
        file = _file(root / "annotations" / f"captions_{part}.json", "the captions")
        captions: dict[int, list[str]] = {}
        try:
            listed = parse_json(file.read_text(encoding="utf-8"))
            for entry in listed["annotations"]:
                captions.setdefault(entry["image_id"], []).append(" ".join(entry["caption"].split()))
            images = sorted(
                (str(entry["file_name"]), captions[entry["id"]])
                for entry in listed["images"]
                if entry["id"] in captions
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not COCO's list of captions ({error}); fetch it again") from None
        if outside := [name for name, _ in images if Path(name).name != name]:
            raise UserError(f"{file} names a file outside its folder: {outside[0]!r}")
        samples = [texts[0] for _, texts in images[:: max(1, len(images) // 500)]]
        source = FileSource(
            [folder / name for name, _ in images],
            [texts for _, texts in images],
            [0] * len(images),
            {"image": samples or [""]},
            root,
        )
        super().__init__(f"{path} ({split})", source, size, channels, content_hash, seed, flip)


class LSUN(StandardDataset):
    """A category of LSUN (Yu et al. 2015): path/church_outdoor_train, written by LSUN's `data.py export`.

    Raises UserError naming what is missing.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        category: str = "church_outdoor",
        size: int | Sequence[int] = 256,
        channels: int = 3,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
        crop: str = "centre",
    ):
        root = Path(path).expanduser()
        name = f"{category}_{_split_folder(split)}"
        folder = _folder(root / name, f"written by LSUN's `python data.py export {name}_lmdb --out_dir {name}`")
        paths = _images(folder)
        files = FileSource(paths, (), [0] * len(paths), class_captions([category]), root)
        super().__init__(f"{path} ({category}, {split})", files, size, channels, content_hash, seed, flip, crop)


def _split_folder(split: str) -> str:
    """Return the published name of a split. Raises UserError for an unknown one."""
    if split not in FOLDERS:
        raise UserError(f"split={split!r}: expected train or test")
    return FOLDERS[split]


def _folder(path: Path, what: str) -> Path:
    """Return `path` if it is a folder. Raises UserError naming `what` is missing."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder ({what})")
    return path


def _file(path: Path, what: str) -> Path:
    """Return `path` if it is a file. Raises UserError naming `what` is missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file ({what})")
    return path


def _images(folder: Path) -> list[Path]:
    """List the images below a folder by name, except hidden ones."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith(".")
    )

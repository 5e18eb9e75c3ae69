"""A data set of the Hugging Face hub, or one saved by its library, read row by row."""

import io
from pathlib import Path
from typing import Any

from ldm.data.captions import SHOWN
from ldm.data.lazy import Lazy, named, parted
from ldm.errors import UserError
from ldm.tensors import key


class HuggingFace(Lazy):
    """A data set with a column of images, by its name on the hub or the folder that save_to_disk made.

    config: the hub's name of a variant.  train, test: names of splits; without `test` a part held_out of the training split is it, chosen
    by row number.  image, caption, label: columns; a caption may be a list of them.  Raises UserError naming what is not there.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        size: int = 256,
        channels: int = 3,
        config: str | None = None,
        train: str = "train",
        test: str | None = None,
        image: str = "image",
        caption: str | None = "text",
        label: str | None = None,
        held_out: float = 0.02,
        content: str | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        chosen = test if split == "test" and test is not None else train
        source = Rows(load(path, config, chosen), f"{path} {config or ''} {chosen}", image, caption, label)
        keys = [key("held out", i) for i in range(len(source))]
        rows = parted(keys, held_out if test is None else float(split == "test"), split)
        super().__init__(f"{path} ({split})", source, rows, size, channels, content, seed, flip)


class Rows:
    """The source of HuggingFace: a table of the library `datasets`."""

    def __init__(self, table: Any, name: str, image: str, caption: str | None, label: str | None):
        for column in (image, caption, label):
            if column is not None and column not in table.features:
                raise UserError(f"{name}: no column {column!r}; it has {', '.join(table.features)}")
        self.table = table.cast_column(image, type(table.features[image])(decode=False))
        self.columns, self.named, self.place = (image, caption, label), name, name
        self.identity = repr((name, table._fingerprint, len(table), self.columns))
        names = getattr(table.features[label], "names", None) if label is not None else None
        some = [text for i in range(0, len(table), -(-len(table) // SHOWN)) for text in self.texts(i)]
        if label is None:
            self.classes = {"image": list(dict.fromkeys(some)) or [""]}
        else:
            self.classes = named(names or [str(i) for i in range(max(table[label]) + 1)])

    def __len__(self) -> int:
        return len(self.table)

    def image(self, i: int) -> Path | io.BytesIO:
        """The image's file."""
        cell = self.table[i][self.columns[0]]
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])

    def texts(self, i: int) -> list[str]:
        """The row's captions."""
        if self.columns[1] is None:
            return []
        value = self.table[i][self.columns[1]]
        return [" ".join(one.split()) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one.strip()]

    def label(self, i: int) -> int:
        """The row's class, 0 without."""
        return 0 if self.columns[2] is None else max(0, int(self.table[i][self.columns[2]]))

    def name(self, i: int) -> str:
        """Which row."""
        return f"{self.named}, row {i}"


def load(path: str, config: str | None, split: str) -> Any:
    """A split as a table. Raises UserError where the library, the data set or the split is not there."""
    try:
        import datasets
    except ImportError:
        raise UserError("data=hf needs the library datasets: pip install -e '.[data]'") from None
    folder = Path(path).expanduser()
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() and any(folder.glob("data*_*.json")) else None
        found = datasets.load_dataset(path, config) if found is None else found
    except Exception as error:  # the library's own, of many kinds
        raise UserError(f"path={path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise UserError(f"path={path}: no split {split!r}; it has {', '.join(found)}")
    return found[split]

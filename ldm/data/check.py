"""Read every image of a data set once, before a training does: python -m ldm.data.check PATH [out=FILE.csv]

PATH: a folder of images at any depth, a tar shard, a folder of shards, or a pattern such as train-{000..146}.tar.  What cannot be read is
quarantined: data sets of this path leave it out from then on, all ranks alike, until the file is another.

  out=FILE.csv    a row an image: name, bytes, width, height, sha256, and what keeps it from being read
"""

import csv
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

from ldm.data.decode import load_square, open_image
from ldm.data.quarantine import _quarantine, _state
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.progress import ProgressBar


@dataclass(frozen=True)
class ImageCheck:
    """An image that was read, or could not be: fault says why, else it is empty.

    name: as its data set calls it.  size, sha256: of its bytes.
    """

    name: str
    size: int = 0
    width: int = 0
    height: int = 0
    sha256: str = ""
    fault: str = ""


def check_image(name: str, read) -> ImageCheck:
    """Read an image whole: read() gives its bytes."""
    looked = ImageCheck(name)
    try:
        data = read()
        looked = ImageCheck(name, len(data), sha256=sha256(data).hexdigest())
        with open_image(io.BytesIO(data)) as file:
            width, height = file.size
            looked = ImageCheck(name, len(data), width, height, looked.sha256)
        load_square(io.BytesIO(data), 16, 3)
    except Exception as error:  # Pillow's many plugins raise what they please at a broken file
        said = " ".join(str(error).split())
        return ImageCheck(**{**asdict(looked), "fault": said.partition(" <_io")[0] or repr(error)})
    return looked


def images(place: str) -> tuple[list, dict[str, str]]:
    """((name, what reads it) of each image, the file that each lies in). Raises UserError for a place without any."""
    from ldm.data.folder import scan
    from ldm.data.shards import TarSource, expand_pattern, local_path

    path = Path(place).expanduser()
    if path.suffix == ".tar" or "{" in place or (path.is_dir() and any(path.glob("*.tar"))):
        source = TarSource(tuple(local_path(one) for one in expand_pattern(place)))
        names = [source.name(i) for i in range(len(source))]
        files = {name: str(source.paths[int(shard)]) for name, shard in zip(names, source.table[:, 1], strict=True)}
        return [(name, lambda i=i: source.image(i).getvalue()) for i, name in enumerate(names)], files
    found = [path / file.name for file in scan(path)]
    return [(str(file), file.read_bytes) for file in found], {str(file): str(file) for file in found}


def check_dataset(place: str) -> list[ImageCheck]:
    """Every image of a place, looked at; what is wrong goes into the place's quarantine. Raises UserError."""
    every, files = images(place)
    bar, looked = ProgressBar("reading", len(every), unit="images"), []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of pixel counts, which are checked, and of odd metadata
        for one in pool.map(lambda pair: check_image(*pair), every):
            looked.append(one)
            bar.update(len(looked))
    faults = {one.name: [files[one.name], *_state(files[one.name]), one.fault] for one in looked if one.fault}
    atomic.write_json(_quarantine(place), {"place": place, "images": len(looked), "faults": faults})
    return looked


def format_report(looked: Sequence[ImageCheck]) -> Iterator[str]:
    """The lines of the csv."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for row in ([one.name for one in fields(ImageCheck)], *(asdict(one).values() for one in looked)):
        writer.writerow(row)
        yield line.getvalue()
        line.seek(line.truncate(0))


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    if not argv or {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0 if argv else 2
    place, *more = argv
    if len(more) > 1 or any(not word.startswith("out=") for word in more):
        raise UserError(f"{' '.join(more)}: expected a path and at most out=FILE.csv (see --help)")
    looked = check_dataset(place)
    if more:
        atomic.write_bytes(
            Path(more[0][4:]).expanduser(), "".join(format_report(looked)).encode("utf-8", "surrogateescape")
        )
    bad = [one for one in looked if one.fault]
    for one in bad[:20]:
        print(f"{json.dumps(one.name, ensure_ascii=False)[1:-1]}: {one.fault}")
    print(f"{place}: {len(looked) - len(bad):,} of {len(looked):,} images can be read, {len(bad):,} quarantined")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

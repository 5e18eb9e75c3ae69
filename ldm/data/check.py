"""Read every image of a data set once, before a training does: python -m ldm.data.check PATH [out=FILE.csv]

PATH: a folder of images at any depth, a tar shard, a folder of shards, or a pattern such as train-{000..146}.tar.  What cannot be read is
quarantined: data sets of this path leave it out from then on, all ranks alike, until the file is another.

  out=FILE.csv    a row an image: name, bytes, width, height, sha256, and what keeps it from being read
"""

import csv
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

from ldm import durable
from ldm.data.decode import opened, square
from ldm.errors import UserError
from ldm.fetch import cache_dir
from ldm.parse import json_of
from ldm.progress import Bar


@dataclass(frozen=True)
class Looked:
    """An image that was read, or could not be: fault says why, else it is empty.

    name: as its data set calls it.  size, sha256: of its bytes.
    """

    name: str
    size: int = 0
    width: int = 0
    height: int = 0
    sha256: str = ""
    fault: str = ""


def look(name: str, read) -> Looked:
    """Read an image whole: read() gives its bytes."""
    looked = Looked(name)
    try:
        data = read()
        looked = Looked(name, len(data), sha256=sha256(data).hexdigest())
        with opened(io.BytesIO(data)) as file:
            width, height = file.size
            looked = Looked(name, len(data), width, height, looked.sha256)
        square(io.BytesIO(data), 16, 3)
    except Exception as error:  # Pillow's many plugins raise what they please at a broken file
        said = " ".join(str(error).split())
        return Looked(**{**asdict(looked), "fault": said.partition(" <_io")[0] or repr(error)})
    return looked


def images(place: str) -> tuple[list, dict[str, str]]:
    """((name, what reads it) of each image, the file that each lies in). Raises UserError for a place without any."""
    from ldm.data.folder import scan
    from ldm.data.shards import Tars, expanded, local

    path = Path(place).expanduser()
    if path.suffix == ".tar" or "{" in place or (path.is_dir() and any(path.glob("*.tar"))):
        source = Tars(tuple(local(one) for one in expanded(place)))
        names = [source.name(i) for i in range(len(source))]
        files = {name: str(source.paths[int(shard)]) for name, shard in zip(names, source.table[:, 1], strict=True)}
        return [(name, lambda i=i: source.image(i).getvalue()) for i, name in enumerate(names)], files
    found = [path / file.name for file in scan(path)]
    return [(str(file), file.read_bytes) for file in found], {str(file): str(file) for file in found}


def checked(place: str) -> list[Looked]:
    """Every image of a place, looked at; what is wrong goes into the place's quarantine. Raises UserError."""
    every, files = images(place)
    bar, looked = Bar("reading", len(every), unit="images"), []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of pixel counts, which are checked, and of odd metadata
        for one in pool.map(lambda pair: look(*pair), every):
            looked.append(one)
            bar.at(len(looked))
    faults = {one.name: [files[one.name], *_state(files[one.name]), one.fault] for one in looked if one.fault}
    durable.write_json(_quarantine(place), {"place": place, "images": len(looked), "faults": faults})
    return looked


def quarantined(place: str) -> Mapping[str, str]:
    """Name -> fault of what the last check of a place found, less what has changed since; empty for one that was never checked."""
    try:
        faults = json_of(_quarantine(place).read_text(encoding="utf-8"))["faults"]
    except FileNotFoundError:
        return {}
    return {name: fault for name, (file, *state, fault) in faults.items() if _state(file) == state}


def _quarantine(place: str) -> Path:
    return cache_dir() / "checked" / f"{sha256(os.fsencode(os.path.realpath(Path(place).expanduser()))).hexdigest()[:32]}.json"


def _state(file: str) -> list[int]:
    """Bytes and time of change of a file, -1 where it cannot be looked at."""
    try:
        stat = os.stat(file)
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def table(looked: Sequence[Looked]) -> Iterator[str]:
    """The lines of the csv."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for row in ([one.name for one in fields(Looked)], *(asdict(one).values() for one in looked)):
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
    looked = checked(place)
    if more:
        durable.write_bytes(Path(more[0][4:]).expanduser(), "".join(table(looked)).encode("utf-8", "surrogateescape"))
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

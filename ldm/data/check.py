"""Read every image of a data set once, before a training does: python -m ldm.data.check PATH [out=FILE.csv]

PATH: a folder of images at any depth, a tar shard, a folder of shards, or a pattern such as train-{000..146}.tar.
Images that cannot be read are quarantined: from then on data sets with this path leave them out, on all ranks alike,
until the file changes.

  out=FILE.csv    one row per image: name, bytes, width, height, sha256, and the fault that keeps it from being read
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

from ldm.data.decode import load_rectangle, open_image
from ldm.data.quarantine import _quarantine, _state
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.progress import ProgressBar


@dataclass(frozen=True)
class ImageCheck:
    """The result of reading one image; `fault` is the reason why it could not be read, else empty.

    name: as in its data set.  size: in bytes.  sha256: of its bytes.
    """

    name: str
    size: int = 0
    width: int = 0
    height: int = 0
    sha256: str = ""
    fault: str = ""


def check_image(name: str, read) -> ImageCheck:
    """Read and decode an image completely; `read` returns its bytes."""
    result = ImageCheck(name)
    try:
        data = read()
        result = ImageCheck(name, len(data), sha256=sha256(data).hexdigest())
        with open_image(io.BytesIO(data)) as file:
            width, height = file.size
            result = ImageCheck(name, len(data), width, height, result.sha256)
        load_rectangle(io.BytesIO(data), 16, 16, 3)
    except Exception as error:  # Pillow's plugins raise all kinds of exceptions on a broken file
        message = " ".join(str(error).split())
        return ImageCheck(**{**asdict(result), "fault": message.partition(" <_io")[0] or repr(error)})
    return result


def list_images(path: str) -> tuple[list, dict[str, str]]:
    """Return (name, function that reads its bytes) of each image, and the file that contains each.

    Raises UserError if there are no images.
    """
    from ldm.data.folder import scan
    from ldm.data.shards import TarSource, expand_pattern, local_path

    folder = Path(path).expanduser()
    if folder.suffix == ".tar" or "{" in path or (folder.is_dir() and any(folder.glob("*.tar"))):
        source = TarSource(tuple(local_path(shard) for shard in expand_pattern(path)))
        names = [source.name(i) for i in range(len(source))]
        files = {name: str(source.paths[int(shard)]) for name, shard in zip(names, source.table[:, 1], strict=True)}
        return [(name, lambda i=i: source.image(i).getvalue()) for i, name in enumerate(names)], files
    files_ = [folder / file.name for file in scan(folder)]
    return [(str(file), file.read_bytes) for file in files_], {str(file): str(file) for file in files_}


def check_dataset(path: str) -> list[ImageCheck]:
    """Read every image of a data set and write its quarantine. Raises UserError."""
    readers, files = list_images(path)
    bar, results = ProgressBar("reading", len(readers), unit="images"), []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # about pixel counts, which are checked, and unusual metadata
        for result in pool.map(lambda pair: check_image(*pair), readers):
            results.append(result)
            bar.update(len(results))
    faults = {
        result.name: [files[result.name], *_state(files[result.name]), result.fault]
        for result in results
        if result.fault
    }
    atomic.write_json(_quarantine(path), {"path": path, "images": len(results), "faults": faults})
    return results


def format_report(results: Sequence[ImageCheck]) -> Iterator[str]:
    """Yield the lines of the csv."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for row in ([field.name for field in fields(ImageCheck)], *(asdict(result).values() for result in results)):
        writer.writerow(row)
        yield line.getvalue()
        line.seek(line.truncate(0))


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code. Raises UserError."""
    if not argv or {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0 if argv else 2
    path, *more = argv
    if len(more) > 1 or any(not word.startswith("out=") for word in more):
        raise UserError(f"{' '.join(more)}: expected a path and at most out=FILE.csv (see --help)")
    results = check_dataset(path)
    if more:
        atomic.write_bytes(
            Path(more[0][4:]).expanduser(), "".join(format_report(results)).encode("utf-8", "surrogateescape")
        )
    unreadable = [result for result in results if result.fault]
    for result in unreadable[:20]:
        print(f"{json.dumps(result.name, ensure_ascii=False)[1:-1]}: {result.fault}")
    num = len(unreadable)
    print(f"{path}: {len(results) - num:,} of {len(results):,} images can be read, {num:,} quarantined")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

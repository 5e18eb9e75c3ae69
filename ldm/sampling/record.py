"""The record in the picture of a sample, from which the sample is made again."""

from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.io.parse import parse_json
from ldm.media.files import picture_of

RECORD_KEYS = {"request", "rows", "row", "told", "inputs", "weights"}


def read_reproduction_record(path: Path) -> dict[str, Any]:
    """Read the record that `reproduction_record` left in a picture, with its `row`. Raises UserError.

    path: the picture of a sample, or another of its files.
    """
    from PIL import Image

    if path.suffix != ".png" and picture_of(path.with_suffix("")).is_file():
        path = picture_of(path.with_suffix(""))
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            record = parse_json(image.text["reproduce"])  # type: ignore[attr-defined]
        if record.keys() >= RECORD_KEYS and record["row"] in record["rows"]:
            return record
    except FileNotFoundError:
        raise UserError(f"reproduce={path}: no such file; expected an image that sample.py made") from None
    except Exception as error:  # Pillow's plugins raise exceptions of many types
        reason = " ".join(str(error).split()) or "unreadable"
        raise UserError(
            f"reproduce={path}: {reason}; expected an image that sample.py made, whole and unedited"
        ) from None
    raise UserError(
        f"reproduce={path} does not say how it was made; expected an image that sample.py made, whole and unedited"
    )

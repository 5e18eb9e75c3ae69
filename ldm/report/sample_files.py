"""Read the samples that a training wrote: grids, and the sounds, clips, ... beside the last of them."""

from base64 import b64encode
from pathlib import Path

from ldm.media.files import MEDIA_TYPES, sample_html
from ldm.runs.folder import PLAYERS

MAX_GRIDS = 12  # grids per run, spread over its training


def read_grids(folder: Path, problems: list[str]) -> list[tuple[str, bytes]]:
    """Return (name, PNG) of the sample grids over training, then of the final samples."""
    files = sorted((folder / "grids").glob("*.png"))
    selected = (
        [files[round(i * (len(files) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
        if len(files) > MAX_GRIDS
        else files
    )
    grids = []
    for file in [*selected, *(last for last in [folder / "samples.png"] if last.is_file())]:
        try:
            data = file.read_bytes()
        except OSError as error:
            problems.append(f"{file.name}: {error}")
            continue
        if data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82"):
            grids.append((file.stem, data))
        else:
            problems.append(f"{file.relative_to(folder)}: not a complete PNG")
    return grids


def read_players(folder: Path, problems: list[str]) -> list[str]:
    """Return the HTML, files embedded, of the samples that a training wrote last as sounds, clips, ..."""
    steps = [*sorted((folder / PLAYERS).glob("step-*")), folder / PLAYERS / "samples"]
    written = [step for step in steps if step.is_dir()]
    shown = []
    for picture in sorted(written[-1].glob("*.png")) if written else []:
        try:
            shown.append(sample_html(picture, _embed))
        except OSError as error:
            problems.append(f"{picture.relative_to(folder)}: {error}")
    return shown


def _embed(path: Path) -> str:
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{b64encode(path.read_bytes()).decode()}"

"""Pictures of what diffusion does: python -m ldm.animate NAME [out=FILE] [key=value ...]

FILE ends in .gif, .mp4 (with imageio's ffmpeg) or .png, which shows six frames; by default NAME.gif, or NAME.png for a figure.
NAME --help lists the keys of:
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.args import CommandSignature, choose, read_signature
from ldm.cli.errors import run_guarded

FOLDER = Path(__file__).parent


def names() -> dict[str, CommandSignature]:
    """Every animation: a module here with a function of its own name."""
    found = {file.stem: read_signature(file, file.stem) for file in sorted(FOLDER.glob("*.py"))}
    return {name: one for name, one in found.items() if one is not None}


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    there = names()
    if not argv or argv[0] in ("--help", "-h"):
        width = max(map(len, there))
        print(
            (__doc__ or "").strip(),
            *(f"  {name:<{width}}  {one.about.splitlines()[0]}" for name, one in there.items()),
            sep="\n",
        )
        return 0 if argv else 2
    name, *words = argv
    asked = there[choose("animation", "NAME", name, there)]
    if {"--help", "-h"} & set(words):
        print(f"{asked.describe()}\n  {'out=...':<28} a file that ends in .gif, .mp4 or .png")
        return 0
    out = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    given = asked.parse([word for word in words if not word.startswith("out=")])

    from ldm.animate import animation
    from ldm.io.progress import ProgressBar

    if out:
        animation.writer(Path(out[-1]))
    made = getattr(importlib.import_module(f"ldm.animate.{name}"), name)(**given)
    path = Path(out[-1] if out else f"{name}.{'gif' if made.count > 1 else 'png'}").expanduser()
    animation.write(path, made, ProgressBar(name, made.count, unit="frames").update)
    print(f"{path}: {made.count} frame{'s' if made.count > 1 else ''}, {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))

"""Draw figures and animations of diffusion: python -m ldm.animate NAME [out=FILE] [key=value ...]

FILE ends in .gif, .mp4 (with imageio's ffmpeg) or .png, which shows six frames; default: NAME.gif, or NAME.png for a
figure.  NAME --help lists the keys of:
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.args import CommandSignature, choose, read_signature
from ldm.cli.errors import run_guarded

FOLDER = Path(__file__).parent


def names() -> dict[str, CommandSignature]:
    """Return every animation: a module of this package with a function of the same name."""
    signatures = {file.stem: read_signature(file, file.stem) for file in sorted(FOLDER.glob("*.py"))}
    return {name: signature for name, signature in signatures.items() if signature is not None}


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.  Raises UserError."""
    animations = names()
    if not argv or argv[0] in ("--help", "-h"):
        width = max(map(len, animations))
        print(
            (__doc__ or "").strip(),
            *(f"  {name:<{width}}  {one.about.splitlines()[0]}" for name, one in animations.items()),
            sep="\n",
        )
        return 0 if argv else 2
    name, *words = argv
    signature = animations[choose("animation", "NAME", name, animations)]
    if {"--help", "-h"} & set(words):
        print(f"{signature.describe()}\n  {'out=...':<28} a file that ends in .gif, .mp4 or .png")
        return 0
    out = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    options = signature.parse([word for word in words if not word.startswith("out=")])

    from ldm.animate import animation
    from ldm.io.progress import ProgressBar

    if out:
        animation.writer(Path(out[-1]))
    film = getattr(importlib.import_module(f"ldm.animate.{name}"), name)(**options)
    path = Path(out[-1] if out else f"{name}.{'gif' if film.count > 1 else 'png'}").expanduser()
    animation.write(path, film, ProgressBar(name, film.count, unit="frames").update)
    print(f"{path}: {film.count} frame{'s' if film.count > 1 else ''}, {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))

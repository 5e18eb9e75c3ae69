"""Serve a web page for sampling: python -m ldm.app run=RUN [key=value ...]

It loads each run once, serves requests one after another, and saves images in the run's folder; it makes no network
requests.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.args import read_signature
from ldm.cli.errors import run_guarded
from ldm.errors import UserError


def app(
    run: str,  # a run folder, or a folder of runs: all of them, the newest first
    compare: str | None = None,  # another run, sampled with the same seeds
    host: str = "127.0.0.1",  # address to serve: this machine only; 0.0.0.0: all network interfaces
    port: int = 7860,
    most_num: int = 64,  # images of one request
    most_steps: int = 500,  # of the sampler
    most_side: int = 1024,  # pixels, of a generated image
    most_megapixels: float = 16.0,  # of an uploaded image
) -> None:
    """Serve the page until Ctrl-C."""
    from ldm.app.controller import AppController
    from ldm.app.limits import Limits
    from ldm.app.serve import serve
    from ldm.app.session import SessionCache, expand_runs

    runs = expand_runs([run, *([] if compare is None else [compare])])
    desk = AppController(SessionCache(runs), Limits(most_num, most_steps, most_side, most_megapixels))
    other = None if compare is None else expand_runs([compare])[0]
    with serve(desk, host, port, other) as address:
        print(f"{Path(runs[0]).name}: {address}  (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.  Raises UserError."""
    signature = read_signature(Path(__file__), "app")
    if signature is None or {"--help", "-h"} & set(argv):
        print((__doc__ or "").strip(), signature.describe() if signature else "", sep="\n\n")
        return 0
    options = signature.parse(list(argv))
    if not 0 <= options.get("port", 0) < 2**16:
        raise UserError(f"port={options['port']}: expected 0 (any free port) to 65535")
    try:
        app(**options)
    except KeyboardInterrupt:
        print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))

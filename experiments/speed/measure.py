"""Speed beside its peers: python experiments/speed/measure.py [what ...] [threads=1] [pairs=5] [compiled=true] [device=cuda] [smoke=true]

what: sampling, training, first_stage, startup, data, curves; all of them by default. Nothing else should run on the machine. Every row goes
to results.csv when it is done (curves to curves.csv), and the README's table is made of it.  compiled: sampling beside torch.compile too.
device=cuda: Stable Diffusion 1's U-Net at 64x64, for sampling alone.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

KEYS = ("threads", "pairs", "compiled", "device", "smoke")
WHATS = ("sampling", "training", "first_stage", "startup", "data", "curves")


def main(*words: str) -> None:
    import torch

    said = dict(word.split("=", 1) for word in words if "=" in word)
    asked = [word for word in words if "=" not in word] or list(WHATS)
    if unknown := [word for word in (*asked, *said) if word not in (*WHATS, *KEYS)]:
        sys.exit(f"{unknown[0]}: expected {', '.join(WHATS)}, or {'=, '.join(KEYS)}=")
    threads, pairs = int(said.get("threads", 1)), int(said.get("pairs", 5))
    torch.set_num_threads(threads)
    tiny = said.get("smoke") == "true"
    if tiny:
        import pairs as kept

        kept.TABLE = Path("speed.csv")
    if said.get("device", "cpu") != "cpu" or "compiled" in said:
        asked = ["sampling"]
    for what in asked:
        more = (said.get("compiled") == "true", said.get("device", "cpu")) if what == "sampling" else ()
        PARTS[what](pairs, threads, tiny, *more)
    if not tiny:
        table()


def sampling(pairs: int, threads: int, tiny: bool, compiled: bool, device: str) -> None:
    import sampling

    sizes = (("small", 16), ("small", 32)) if device == "cpu" else (("small", 32), ("sd1", 64))
    for name, size in (("tiny", 8),) if tiny else sizes:
        sampling.measure(name, size, pairs, threads, compiled, device)


def training(pairs: int, threads: int, tiny: bool) -> None:
    import training

    for name, size in (("tiny", 8),) if tiny else (("small", 16), ("small", 32)):
        training.measure(name, size, pairs, threads)
    training.encoding(*(("tiny", "tiny", 8, 16) if tiny else ("small", "small", 16, 64)), pairs, threads)
    if not tiny:
        training.encoding("small", "sd1", 32, 256, pairs, threads)


def first_stage(pairs: int, threads: int, tiny: bool) -> None:
    import first_stage

    for name, pixels, batch in (("tiny", 16, 1),) if tiny else (("small", 64, 8), ("sd1", 256, 1)):
        first_stage.measure(name, pixels, batch, pairs, threads)


def startup(pairs: int, threads: int, tiny: bool) -> None:
    import startup

    startup.measure(pairs, threads)


def data(pairs: int, threads: int, tiny: bool) -> None:
    import data

    data.measure(pairs, threads, images=64 if tiny else 2000)


def curves(pairs: int, threads: int, tiny: bool) -> None:
    import curves

    curves.measure(threads, *((1, Path("curves.csv")) if tiny else ()))


PARTS = {part.__name__: part for part in (sampling, training, first_stage, startup, data, curves)}


def table() -> None:
    """The README's table, between its markers, of results.csv."""
    import re

    from pairs import TABLE

    from ldm import durable
    from ldm.report import rows

    head = "| what | setting | peer | threads | ours, ms | peer, ms | ratio (range) | pairs | equal | of the peak: ours, peer |"
    lines = [head, "|" + "---|" * 10]
    for row in rows.read(TABLE):
        shares = f"{100 * float(row['ours_share']):.0f}%, {100 * float(row['theirs_share']):.0f}%" if float(row["ours_share"]) else ""
        ratio = f"**{float(row['ratio']):.2f}** ({float(row['low']):.2f} to {float(row['high']):.2f})"
        first = [row[name] for name in ("what", "setting", "peer", "threads", "ours_ms", "theirs_ms")]
        lines.append("| " + " | ".join((*first, ratio, row["pairs"], row["equal"], shares)) + " |")
    readme = HERE / "README.md"
    marked = re.compile(r"(<!-- table -->\n).*?(\n<!-- /table -->)", re.DOTALL)
    durable.write_text(readme, marked.sub(lambda found: found[1] + "\n".join(lines) + found[2], readme.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])

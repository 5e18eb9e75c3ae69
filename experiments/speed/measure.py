"""Speed beside its peers: python experiments/speed/measure.py [what ...] [threads=1] [pairs=5] [compiled=true]
[device=cuda] [smoke=true]

what: sampling, training, latents, processes, memory, first_stage, startup, data, distance, curves; all of them by
default.
Nothing else should run
on the machine. Every row goes to results.csv when it is done (curves to curves.csv), and the README's table is made of
it.
compiled: sampling beside torch.compile too.  device=cuda: the networks of SAMPLED, TRAINED and ENCODED for a GPU,
sampling, training and latents alone;
expected.json names its rows.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

KEYS = ("threads", "pairs", "compiled", "device", "smoke")
WHATS = ("sampling", "training", "latents", "processes", "memory", "first_stage", "startup", "data", "distance")
WHATS += ("curves",)
SAMPLED = {  # device -> network, side of its latents, images at once
    "cpu": (("small", 16, 4), ("small", 32, 4)),
    "cuda": (("small", 32, 4), ("sd1", 64, 4), ("DiT-XL/2", 32, 32)),
}
TRAINED = {"cpu": (("small", 16), ("small", 32)), "cuda": (("sd1", 64),)}  # device -> network, side of its latents
ENCODED = {  # device -> network, first stage, side of its latents, pixels of the images
    "cpu": (("small", "small", 16, 64), ("small", "sd1", 32, 256)),
    "cuda": (("sd1", "sd1", 64, 512),),
}
ON_GPU = ("sampling", "training", "latents")


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
    device, compiled = said.get("device", "cpu"), said.get("compiled") == "true"
    if device not in SAMPLED:
        sys.exit(f"device={device}: expected {' or '.join(SAMPLED)}")
    if device != "cpu":
        asked = [what for what in asked if what in ON_GPU] or sys.exit(
            f"device={device}: expected {' or '.join(ON_GPU)}"
        )
        if not torch.cuda.is_available():
            sys.exit(f"device={device}: torch finds no GPU here")
    if compiled:
        asked = ["sampling"]
    more = {"sampling": (compiled, device), "training": (device,), "latents": (device,)}
    for what in asked:
        PARTS[what](pairs, threads, tiny, *more.get(what, ()))
    if not tiny:
        table()


def sampling(pairs: int, threads: int, tiny: bool, compiled: bool, device: str) -> None:
    import sampling

    for name, size, images in (("tiny", 8, 4), ("tiny DiT", 8, 4)) if tiny else SAMPLED[device]:
        sampling.measure(name, size, images, pairs, threads, compiled, device)


def training(pairs: int, threads: int, tiny: bool, device: str) -> None:
    import training

    for name, size in (("tiny", 8),) if tiny else TRAINED[device]:
        training.measure(name, size, pairs, threads, device)
    if device != "cpu":
        return
    training.encoding(*(("tiny", "tiny", 8, 16) if tiny else ("small", "small", 16, 64)), pairs, threads)
    if not tiny:
        training.encoding("small", "sd1", 32, 256, pairs, threads)


def latents(pairs: int, threads: int, tiny: bool, device: str) -> None:
    import latents

    for setting in (("tiny", "tiny", 8, 16),) if tiny else ENCODED[device]:
        latents.measure(*setting, pairs, threads, device)


def processes(pairs: int, threads: int, tiny: bool) -> None:
    import processes

    processes.measure(pairs, threads, *((("budget=smoke", "training.steps=2"),) if tiny else ()))


def memory(pairs: int, threads: int, tiny: bool) -> None:
    import memory

    memory.measure("tiny" if tiny else "small", 32, pairs, threads)


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


def distance(pairs: int, threads: int, tiny: bool) -> None:
    import distance

    distance.measure(pairs, threads, *((32, 200) if tiny else ()))


def curves(pairs: int, threads: int, tiny: bool) -> None:
    import curves

    curves.measure(threads, *((1, Path("curves.csv")) if tiny else ()))


PARTS = {
    part.__name__: part
    for part in (sampling, training, latents, processes, memory, first_stage, startup, data, distance, curves)
}


def table() -> None:
    """The README's table, between its markers, of results.csv."""
    import re

    from pairs import TABLE

    from ldm.io import atomic
    from ldm.report import rows

    head = (
        "| what | setting | peer | threads | ours | peer's | ratio (range) | pairs | equal | of the peak: ours, peer |"
    )
    lines = [head, "|" + "---|" * 10]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows.read(TABLE)]
    readme = HERE / "README.md"
    marked = re.compile(r"(<!-- table -->\n).*?(\n<!-- /table -->)", re.DOTALL)
    atomic.write_text(readme, marked.sub(lambda found: found[1] + "\n".join(lines) + found[2], readme.read_text()))


def cells(row: Mapping[str, str]) -> list[str]:
    """A row of results.csv as the table has it; images a second and GiB, which a GPU's rows alone have, beside the
    shares of the peak.
    """
    name, unit = ("mib", "MiB") if row.get("ours_mib") else ("ms", "ms")
    taken = [f"{row[f'{side}_{name}']} {unit}" for side in ("ours", "theirs")]
    ratio = f"**{float(row['ratio']):.2f}** ({float(row['low']):.2f} to {float(row['high']):.2f})"
    last = (
        [f"{100 * float(row['ours_share']):.0f}%, {100 * float(row['theirs_share']):.0f}%"]
        if float(row["ours_share"])
        else []
    )
    last += [f"{row['images_per_s']} images/s; {row['gib']}, {row['theirs_gib']} GiB"] if row.get("gib") else []
    return [
        *(row[name] for name in ("what", "setting", "peer", "threads")),
        *taken,
        ratio,
        row["pairs"],
        row["equal"],
        "; ".join(last),
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Streaming at scale, in small: python experiments/scale/simulate.py [shards=10000] [failures=20] [million=10] [seed=0]

10,000 tar shards of four samples are indexed and read by the project's own data set and stream, by ranks that fail: at
random steps the
world ends, and goes on from the last checkpoint with another number of ranks. Every caption read is compared with the
order of a run that
never failed, and the passes with the data. Then the stream alone over ten million samples, its memory measured. Writes
results.csv.
"""

import csv
import io
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

EACH, BATCH, SAVE_EVERY = 4, 256, 10
WORLDS = (1, 2, 4, 8, 16, 32, 64)


def write_shards(folder: Path, shards: int) -> None:
    """Tars whose every sample says its own number: in its caption, and in the colour of its picture."""
    from PIL import Image

    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * EACH, (shard + 1) * EACH):
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), (number >> 16 & 255, number >> 8 & 255, number & 255)).save(picture, "ppm")
                for name, data in (
                    (f"{number:09d}.ppm", picture.getvalue()),
                    (f"{number:09d}.txt", str(number).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def numbers(batch: dict) -> list[int]:
    """What the pictures of a batch say."""
    red, green, blue = ((batch["image"][:, :, 0, 0] + 1) * 127.5).round().long().unbind(1)
    return ((red << 16) + (green << 8) + blue).tolist()


def stream_with_failures(data, failures: int, passes: int, seed: int) -> dict[str, float]:
    """Read `passes` passes, failing on the way; what was read, compared with what a run that never fails reads."""
    from ldm.data.stream import BatchDataset, BatchStream

    steps = -(-passes * len(data) // BATCH)
    draw = random.Random(seed)
    fatal = set(draw.sample(range(1, steps), failures))
    history: dict[int, list[int]] = {}
    step, world, reads, wrong, worlds, begin = 0, 8, 0, 0, {8}, time.monotonic()
    while step < steps:
        parts = [
            BatchDataset(data)[BatchStream(len(data), BATCH, steps, seed, step, rank, world).batch_at(step)]
            for rank in range(world)
        ]
        if step in fatal:
            fatal.discard(step)
            dead = draw.randrange(world)  # some ranks had read, one died: the step does not count
            reads += sum(len(part["index"]) for part in parts[:dead])
            step, world = step // SAVE_EVERY * SAVE_EVERY, draw.choice(WORLDS)
            worlds.add(world)
            continue
        history[step] = [int(text) for part in parts for text in part["caption"]]
        wrong += sum(numbers(part) != [int(text) for text in part["caption"]] for part in parts)
        reads += BATCH
        step += 1
    seconds = time.monotonic() - begin
    never = BatchStream(len(data), BATCH, steps, seed)
    expected = [
        [int(data.source.texts(int(data.rows[i]))[0]) for _, i in never.batch_at(at).samples] for at in range(steps)
    ]
    flat = [number for at in range(steps) for number in history[at]]
    counts = Counter(flat[: passes * len(data)])
    return {
        "samples": len(data),
        "passes": passes,
        "steps": steps,
        "failures": failures,
        "worlds": len(worlds),
        "steps in another order than without failures": sum(history[at] != expected[at] for at in range(steps)),
        "samples not read once a pass": sum(counts[number] != passes for number in range(len(data))),
        "pictures beside the wrong caption": wrong,
        "samples read again after failures": reads - steps * BATCH,
        "samples per second, one core": round(reads / seconds),
    }


def memory_of_a_stream(million: int, world: int = 8, batch: int = 1024) -> dict[str, float]:
    """Resident MiB after each million samples of one rank's stream over a set of ten million; their largest difference."""
    from ldm.data.stream import BatchStream

    length = million * 10**6
    stream, found, begin = (
        BatchStream(length, batch * world, length // batch, rank=3, world=world),
        [],
        time.monotonic(),
    )
    seen = bytearray(length)
    steps = length // batch  # of this rank: all ranks together pass over the set `world` times
    for step in range(steps):
        for _, i in stream.batch_at(step).samples:
            seen[i] |= 1
        if (step + 1) % (steps // million) == 0:
            found.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
    return {
        "samples of one rank": steps * batch,
        "distinct samples": sum(seen),
        "resident MiB after the first million": round(found[0], 1),
        "resident MiB at the end": round(found[-1], 1),
        "order computed, samples per second": round(steps * batch / (time.monotonic() - begin)),
    }


def main(argv: list[str]) -> int:
    asked = {"shards": 10_000, "failures": 20, "million": 10, "seed": 0}
    asked |= {name: int(value) for name, _, value in (word.partition("=") for word in argv)}
    with tempfile.TemporaryDirectory(prefix="ldm-scale-") as place:
        os.environ["LDM_CACHE"] = f"{place}/cache"
        (folder := Path(place) / "shards").mkdir()
        write_shards(folder, asked["shards"])
        from ldm.data.shards import TarShardDataset

        begin = time.monotonic()
        data = TarShardDataset(folder, size=16, test_fraction=0.0, flip=False)
        indexed = {
            "shards": asked["shards"],
            "shards indexed per second": round(asked["shards"] / (time.monotonic() - begin)),
        }
        found = indexed | stream_with_failures(data, asked["failures"], 2, asked["seed"])
    found |= memory_of_a_stream(asked["million"])
    with open(Path(__file__).with_name("results.csv"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["what", "value"], *found.items()])
    for name, value in found.items():
        print(f"{name:<50}{value:>12,}")
    wrong = (
        "steps in another order than without failures",
        "samples not read once a pass",
        "pictures beside the wrong caption",
    )
    return int(any(found[name] for name in wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

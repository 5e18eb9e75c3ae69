"""Whatever is typed and whatever is read, nothing breaks: python tests/tools/fuzz.py [overrides=500] [trained=100]
[files=500] [commands=20]

Random overrides of train.py; random damage to images, captions, shards, checkpoints and run folders. Each ends in a
result or in one line
that says what is wrong: no traceback, no hang, no file half written. In this process overrides are composed and
checked, and `trained` of
those that pass are trained; `commands` of either are given to whole commands. seed=0 draws others. Writes
tests/tools/fuzz.csv and lists what
broke; exit code 1 if anything did.
"""

import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from smoke import ROOT, command, composed, here, plan_of, process

from ldm.config.overrides import ConfigSearchPath, dotted_keys

BUSY, IDLE = 60, 900  # seconds of a case, of this process's time and of the wall's: beyond them it hangs
MEMORY = 12 << 30  # of address space: what asks for more is told that it does not fit
NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "-1",
    "-2147483648",
    "0.5",
    "-0.5",
    "1e-30",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "7",
    "16",
    "1e400",
    "0x10",
    "1_000",
)
TEXTS = (
    "null",
    "true",
    "",
    "''",
    "abc",
    "é🐈",
    "???",
    "${seed}",
    "${nowhere}",
    "${oc.env:HOME}",
    "a b",
    "'a''",
    "[",
    "{a:1}",
    "[1,2]",
    "[]",
    "{}",
    "[[1]]",
)
LARGE = ("1000000", "999999999999", "1" + "0" * 40)  # for what costs memory, not time
TIME = (
    "steps",
    "num",
    "num_resamples",
    "jump_length",
    "guidance_scales",
    "every",
    "num_workers",
    "batches",
    "devices",
    "accumulate_grad_batches",
)  # keys by which work only lasts
SMALL = {  # options that a smoke run can afford, of groups with large ones
    "net": ("smoke", "tiny", "quick", "small"),
    "autoencoder": ("identity", "patch_f4", "kl_f4_small", "kl_f8_small", "vq_f4_small"),
}
OTHERS = ("runs", "init", "data.path", "data.captions", "hydra")  # places, and what belongs to Hydra


@dataclass(frozen=True)
class Outcome:
    """How one case ended. kind: done, refused, traceback, hang, left (files behind).  said: the line, or the end of the
    traceback.
    """

    kind: str
    said: str


class Hang(BaseException):
    """A case that took too long."""


@contextmanager
def limited(busy: int = BUSY, idle: int = IDLE) -> Iterator[None]:
    """Raise Hang in whatever computes for `busy` seconds, or does not end in `idle`, which a machine with other work
    may take.
    """

    def late(number: int, frame: object) -> None:
        raise Hang

    before = [signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, busy)
    signal.setitimer(signal.ITIMER_REAL, idle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def outcome(run: Callable[[], int], folder: Path) -> Outcome:
    """How run() -> exit code ends, and whether it leaves half a file below `folder`."""
    said = io.StringIO()
    try:
        with limited(), redirect_stdout(io.StringIO()), redirect_stderr(said):
            code = run()
    except Hang:
        return Outcome("hang", "")
    except BaseException as error:  # what a command let through
        return Outcome("traceback", f"{type(error).__name__}: {error}")
    lines = said.getvalue().strip().splitlines() or [""]
    if code not in (0, 2, 3) or "Traceback" in said.getvalue():
        return Outcome("traceback", f"exit code {code}: {lines[-1]}")
    if left := halves(folder):
        return Outcome("left", f"{left[0]}")
    return Outcome("refused" if code else "done", lines[-1])


def halves(folder: Path) -> list[Path]:
    """Temporary files, and files of ours that do not parse, below a folder."""
    found = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".part"))]
    for path in folder.rglob("runs/*/*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            found.append(path)
    return found


# ---- overrides


def override(draw: random.Random, tree: ConfigSearchPath, names: list[str]) -> str:
    """One thing to type: a choice, a key with any value at all, or nonsense."""
    kind = draw.random()
    if kind < 0.3:
        group = draw.choice(sorted(set(tree.groups()) - {"data", "budget", "preset", "trainer", "logger", "metrics"}))
        return f"{group}={draw.choice([*SMALL.get(group, tree.groups()[group])] * 4 + ['nothing', 'null', '3', '[a]'])}"
    if kind < 0.37:
        name = draw.choice(names)
        return draw.choice(
            [
                f"+{name}=1",
                f"~{name}",
                f"{name}x=1",
                f"{name}",
                f"={name}",
                f"{name}==1",
                f"{name}.a=1",
                f"+{name}@a=b",
                "--what",
                "-m",
            ]
        )
    name = draw.choice(names)
    values = [*NUMBERS, *TEXTS]
    if not any(word in name for word in TIME):
        values += LARGE
    return f"{name}={draw.choice(values)}"


def overrides(count: int, seed: int) -> list[tuple[str, ...]]:
    """What is typed behind `train.py budget=smoke`, case by case."""
    tree = ConfigSearchPath((ROOT / "conf",), ROOT)
    from ldm.config.build import to_container

    names = [name for name in dotted_keys(to_container(composed("budget=smoke"))) if not name.startswith(OTHERS)]
    draw = random.Random(seed)
    return [tuple(override(draw, tree, names) for _ in range(draw.choice((1, 1, 1, 2, 3)))) for _ in range(count)]


def typed(words: tuple[str, ...]) -> tuple[str, ...]:
    return ("budget=smoke", "metrics=none", "training.sample_every=100", *words)


# ---- files


def pictures(folder: Path, draw: random.Random) -> Path:
    """A folder of images of every kind, captions of every kind beside them."""
    from PIL import Image

    root = folder / "pictures"
    root.mkdir(parents=True)
    for number, (ending, mode) in enumerate(
        [("png", "RGB"), ("jpg", "RGB"), ("gif", "P"), ("webp", "RGBA"), ("tif", "I;16"), ("bmp", "RGB"), ("ppm", "L")]
    ):
        level = Image.effect_noise((24, 24), 60)
        (level if mode == "I;16" else level.convert(mode)).save(
            root / f"{number}.{'png' if mode == 'I;16' else ending}"
        )
    (root / "0.txt").write_text("a red thing\nand more\n")
    (root / "1.json").write_text('{"caption": ["one", "two"]}')
    if draw.random() < 0.5:
        (root / "metadata.csv").write_text(
            "file_name,caption\n" + "".join(f"{one.name},a {one.stem}\n" for one in root.glob("*.*"))
        )
    elif draw.random() < 0.5:
        (root / "metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": one.name, "text": "a"}) + "\n" for one in root.glob("*.*"))
        )
    return root


def shard(folder: Path, draw: random.Random) -> Path:
    """A tar of the same."""
    root = pictures(folder, draw)
    path = folder / "shards" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for file in sorted(root.iterdir()):
            tar.add(file, file.name)
        for number in range(7):
            info = tarfile.TarInfo(f"{number}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"%d" % (number % 3)))
    shutil.rmtree(root)
    return path


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes with one to four wounds."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + draw.choice((1, 8, 64, 4096)))
        kind = draw.randrange(7)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + bytes(end - at) + data[end:]
        elif kind == 2:
            data = data[:at] + draw.randbytes(end - at) + data[end:]
        elif kind == 3:
            data = data[:at] + data[end:]
        elif kind == 4:
            data = data[:at] + data[at:end] * 3 + data[end:]
        elif kind == 5:
            data = bytes(byte ^ (1 << draw.randrange(8)) if draw.random() < 0.01 else byte for byte in data)
        else:
            word = draw.choice(
                (
                    b"\0",
                    b"\xff\xff\xff\xff",
                    b"9" * 30,
                    b"-1",
                    b'"',
                    b"{",
                    b"[",
                    b"}",
                    b"\n",
                    b"null",
                    b"\x80\x04",
                    b"<html>",
                    b"1e999",
                    b"../",
                )
            )
            data = data[:at] + word + data[at:]
    return data


def values(text: bytes, draw: random.Random) -> bytes:
    """A text of keys and values with one value replaced: it parses, and says something else."""
    lines = text.decode("utf-8", "replace").splitlines()
    places = [i for i, line in enumerate(lines) if ": " in line]
    if not places:
        return damage(text, draw)
    place = draw.choice(places)
    comma = "," if lines[place].endswith(",") else ""
    value = draw.choice(
        (
            "null",
            "-1",
            "0",
            "[]",
            "{}",
            '"x"',
            "1e300",
            "true",
            "999999999999",
            '["a"]',
            '{"_target_": "os.system"}',
            '"../../x"',
        )
    )
    lines[place] = f"{lines[place].partition(': ')[0]}: {value}{comma}"
    return "\n".join(lines).encode()


def wounded(folder: Path, draw: random.Random) -> Path:
    """Damage one file below a folder, or several."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    for file in draw.sample(files, min(len(files), draw.choice((1, 1, 3)))):
        data = file.read_bytes()
        parsed = file.suffix in (".yaml", ".json") and draw.random() < 0.6
        file.write_bytes(values(data, draw) if parsed else damage(data, draw) if data else b"\0")
    return folder


@dataclass(frozen=True)
class Case:
    """A file to read. kind: of file.  make: a fresh folder -> what is named.  read: what a command does with it, and
    its exit code.

    line: the whole command.
    """

    kind: str
    make: Callable[[Path, random.Random], Path]
    read: Callable[[Path], object]
    line: Callable[[Path], tuple[str, ...]]


def read_pictures(root: Path) -> None:
    from ldm.data.folder import ImageFolder

    ImageFolder(root, size=16, max_unreadable=1.0).batch([(0, 0)])


def read_shard(path: Path) -> None:
    from ldm.data.shards import TarShardDataset

    data = TarShardDataset(path, size=16, test_fraction=0)
    data.batch([(0, i) for i in range(len(data))])


def read_model(path: Path) -> None:
    from ldm.checkpoint.load import load_model

    load_model(path)


def read_weights(path: Path) -> None:
    from ldm.interop.weights_file import read_weights

    read_weights(path)


def own_images(root: Path) -> tuple[str, ...]:
    return ("train.py", *typed(("data=folder", f"data.path={root}", "data.size=16", "data.max_unreadable=1.0")))


def from_shard(path: Path) -> tuple[str, ...]:
    return ("train.py", *typed(("data=webdataset", f"data.path={path}", "data.size=16")))


def sampled(path: Path) -> tuple[str, ...]:
    return ("sample.py", f"run={path}", "num=1", "steps=1", f"output_dir={path.parent / 'out'}")


def cases(run: Path, checkpoint: Path) -> list[Case]:
    """Every kind of file, from a good run folder and a good single-file checkpoint."""

    def whole_run(folder: Path, draw: random.Random) -> Path:
        shutil.copytree(run, folder / "run")
        if draw.random() < 0.5:  # then a step's files are what is read
            (folder / "run" / "weights.safetensors").unlink()
        return folder / "run"

    def single(folder: Path, draw: random.Random) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(checkpoint, folder / checkpoint.name))

    def pickled(folder: Path, draw: random.Random) -> Path:
        import torch

        from ldm.io.atomic import read_tensors

        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"state_dict": read_tensors(checkpoint), "epoch": 1},
            folder / "a.ckpt",
            _use_new_zipfile_serialization=draw.random() < 0.5,
        )
        return folder / "a.ckpt"

    return [
        Case("images and captions", pictures, read_pictures, own_images),
        Case("shard", shard, read_shard, from_shard),
        Case("run folder", whole_run, read_model, sampled),
        Case("checkpoint, safetensors", single, read_model, sampled),
        Case("checkpoint, pickled", pickled, read_weights, sampled),
    ]


def as_command(read: Callable[[Path], object], path: Path) -> int:
    """The exit code that a command would have."""
    from ldm.cli.errors import run_guarded

    return run_guarded(lambda: read(path) and None)


# ---- all of it


@dataclass
class Tally:
    """Counts by kind of case, and what broke."""

    counts: Counter
    broken: list[str]

    def add(self, kind: str, name: str, how: Outcome) -> None:
        self.counts[kind, how.kind] += 1
        if sum(self.counts.values()) % 25 == 0:
            self.write()
        if how.kind not in ("done", "refused"):
            self.broken.append(f"{kind}: {name}: {how.kind}: {how.said}"[:400])
            print(self.broken[-1], flush=True)

    def write(self) -> None:
        """Write tests/tools/fuzz.csv as far as it is."""
        kinds, ends = (
            list(dict.fromkeys(kind for kind, _ in self.counts)),
            ("done", "refused", "traceback", "hang", "left"),
        )
        rows = [
            [kind, sum(self.counts[kind, end] for end in ends), *(self.counts[kind, end] for end in ends)]
            for kind in kinds
        ]
        with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
            head = ["what", "cases", "done", "refused", "traceback", "hang", "half written"]
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
        print(f"{sum(self.counts.values())} cases, {len(self.broken)} broke", flush=True)


def fuzz_overrides(every: list[tuple[str, ...]], folder: Path, tally: Tally) -> list[tuple[str, ...]]:
    """Compose and check each command line as a command does before it starts; returns those that passed."""
    from types import SimpleNamespace

    from ldm.cli.errors import run_guarded

    def check(words: tuple[str, ...]) -> None:
        plan = plan_of(*typed(words))
        with plan.translate_errors(SimpleNamespace(started=False)):
            plan.check()

    passed = []
    for words in every:
        how = outcome(lambda words=words: run_guarded(lambda: check(words)), folder)
        tally.add("overrides, checked", " ".join(words), how)
        passed += [words] if how.kind == "done" else []
    return passed


def train_overrides(every: list[tuple[str, ...]], folder: Path, tally: Tally) -> None:
    """Train each; folder: where the cache of a smoke run is."""
    for words in every:
        tally.add(
            "overrides, trained",
            " ".join(words),
            outcome(lambda words=words: command("train.py", *typed(words)), folder),
        )
        shutil.rmtree(folder / "runs", ignore_errors=True)


def whole_commands(every: list[tuple[str, ...]], folder: Path, tally: Tally) -> None:
    """Each as a process of its own."""
    for words in every:
        done = process("train.py", *typed(words), cwd=folder, timeout=600)
        how = Outcome(
            "traceback" if done.returncode not in (0, 2, 3) or "Traceback" in done.stderr else "done",
            done.stderr[-300:],
        )
        tally.add(
            "overrides, whole commands",
            " ".join(words),
            how if not halves(folder) else Outcome("left", str(halves(folder)[0])),
        )
        shutil.rmtree(folder / "runs", ignore_errors=True)


def fuzz_files(every: list[Case], count: int, seed: int, folder: Path, tally: Tally, whole: bool = False) -> None:
    """Read `count` damaged files, or give them to whole commands."""
    for number in range(count):
        draw, case = random.Random(f"{seed} {whole} {number}"), every[number % len(every)]
        place = folder / "case"
        target = case.make(place, draw)
        wounded(place, draw)
        name = f"seed {seed}, number {number}"
        if whole:
            done = process(*case.line(target), cwd=folder, timeout=600)
            how = Outcome(
                "traceback" if done.returncode not in (0, 2, 3) or "Traceback" in done.stderr else "done",
                done.stderr[-300:],
            )
            tally.add(
                f"{case.kind}, whole commands",
                name,
                how if not halves(folder) else Outcome("left", str(halves(folder)[0])),
            )
        else:
            tally.add(case.kind, name, outcome(lambda case=case, target=target: as_command(case.read, target), folder))
        for left in (place, folder / "runs", folder / "cache" / "folders", folder / "cache" / "shards"):
            shutil.rmtree(left, ignore_errors=True)


def checkpoint_of(run: Path, path: Path) -> Path:
    """A run as one safetensors file with its config inside."""
    from ldm.cli.export import run_to_pipeline
    from ldm.interop import single_file

    single_file.save(run_to_pipeline(run), path)
    return path


def main(argv: list[str]) -> int:
    asked = {"overrides": 500, "trained": 100, "files": 500, "commands": 20, "seed": 0} | {
        k: int(v) for k, _, v in (word.partition("=") for word in argv)
    }
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    tally = Tally(Counter(), [])
    with tempfile.TemporaryDirectory(prefix="ldm-fuzz-") as name:
        folder = Path(name)
        with here(folder, LDM_CACHE=os.environ.get("LDM_FUZZ_CACHE", str(folder / "cache"))):
            assert command("train.py", *typed(())) == 0
            run = shutil.copytree(next((folder / "runs").iterdir()), folder / "good" / "run")
            every = cases(run, checkpoint_of(run, folder / "good" / "whole.safetensors"))
            fuzz_files(every, asked["files"], asked["seed"], folder, tally)
            passed = fuzz_overrides(overrides(asked["overrides"], asked["seed"]), folder, tally)
            train_overrides(passed[: asked["trained"]], folder, tally)
        fuzz_files(every, asked["commands"], asked["seed"], folder, tally, whole=True)
        whole_commands(overrides(asked["commands"], asked["seed"] + 1), folder, tally)
    tally.write()
    print(*tally.broken, f"{len(tally.broken)} of {sum(tally.counts.values())} broke", sep="\n")
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

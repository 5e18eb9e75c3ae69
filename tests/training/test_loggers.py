"""Loggers: W&B, Trackio and TensorBoard write a run without key or network; a failure ends nothing."""

import inspect
import socket
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import wandb_file
from PIL import Image
from tiny_media import chain_molecule, grey_clip, row_sound

from ldm.errors import UserError
from ldm.io import images
from ldm.runs.metrics_log import MetricsLog
from ldm.training.loggers import Logger, NoLogger, TensorBoard, Trackio, WandB, has_wandb_key

KINDS = {"mp4": "trackio.video", "gif": "", "wav": "trackio.audio", "smi": "trackio.markdown", "png": "trackio.image"}
CONFIG, CHOICES = {"seed": 3, "net": {"channels": 16}}, {"schedule": "cosine"}


@pytest.fixture
def keyless(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def everything(logger, folder):
    """A run's life."""
    images.save_png(folder / "grid.png", torch.zeros(1, 4, 4, dtype=torch.uint8))
    logger.start(folder, CONFIG, CHOICES)
    logger.log_metrics(1, {"train/loss": 0.5})
    logger.log_metrics(2, {"train/loss": 0.25})
    logger.log_file(2, "grids/step-2", folder / "grid.png")
    logger.log_table("scores", [{"fd": 3.0, "n": 20}])
    logger.log_table("empty", [])
    logger.finish({"fd": 3.0})
    logger.close()


def test_no_logger_writes_nothing(tmp_path):
    everything(NoLogger(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_has_wandb_key_reads_environment_and_netrc(keyless, monkeypatch, tmp_path):
    assert not has_wandb_key()
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password x")
    assert has_wandb_key()
    (tmp_path / "no-netrc").write_text("machine example.com login user password x")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_key()


class Fake:
    """A stand-in for the wandb module that notes what it is told."""

    def __init__(self, fail: tuple[str, ...] = ()):
        self.said, self.fail, self.summary = [], fail, {}

    Settings = staticmethod(lambda **options: options)
    Image = staticmethod(lambda path: ("image", path))
    Table = staticmethod(lambda columns, data: (columns, data))

    def init(self, mode, **options):
        if mode in self.fail:
            raise RuntimeError("no answer\nfrom there")
        self.said.append(("init", mode, options))
        return self

    def log(self, values, step=None):
        if "log" in self.fail:
            raise OSError("disk\nfrom there")
        self.said.append(("log", values, step))

    def finish(self, exit_code=0):
        if "finish" in self.fail:
            raise OSError("disk\nfrom there")
        self.said.append(("finish", exit_code))


@pytest.fixture
def fake(monkeypatch, keyless, request):
    module = Fake(getattr(request, "param", ()))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_offline_without_key(fake, monkeypatch, tmp_path):
    WandB().start(tmp_path, CONFIG, CHOICES)
    assert fake.said[-1][1] == "offline"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    WandB().start(tmp_path, CONFIG, CHOICES)
    assert fake.said[-1][1] == "online"
    WandB(mode="disabled").start(tmp_path, CONFIG, CHOICES)
    assert fake.said[-1][1] == "disabled"


def test_wandb_receives_everything_once(fake, tmp_path):
    everything(WandB("mine", "study", ["a"]), tmp_path)
    _, _, options = fake.said[0]
    assert (options["project"], options["group"], options["tags"]) == ("mine", "study", ["a"])
    assert options["id"] == options["name"] == tmp_path.name
    assert options["resume"] == "allow"
    assert options["config"] == {**CONFIG, "choice": CHOICES}
    assert fake.said[1:] == [
        ("log", {"train/loss": 0.5}, 1),
        ("log", {"train/loss": 0.25}, 2),
        ("log", {"grids/step-2": ("image", str(tmp_path / "grid.png"))}, 2),
        ("log", {"scores": (["fd", "n"], [[3.0, 20]])}, None),
        ("finish", 0),
    ]
    assert fake.summary == {"fd": 3.0}


@pytest.mark.parametrize(
    "fake", [("online",), ("online", "offline"), ("log",), ("finish",)], indirect=True, ids=" ".join
)
def test_wandb_failure_does_not_end_run(fake, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    everything(WandB(), tmp_path)
    said = capsys.readouterr().out
    assert "W&B" in said
    assert "from there" not in said


def test_wandb_finish_is_not_awaited_forever(fake, monkeypatch, capsys, tmp_path):
    begun, let_go = threading.Event(), threading.Event()
    monkeypatch.setattr(fake, "finish", lambda exit_code=0: (begun.set(), let_go.wait()))
    monkeypatch.setattr(WandB, "patience", 0.01)
    everything(WandB(), tmp_path)
    assert begun.is_set()
    let_go.set()
    said = capsys.readouterr().out
    assert said.count("W&B was not sent all of this run") == 1
    assert f"`wandb sync {tmp_path / 'wandb' / '*run-*'}`" in said
    assert fake.said[0][2]["settings"]["finish_timeout"] == 0.01


def test_wandb_run_has_group_of_sweep_and_tags_of_study_and_paper(fake, monkeypatch, tmp_path):
    config, choices = {**CONFIG, "paper": {"table": "LDM tab. 3"}}, {"experiments": "schedules/sweep", "preset": "tiny"}
    monkeypatch.setenv("LDM_SWEEP", "schedules")
    for logger in (WandB(tags=["mine"]), WandB(group="other")):
        logger.start(tmp_path, config, choices)
    (_, _, first), (_, _, second) = fake.said
    assert (first["group"], first["tags"]) == ("schedules", ["mine", "schedules", "tiny", "LDM tab. 3"])
    assert second["group"] == "other"


def test_wandb_interrupted_run_is_marked_failed(fake, tmp_path):
    logger = WandB()
    logger.start(tmp_path, CONFIG, CHOICES)
    logger.close()
    logger.close()
    assert fake.said[1:] == [("finish", 1)]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_scalars_images_and_text(tmp_path):
    everything(TensorBoard(), tmp_path)
    found = events(tmp_path)
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(one.step, one.width, one.height) for one in found.Images("grids/step-2")] == [(2, 4, 4)]
    words = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"choice"' in words
    assert "fd|n" in found.Tensors("scores/text_summary")[0].tensor_proto.string_val[0].decode()


def media(folder):
    """Files of a clip, a sound and a molecule of tests/tiny_media: suffix -> path."""
    sample = torch.linspace(-1, 1, 256).reshape(1, 16, 16)
    written = [
        path
        for medium in (grey_clip, row_sound, chain_molecule)
        for path in medium.write(folder / medium.__name__.rpartition(".")[2], sample, {"rate": "4"})
    ]
    return {path.suffix: path for path in written}


def test_tensorboard_has_files_of_media_as_they_are(tmp_path):
    logger, files = TensorBoard(), media(tmp_path)
    logger.start(tmp_path, CONFIG, CHOICES)
    for suffix, path in files.items():
        logger.log_file(3, f"players/0/{suffix[1:]}", path)
    logger.close()
    found = events(tmp_path)
    (clip,), (sound,) = found.Images("players/0/gif"), found.Audio("players/0/wav")
    assert (clip.step, clip.width, clip.height) == (3, 8, 8)
    assert clip.encoded_image_string == files[".gif"].read_bytes()
    assert (sound.step, sound.sample_rate, sound.length_frames) == (3, 4000, 256)
    assert sound.encoded_audio_string == files[".wav"].read_bytes()
    words = found.Tensors("players/0/smi/text_summary")[0].tensor_proto.string_val[0].decode()
    assert words == "`CCCCCCO`"
    assert "players/0/mp4" not in {name for names in found.Tags().values() if names is not True for name in names or ()}


def test_tensorboard_purges_steps_after_resume(tmp_path):
    for value, resume in ((0.5, 0), (0.75, 2)):
        journal, logger = MetricsLog(tmp_path / "metrics.jsonl", resume), TensorBoard()
        logger.start(tmp_path, CONFIG, CHOICES)
        for step in range(resume + 1, 5):
            journal.write(step, {"train/loss": value})
            logger.log_metrics(step, {"train/loss": value})
        journal.close()
        logger.close()
    assert [(one.step, one.value) for one in events(tmp_path).Scalars("train/loss")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.75),
        (4, 0.75),
    ]


def test_tensorboard_failure_does_not_end_run(tmp_path, capsys, monkeypatch):
    logger = TensorBoard()
    logger.open = lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    everything(logger, tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[log\]'"):
        TensorBoard()


def forget_trackio() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]


@pytest.fixture
def storage(monkeypatch, tmp_path):
    """What Trackio stored, read by its own code; it reads its folder's name when it is imported."""
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "LDM_SWEEP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    forget_trackio()
    from trackio.sqlite_storage import SQLiteStorage

    yield SQLiteStorage
    forget_trackio()


def test_trackio_has_run_once_after_resume_and_asks_no_network(storage, monkeypatch, tmp_path):
    asked, folder = [], tmp_path / "run"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")  # Trackio would ask the hub whose it is
    folder.mkdir()
    images.save_png(folder / "grid.png", torch.full((1, 4, 4), 7, dtype=torch.uint8))
    files = media(tmp_path)
    for resume, until in ((0, 4), (2, 5)):
        journal, logger = MetricsLog(folder / "metrics.jsonl", resume), Trackio("mine", "study")
        logger.start(folder, CONFIG, CHOICES)
        for step in range(resume + 1, until + 1):
            journal.write(step, {"train/loss": 1 / step})
            if (resume, step) != (0, 2):  # a killed process leaves rows that its thread has not written
                logger.log_metrics(step, {"train/loss": 1 / step})
        logger.log_file(4, "grids/step-4", folder / "grid.png")
        for suffix, path in files.items():
            logger.log_file(4, f"players/0/{suffix[1:]}", path)
        journal.close()
        logger.close()
    logger.start(folder, CONFIG, CHOICES)
    logger.log_table("scores", [{"fd": 3.0, "n": 20}])
    logger.log_table("empty", [])
    logger.finish({"fd": 3.0, "protocol": "text"})
    logger.close()
    (run,) = storage.get_run_records("mine")
    logs = storage.get_logs("mine", run_id=run["id"])
    assert run["name"] == "run"
    losses = [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row]
    assert sorted(losses) == [(step, 1 / step) for step in range(1, 6)]
    assert [row["scores"]["_value"] for row in logs if "scores" in row] == [[{"fd": 3.0, "n": 20}]]
    assert [row["fd"] for row in logs if "fd" in row] == [3.0]
    assert not {name for row in logs for name in row} & {"empty", "protocol", "wall"}
    ((step, image),) = [(row["step"], row["grids/step-4"]) for row in logs if "grids/step-4" in row]
    assert step == 4
    with Image.open(tmp_path / "trackio" / "media" / image["file_path"]) as stored:
        assert stored.convert("L").getextrema() == (7, 7)
    types = {name: [row[name]["_type"] for row in logs if name in row] for name in map("players/0/{}".format, KINDS)}
    assert types == {f"players/0/{suffix}": [kind] * (kind != "") for suffix, kind in KINDS.items()}
    config = storage.get_run_config("mine", "run", run_id=run["id"])
    assert {name: config[name] for name in ("seed", "net", "choice", "_Group")} == {
        **CONFIG,
        "choice": CHOICES,
        "_Group": "study",
    }
    folder.rename(tmp_path / "old")
    folder.mkdir()
    logger.start(folder, CONFIG, CHOICES)  # begun anew: another run
    logger.log_metrics(1, {"train/loss": 9.0})
    logger.close()
    records = storage.get_run_records("mine")
    assert len(records) == 2
    assert sorted(
        row["train/loss"]
        for one in records
        for row in storage.get_logs("mine", run_id=one["id"])
        if "train/loss" in row
    ) == [*(1 / step for step in range(5, 0, -1)), 9.0]
    assert asked == []


def test_trackio_failure_does_not_end_run(monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise OSError("disk full\nat byte 3")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=refuse, Image=str, Table=dict))
    everything(Trackio(), tmp_path)
    assert capsys.readouterr().out == "Trackio is off for this run: disk full\n"
    logger = Trackio()
    logger.run = SimpleNamespace(log=refuse)
    logger.log_metrics(1, {"train/loss": 0.5})
    logger.close()  # asks nothing of a run that failed
    assert capsys.readouterr().out == "Trackio stopped taking records: disk full\n"


@pytest.mark.slow
def test_wandb_writes_offline_run(keyless, tmp_path):
    import wandb

    everything(WandB(), tmp_path)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (record,) = run.glob("*.wandb")
    wandb.teardown()  # waits for its service to have written what it holds
    assert record.stat().st_size > 500
    assert list(run.glob("files/media/images/grids/*.png"))


@pytest.mark.slow
def test_wandb_offline_run_has_sound_clip_and_molecule_as_their_own_types(keyless, tmp_path, capsys):
    import wandb

    logger, files = WandB(), media(tmp_path)
    logger.start(tmp_path, CONFIG, CHOICES)
    for suffix, path in files.items():
        logger.log_file(3, f"players/0/{suffix[1:]}", path)
    (tmp_path / "broken.smi").write_text("C1CC(\n")
    logger.log_file(3, "players/1/smi", tmp_path / "broken.smi")
    logger.finish({})
    logger.close()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (record,) = run.glob("*.wandb")
    wandb.teardown()  # waits for its service to have written what it holds
    values = {name: value for row in wandb_file.read(record)["history"] for name, value in row.items()}
    types = {name.rpartition("/")[2]: value["_type"] for name, value in values.items() if name.startswith("players/")}
    assert types == {"mp4": "video-file", "wav": "audio-file", "smi": "molecule-file", "png": "image-file"}
    for suffix in (".mp4", ".wav", ".png"):
        stored = run / "files" / values[f"players/0/{suffix[1:]}"]["path"]
        assert stored.read_bytes() == files[suffix].read_bytes()
    molecule = (run / "files" / values["players/0/smi"]["path"]).read_text()
    atoms = [line.split()[-1] for line in molecule.splitlines() if line.startswith("HETATM")]
    assert [atoms.count(element) for element in "CO"] == [6, 1]
    assert "players/1/smi" not in values
    assert capsys.readouterr().out.startswith(f"W&B is not sent {tmp_path / 'broken.smi'}: ")


@pytest.mark.parametrize("logger", [NoLogger, WandB, Trackio, TensorBoard])
def test_logger_has_every_method_of_the_protocol(logger):
    """A run calls them on whichever logger it has: signatures are the protocol's."""
    for name, method in vars(Logger).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert inspect.signature(getattr(logger, name)) == inspect.signature(method)

"""experiments/paper_template, copied and renamed outside the repository: trained, resumed, compared."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy import ndimage
from smoke import ROOT, command, here

from ldm.checkpoint.load import load_model
from ldm.config.compose import compose_jobs
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import cosine
from ldm.io import atomic
from ldm.report import __main__ as report
from ldm.sampling.tasks import txt2img
from ldm.tensors import KeyedNoise

TEMPLATE = ROOT / "experiments" / "paper_template"
NAME = "their_paper"


@pytest.fixture(scope="module", autouse=True)
def conf(tmp_path_factory):
    """The config folder of a renamed copy, whose package is on the path."""
    folder = tmp_path_factory.mktemp("papers")
    shutil.copytree(TEMPLATE, folder / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for file in folder.glob(f"{NAME}/conf/*/*.yaml"):
        file.write_text(file.read_text().replace("paper_template", NAME))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder / NAME / "conf"


def test_template_is_short_and_independent_of_its_name():
    files = {file.name: file.read_text() for file in TEMPLATE.glob("*.py")}
    assert sum(len(text.splitlines()) for text in files.values()) < 250
    assert not [name for name, text in files.items() if "paper_template" in text]
    text = (TEMPLATE / "README.md").read_text()
    assert all(f"`{name}`" in text for name in files.keys() - {"__init__.py"})


def test_study_composes_eight_jobs_of_its_parts(conf):
    jobs = compose_jobs("train", ["experiment=direction"], conf)
    arms = [(job.choices["objective"], job.config["net"]["width"], job.config["seed"]) for job in jobs]
    assert arms == [(name, width, seed) for name in ("denoising", "direction") for width in (32, 64) for seed in (0, 1)]
    assert {job.config["training"]["_target_"] for job in jobs} == {f"{NAME}.recipe.WithFigure"}
    assert {job.config["data"]["_target_"] for job in jobs} == {f"{NAME}.data.Shapes"}


def test_readme_commands_name_options_that_exist(conf, tmp_path, capfd):
    text = (TEMPLATE / "README.md").read_text().replace("../my_paper/conf", str(conf))
    trained = [line.split()[2:] for line in text.splitlines() if line.startswith("python train.py")]
    assert len(trained) == 4
    with here(tmp_path):
        assert command("train.py", *trained[0], "dry_run=true") == 0
        assert command("train.py", *trained[3], "dry_run=true") == 0
    assert "8 jobs" in capfd.readouterr().out


def test_shapes_are_as_many_as_their_class_says():
    from their_paper.data import Shapes

    data = Shapes("train", num=80)
    assert [ndimage.label(image[0].numpy())[1] for image in data.images] == [1 + i % 4 for i in range(80)]
    disc, square = (float((data.images[i::8] > 0).sum((1, 2, 3)).double().mean()) for i in (0, 4))
    assert square / disc == pytest.approx(4 / torch.pi, rel=0.15)
    assert data.captions[6][0] == "three squares"
    assert not torch.equal(data.images, Shapes("test", num=80).images)


def test_vendi_score_counts_orthogonal_features():
    from their_paper.metric import Vendi

    metric = Vendi(None, torch.zeros(1, 8))
    metric.update(2.0 * torch.eye(8)[:3].repeat(4, 1))
    assert metric.compute()["vendi"] == pytest.approx(3)
    metric.update(5.0 * torch.eye(8)[:1].repeat(12, 1))  # 16, 4 and 4 of 24
    assert metric.compute()["vendi"] == pytest.approx((16 / 24) ** -(16 / 24) * 6 ** (1 / 3))


def test_objective_is_error_and_angle():
    from their_paper.objective import VelocityDirection

    times = torch.tensor([0.2, 0.7], dtype=torch.float64)
    objective = VelocityDirection(lambda noise, x0, schedule: times, strength=2.0)
    noise, x0 = KeyedNoise(0, [0, 1]), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    eps = noise.normal("eps", x0)
    alpha, sigma = (value[:, None, None, None] for value in cosine().alpha_sigma(times))
    v = alpha * eps - sigma * x0
    for factor, angle in ((1.0, 0.0), (3.0, 0.0), (-1.0, 2.0)):
        denoiser = Denoiser(lambda x, t, cond, factor=factor: factor * v, cosine(), V())
        terms = objective(denoiser, x0, None, noise, {})
        expected = (factor - 1) ** 2 * v.square().mean((1, 2, 3))
        torch.testing.assert_close(terms["error"], expected)
        torch.testing.assert_close(terms["loss"], expected + 2 * angle)


def run(conf: Path, *typed: str) -> int:
    small = ("preset=paper", "budget=smoke", "data=shapes", "net=convnext", "data.num=40", "net.depth=1")
    small += ("training.steps=4", "training.save_every=2", "callbacks.update_ratio.every=2")
    return command("train.py", *small, "--config-dir", str(conf), *typed)


@pytest.fixture(scope="module")
def trained(conf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with here(folder):
        assert run(conf) == 0
        (path,) = Path("runs").iterdir()
        return path.absolute()


@pytest.mark.slow
def test_training_uses_every_part_and_resumes(trained, conf):
    files = ("metrics.json", "weights.safetensors", "figure.png", "checkpoints/step-00000004")
    metrics, weights, figure = (trained / name for name in files[:3])
    before, scores, image = atomic.read_tensors(weights), json.loads(metrics.read_text()), figure.read_bytes()
    assert 1 <= scores["vendi"] <= scores["n"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/update_ratio" in row] == [2, 4]
    assert all(0 < row["train/angle"] < 2 for row in rows if "train/angle" in row)
    for path in (trained / name for name in files):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with here(trained.parents[1]):
        assert run(conf, "resume=must") == 0
    after = atomic.read_tensors(weights)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert json.loads(metrics.read_text())["vendi"] == scores["vendi"]
    assert figure.read_bytes() == image


@pytest.mark.slow
def test_samples_follow_guidance_and_are_scored(trained, conf):
    label = {"label": torch.tensor([3])}
    images = [txt2img(load_model(trained), "four discs", steps=2, scale=scale, **label) for scale in (1.0, 1.0, 4.0)]
    assert torch.equal(images[0], images[1])
    assert images[0].shape == (1, 1, 32, 32)
    with here(trained.parents[1]):
        typed = (f"run={trained}", "num=20", "steps=2", "batch_size=10", "metrics=vendi", "save=none")
        assert command("sample.py", "--config-dir", str(conf), *typed, "output_dir=drawn") == 0
        assert json.loads(Path("drawn/metrics.json").read_text())["vendi"] >= 1


@pytest.mark.slow
def test_study_starts_and_is_reported(trained, conf, capfd):
    """One of its jobs is the run that exists; the report writes its row, the table and the figure beside study.yaml."""
    small = ("budget=smoke", "data=shapes", "net=convnext", "data.num=40", "net.depth=1", "net.width=64", "seed=0,1")
    small += ("training.steps=4", "training.save_every=2", "callbacks.update_ratio.every=2", "objective=direction")
    with here(trained.parents[1]):
        line = ("--config-dir", str(conf), "-m", "experiment=direction", *small)
        assert command("train.py", *line, "dry_run=true") == 0
        assert "2 jobs, 1 done, 1 to run" in capfd.readouterr().out
        study = conf / "experiments" / "direction"
        assert report.main([str(study), *small]) == 0
    lines = (study / "results.csv").read_text().splitlines()
    assert len(lines) == 2
    assert "direction,64,0" in lines[1]
    assert f"--config-dir {conf} experiment=direction" in (study / "README.md").read_text()
    assert (study / "figure.png").stat().st_size > 1000

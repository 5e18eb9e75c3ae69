"""What the comparisons in experiments/ compute, on made-up input whose answer is known."""

import gzip
import math
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from smoke import ROOT
from torch import nn

from ldm.config.compose import compose_option
from ldm.data.kuramoto_sivashinsky import KuramotoSivashinsky, solve
from ldm.data.memory import InMemoryDataset
from ldm.data.moses import Moses
from ldm.io import atomic
from ldm.io.atoms import Atoms, to_sample
from ldm.metrics import molecules
from ldm.metrics.interval import wilson
from ldm.report import rows as report_rows
from ldm.tensors import KeyedNoise

TESTED_ELSEWHERE = {  # the scripts that compute a comparison, and where their computation is tested
    "engines/matrix.py": "tests/test_engines.py",
    "parity/table.py": "tests/test_parity.py",
    "peers/measure.py": "tests/test_measured.py",
    "quickstart/keep.py": "tests/report/test_report.py",
    "speed/measure.py": "tests/test_speed.py",
}
RUN = {
    "page/shots.py": "screenshots",
    "parity/memory.py": "one division",
    "distillation/measure.py": "scores of sample.py",
}


def load(path: str):
    """Import a script of experiments/ as a module of a name of its own."""
    file = ROOT / "experiments" / path
    spec = spec_from_file_location(path.replace("/", "_").removesuffix(".py"), file)
    module = module_from_spec(spec)
    before = set(sys.modules)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
        for name in {one.stem for one in file.parent.glob("*.py")} - before:
            sys.modules.pop(name, None)
    return module


def test_every_comparison_has_a_test():
    loaded = {name for name in LOADED if (ROOT / "experiments" / name).is_file()}
    scripts = {f"{file.parent.name}/{file.name}" for file in ROOT.glob("experiments/*/*.py")}
    assert loaded == set(LOADED)
    measures = {name for name in scripts if name.endswith(("/measure.py", "/memory.py", "/kill.py", "/words.py"))}
    assert measures <= loaded | TESTED_ELSEWHERE.keys() | RUN.keys() | {"speed/memory.py"}
    for name, test in TESTED_ELSEWHERE.items():
        assert name in scripts
        assert name.split("/")[0] in (ROOT / test).read_text()


def test_augmentation_lines_pair_by_seed():
    rows = [
        {"seed": seed, "real": "200", "drawn": drawn, "accuracy": accuracy}
        for seed, drawn, accuracy in (("0", "0", ".5"), ("1", "0", ".6"), ("0", "9", ".62"), ("1", "9", ".68"))
    ]
    (line,) = list(load("augmentation/measure.py").lines(rows))[2:]
    reach = 12.706 * 0.02 * 100  # Student's t of one degree of freedom times the deviation of the mean of 0.12 and 0.08
    assert line == f"| 200 | 50.0%, 60.0% | 62.0%, 68.0% | +10.0 points | {10 - reach:+.1f} to {10 + reach:+.1f} |"


def test_augmentation_balanced_takes_as_many_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
    rows = load("augmentation/measure.py").balanced(labels, 30, 0)
    assert labels[rows].bincount().tolist() == [10, 10, 10]
    assert len(set(rows.tolist())) == 30
    assert not torch.equal(rows, load("augmentation/measure.py").balanced(labels, 30, 1))


def test_blue_marble_likeness_is_psnr_within_mask(monkeypatch):
    module = load("blue_marble/measure.py")
    monkeypatch.setattr(module, "EfficientNet", lambda: None)
    monkeypatch.setattr(module, "extract", lambda net, parts: torch.cat([x.mean((2, 3)) for x in parts]))
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    found = module.Likeness(images)(images + 0.2 * mask, mask)
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-3)
    assert found["psnr_low"] == pytest.approx(found["psnr_high"], abs=2e-3)
    assert found["rfd_effnet"] == pytest.approx(3 * 0.1**2, abs=6e-3)  # means 0.1 apart in three features
    whole = module.Likeness(images)(images + 0.2 * mask, None)
    assert whole["psnr"] == pytest.approx(10 * math.log10(4 / 0.02), abs=1e-3)


def test_blue_marble_agreement_counts_kinds():
    module = load("blue_marble/measure.py")
    maps = torch.arange(len(module.KIND)).repeat(2, 8, 1)
    kinds = module.KIND[maps]
    wrong = torch.where(kinds == 2, 0, kinds)  # land predicted as sea
    net = lambda images: nn.functional.one_hot(wrong, len(module.KINDS)).permute(0, 3, 1, 2).float()  # noqa: E731
    found = module.agreement(net, torch.zeros(2, 3, 1, 1), maps)
    assert found["agreement"] == pytest.approx((kinds != 2).float().mean().item(), abs=1e-4)
    assert [found[f"agreement_{kind}"] for kind in module.KINDS] == [1, 1, 0]
    assert found["agreement_low"] == found["agreement_high"] == found["agreement"]  # both tiles alike


@pytest.mark.parametrize("path", ["cifar10/measure.py", "emoji/measure.py"])
def test_ridge_shrinks_slope_by_its_penalty(path):
    """Of one standardised feature, z' z = N - 1: the slope is (N - 1) / (N - 1 + N / 10) of the least-squares one."""
    x = torch.linspace(-1, 2, 31)[:, None]
    predicted = load(path).ridge(x, 3 * x + 1)(x)
    shrunk = 30 / (30 + 3.1)
    expected = 3 * x.mean() + 1 + shrunk * 3 * (x - x.mean())
    torch.testing.assert_close(predicted, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "path", ["blue_marble/measure.py", "cifar10/measure.py", "first_stage/measure.py", "lora/measure.py"]
)
def test_gaussian_is_mean_and_covariance(path):
    features = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    mean, covariance = load(path).gaussian(features)
    assert mean.tolist() == [1, 2]
    assert covariance.tolist() == [[2, 4], [4, 8]]
    assert covariance.dtype == torch.float64


def test_controlnet_f1_tolerates_one_pixel():
    f1 = load("controlnet/measure.py").f1
    line = torch.zeros(1, 1, 16, 16)
    line[..., 8, :] = 1
    half = line.clone()
    half[..., :8] = 0
    found = {shift: f1(line.roll(shift, 2), line).item() for shift in (0, 1, 2)}
    assert found == pytest.approx({0: 1, 1: 1, 2: 0})
    recall = 9 / 16  # one pixel beyond the end is within the tolerance
    assert f1(half, line).item() == pytest.approx(2 * recall / (1 + recall))
    assert f1(line, half).item() == pytest.approx(2 * recall / (1 + recall))
    assert f1(torch.zeros_like(line), line).item() == 0


def test_distillation_speed_is_median_of_paired_ratios(monkeypatch):
    speed = load("distillation/speed.py")
    monkeypatch.setitem(
        sys.modules, "pairs", SimpleNamespace(paired=lambda *ways: ([1.0, 2.0, 4.0], [30.0, 20.0, 60.0]))
    )
    monkeypatch.setattr(speed, "drawing", lambda *words: None)
    written = []
    monkeypatch.setattr("ldm.report.rows.write", lambda path, rows: written.extend(rows))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    speed.main("teacher", "student", "images=10")
    (row,) = written
    assert (row["student_s"], row["teacher_s"]) == (0.2, 3.0)
    assert (row["ratio"], row["low"], row["high"], row["pairs"]) == (15, 10, 30, 3)


def test_domain_adaptation_difference_is_paired_by_seed():
    module = load("domain_adaptation/measure.py")
    distances = {("adapted", "0"): 3.0, ("scratch", "0"): 4.0, ("adapted", "1"): 5.0, ("scratch", "1"): 8.0}
    keys = {"step": "50", "accuracy": "0.5"}
    rows = [{"arm": arm, "seed": seed, "fd_shapes": str(fd), **keys} for (arm, seed), fd in distances.items()]
    (line,) = list(module.table_lines(rows))[2:]
    assert line == "| 50 | 4.0 | 6.0 | -2.0 | -14.7 to +10.7 | 50.0% | 50.0% |"  # Student's t of 1 degree is 12.71


def test_emoji_words_are_tfidf():
    words = load("emoji/measure.py").Words(["a cat", "a dog", "a red dog"])
    vector = words(["a cat", "red dog, new"])
    rare, common = math.log(3), math.log(1.5)
    place = words.place
    assert vector[0, place["cat"]] == pytest.approx(1)  # "a" is in every caption: weight 0
    assert vector[1, place["red"]] == pytest.approx(rare / math.hypot(rare, common))
    assert vector[1, place["dog"]] == pytest.approx(common / math.hypot(rare, common))


def test_emoji_readers_count_first_ranks(monkeypatch):
    """Two captions with two images each; the text of each reader ranks three of the four images right."""
    module = load("emoji/measure.py")
    axes = torch.eye(2)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])  # the second image of caption 0 is wrong
    readers = module.Readers.__new__(module.Readers)
    readers.effnet, readers.tokenize = None, lambda captions: captions
    readers.to_words = readers.to_minilm = lambda x: x
    readers.words = readers.sentences = lambda captions: axes
    readers.to_style = lambda x: x[:, :1] - 0.5
    monkeypatch.setattr(module, "preprocess", lambda visual, images: images[:, 0, 0, :2])
    monkeypatch.setattr(module, "extract", lambda net, parts: torch.cat([preprocessed(x) for x in parts]))
    preprocessed = lambda x: x[:, 0, 0, :2]  # noqa: E731
    net = type("Net", (), {"visual": None, "__call__": lambda self, image, text: (image, axes, None)})
    readers.net = net()
    images = torch.zeros(4, 3, 4, 4)
    images[:, 0, 0, :2] = features
    found = readers.read(images.unflatten(0, (2, 2)), ["a", "b"], torch.tensor([1.0, 0.0]))
    assert found["n"] == 4
    assert [found[name] for name in ("words", "minilm", "clip", "style")] == [0.75] * 4
    assert found["words_low"] == 0.5  # by captions: one is right in half of its images, the other in all
    assert found["words_high"] == 1
    one = readers.read(images[[0, 2], None], ["a", "b"], torch.tensor([1.0, 0.0]))
    assert (one["clip"], one["clip_low"]) == (1, round(wilson(2, 2)[0], 4))


def test_emoji_psnr_of_known_error():
    psnr = load("emoji/measure.py").psnr
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + torch.tensor([0.2, 0.02])[:, None, None, None]) == pytest.approx(30)  # of 20 and 40 dB


def test_families_lines_give_mean_and_range():
    module = load("families/measure.py")
    rows = [
        {"family": "VAE", "seconds": str(s), "steps": "1000", **dict.fromkeys(module.NAMES, str(value))}
        for s, value in ((100, 1.0), (300, 4.0))
    ]
    (line,) = list(module.lines(rows))[2:]
    assert line == "| VAE | 200 | 1,000 | " + "2.5 (1 to 4) | " * len(module.NAMES) + "2 |"


def test_first_stage_journal_merges_rows_of_a_step(tmp_path):
    rows = ('{"step": 1, "a": 1.0}', '{"step": 1, "b": 2.0}', '{"step": 2, "a": 3.0}')
    (tmp_path / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
    assert load("first_stage/measure.py").journal(tmp_path) == {1: {"step": 1, "a": 1, "b": 2}, 2: {"step": 2, "a": 3}}


def test_lora_reader_recognises_separated_styles(monkeypatch, tmp_path):
    module = load("lora/measure.py")
    monkeypatch.setattr(module, "EfficientNet", lambda: None)
    features = torch.randn(3 * module.LEARNED, 4, generator=torch.Generator().manual_seed(0))
    features[:, :3] += 6 * torch.eye(3).repeat_interleave(module.LEARNED, 0)
    module.atomic.write_tensors(tmp_path / "reader.safetensors", {"features": features})
    scores = module.Reader(tmp_path / "reader.safetensors").map(features)
    assert scores.sum(1).sub(1).abs().max() < 1e-9  # the three targets add up to one
    x, y = features.double(), torch.eye(3, dtype=torch.float64).repeat_interleave(module.LEARNED, 0)
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    penalty = (len(x) / 10) ** 0.5 * torch.eye(4, dtype=torch.float64)  # ridge as rows of ordinary least squares
    weight = torch.linalg.lstsq(torch.cat([z, penalty]), torch.cat([y - y.mean(0), torch.zeros(4, 3)])).solution
    torch.testing.assert_close(scores, z @ weight + y.mean(0), atol=1e-9, rtol=0)
    assert (scores.argmax(1) == torch.arange(3).repeat_interleave(module.LEARNED)).float().mean() > 0.95
    assert module.rms(torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [3, 3, 3]])) == pytest.approx(math.sqrt(5))


def test_memory_slope_of_a_line():
    slope = load("faults/memory.py").slope
    assert slope([(x, 5 - 3 * x) for x in (1.0, 2.0, 7.0)]) == pytest.approx(-3)
    assert slope([(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)]) == 0


def test_kill_compares_bit_for_bit():
    same = load("faults/kill.py").same
    one = {"a": [torch.tensor([1.0, 2.0]), {"b": 3}], "c": (None, "x")}
    other = {"a": [torch.tensor([1.0, 2.0]), {"b": 3}], "c": (None, "x")}
    assert same(one, other)
    other["a"][0][1] += 2**-22
    assert not same(one, other)
    assert not same(one, one | {"d": 1})
    assert not same(torch.ones(2), torch.ones(2).double())
    assert not same([1], [1, 2])


@pytest.mark.parametrize("fault", ["none", "another order", "another's caption"])
def test_simulation_counts_wrong_reads(fault):
    """A data set of the simulation's kind that is read rightly has no wrong step; a broken one is counted."""
    simulate = load("scale/simulate.py")

    class Numbers:
        rows = torch.arange(600)
        source = SimpleNamespace(texts=lambda row: [str(row)])

        def __len__(self):
            return 600

        def batch(self, samples):
            index = [i for _, i in samples]
            shown = [(i + (fault == "another's caption" and i == 7)) % 600 for i in index]
            image = torch.tensor([[n >> 16 & 255, n >> 8 & 255, n & 255] for n in shown]) / 127.5 - 1
            texts = [str((i + (fault == "another order")) % 600) for i in index]
            return {"image": image[:, :, None, None], "caption": texts, "index": index}

    found = simulate.stream_with_failures(Numbers(), failures=2, passes=2, seed=0)
    assert found["steps"] == math.ceil(2 * 600 / simulate.BATCH)
    assert (found["steps in another order than without failures"] > 0) == (fault == "another order")
    assert (found["pictures beside the wrong caption"] > 0) == (fault != "none")


def test_words_share_of_right_images(monkeypatch, tmp_path):
    module = load("quickstart/words.py")
    (tmp_path / "p.csv").write_text("label,prompt\nbag,sack\ncoat,cape\n")
    seen = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0])  # four images of each prompt: three right, two right
    net = type("Net", (), {"__call__": lambda self, x: x, "classify": lambda self, x: nn.functional.one_hot(seen)})()
    scorer = lambda: SimpleNamespace(net=net)  # noqa: E731
    card = SimpleNamespace(classes=["bag", "coat"], captions=[["a bag"], ["a coat"]])
    model = SimpleNamespace(conditioner=SimpleNamespace(cache=SimpleNamespace(encoder=None)))
    for name, value in {
        "HERE": tmp_path,
        "find_run": lambda run: tmp_path,
        "load_data_card": lambda run: card,
        "load_model": lambda run: model,
        "load_run_config": lambda run: SimpleNamespace(metrics=None),
        "nearest_caption": lambda *words: [0, 0],
        "txt2img": lambda *words, **options: torch.zeros(8, 1, 2, 2),
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.evaluator, "make_scorer", lambda *words: (scorer, None))
    module.main("run", "p", num=4)
    assert (tmp_path / "p_drawn.csv").read_text().split() == [
        "label,prompt,drawn,nearest_caption",
        "bag,sack,0.7500,1",
        "coat,cape,0.5000,0",
    ]


def test_instruct_pix2pix_judges_by_closest_edit(tmp_path, monkeypatch):
    """Samples that are mostly edited obey; those edited as the next instruction says do not, nor sources."""
    module = load("instruct_pix2pix/measure.py")
    images = torch.randint(0, 256, (8, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    some = InMemoryDataset("some", images, torch.zeros(8), {"thing": ["a thing"]})
    data = instantiate(compose_option("degradation", "edits"))(some)
    model = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)

    def draw(model, sources, texts, guidance):
        """Obey the first text of an edit, and do what the next edit asks if the text's scale is 0."""
        edits = [[text in texts for texts in data.captions].index(True) for text in texts]
        edits = edits if guidance.keywords["scale"] else [(k + 1) % 6 for k in edits]
        drawn = [0.6 * data.edits[k].change(x) + 0.4 * x for k, x in zip(edits, sources, strict=True)]
        return ((torch.stack(drawn) + 1) * 127.5).round().to(torch.uint8)

    for name, value in {
        **{"HERE": tmp_path, "NUM": 4, "SHOWN": 4, "SCALES": ((1.5, 4.0), (1.5, 0.0)), "draw": draw},
        **{"load_model": lambda run: model, "load_held_out": lambda run: data, "find_run": lambda run: tmp_path},
    }.items():
        monkeypatch.setattr(module, name, value)
    module.main("run")
    found = report_rows.read(tmp_path / "results.csv")
    assert [row["edit"] for row in found[:7]] == [*data.classes, "all"]
    obeyed = {(row["way"], row["text_scale"]): row["obeyed"] for row in found if row["edit"] == "all"}
    assert obeyed == {
        ("sources, not edited", ""): "0",
        ("edits through the first stage", ""): "1",
        ("samples", "4"): "1",
        ("samples", "0"): "0",
    }
    assert (tmp_path / "figure.png").is_file()


def test_kuramoto_sivashinsky_scores_an_exact_model(tmp_path, monkeypatch):
    """A model that is the solver, plus noise by seed: forecasts last, sensors correct a wrong state, rows come once."""
    module = load("kuramoto_sivashinsky/measure.py")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    for name, value in {"HERE": tmp_path, "LEADS": (1, 2), "OBSERVED": 4, "SENSORS": (4, 32), "LOW_WAVES": 8}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ERRORS", (1e-2,))
    data = KuramotoSivashinsky("test", test_trajectories=3, test_states=7, points=32, length=22.0, warmup=20.0)

    def make_draw(seeds, observe=None, noise=1e-3):
        """Solve to the next state, and put in what sensors know of it."""

        def draw(state, step):
            constants = (torch.full((len(state),), value) for value in (22.0, 1.0))
            after = solve(state[:, 0], *constants, 0.1, 8, 8)[:, -1:]
            after = after + noise * KeyedNoise(0, [(seed, step) for seed in seeds]).normal("some", after)
            if observe is not None:
                target, known = observe(step)
                after = torch.where(known, target, after)
            return after - state

        return draw

    run = tmp_path / "run"
    for step in (1000, 1500, 2000):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    atomic.write_json(run / "seconds.json", {"steps": 500, "cpu_seconds": 60.0})
    monkeypatch.setattr(module, "sampler_of", lambda name, checkpoint, data: make_draw)
    for _ in range(2):
        module.solver_times(data)
        module.measure_run("refiner", 3, run, data)
    curve, results, solver = (report_rows.read(tmp_path / f"{name}.csv") for name in ("curve", "results", "solver"))
    assert [(row["step"], row["cpu_minutes"]) for row in curve] == [("1000", "2"), ("2000", "4")]  # not the odd one
    ((row,), (yardstick,)) = results, solver
    values = {name: float(value) for name, value in row.items() if name != "model"}
    assert values["time"] == values["time_of_mean"] == float(yardstick["time"]) == pytest.approx(4.8)  # to the end
    assert values["one_step_rmse"] == pytest.approx(1e-3, rel=0.15)
    assert values["spectrum_low"] < 0.1 < values["spectrum_all"]
    # the members are noisy, the truth is not: the error of their mean is 1 / sqrt(5) of the noise
    assert values["mean_rmse_0.8"] == pytest.approx(1e-3 / math.sqrt(5), rel=0.2)
    assert values["spread_over_error_0.8"] == pytest.approx(math.sqrt(6), rel=0.2)
    assert values["crps_0.8"] < values["absolute_error_0.8"] == pytest.approx(8e-4, rel=0.2)
    assert values["mean_rmse_1.6"] > values["mean_rmse_0.8"]
    assert values["rmse_sensors_32"] == 0 < values["rmse_sensors_4"] < 3
    drawn = module.rolled_out(run)
    assert drawn.shape == (3, 7, 1, 32)
    module.figure({"refiner": drawn}, data).savefig(tmp_path / "figure.png")
    module.fields({"refiner": drawn}, data).savefig(tmp_path / "fields.png")


@pytest.mark.slow
def test_moving_measures_motion_against_its_controls(tmp_path, monkeypatch):
    """A model that draws the held-out clips obeys; one that draws them backwards does not, and controls are apart."""
    module = load("moving/measure.py")
    generator = torch.Generator().manual_seed(0)
    for name in ("train", "t10k"):
        images = torch.randint(0, 256, (20, 28, 28), generator=generator, dtype=torch.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", torch.arange(20, dtype=torch.uint8) % 10)):
            head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.numpy().tobytes()))
    monkeypatch.setattr("ldm.data.fashion_mnist.fashion_mnist", lambda root: tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    blocks = [{"_target_": "ldm.net.dit.DiTBlock"}]
    config = {
        "data": {"frames": 8, "size": 32, "root": None},
        "autoencoder": {"factor": [2, 4, 4]},
        "net": {"blocks": blocks},
    }
    model = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)
    asked = []

    def draw(model, caption, task, scale, image, index=None):
        """The held-out clips where their first frame, or guidance, is given; else the same backwards."""
        asked.append(index)
        return image if scale > 1 or index else image.flip(2)

    for name, value in {
        **{
            "HERE": tmp_path,
            "EACH": 2,
            "REFERENCE": 2,
            "SCALES": (1.0, 3.0),
            "draw": draw,
            "JUDGE": {**module.JUDGE, "steps": 2},
        },
        **{"load_model": lambda run: model, "load_run_config": lambda run: OmegaConf.create(config)},
        "find_run": lambda run: tmp_path,
    }.items():
        monkeypatch.setattr(module, name, value)
    for _ in range(2):  # the second time nothing is drawn, and the rows are those of the first
        module.main("run")
        found = {(row["way"], row["guidance"]): row for row in report_rows.read(tmp_path / "results.csv")}
        assert len(found) == len(report_rows.read(tmp_path / "results.csv")) == 7
    assert len(asked) == 3 + 2 * 2  # two scales, one with a first frame; the pieces of the longer clip each time
    motion = {key: float(row["motion"]) for key, row in found.items()}
    assert motion["real clips", ""] == motion[module.THROUGH, ""] == motion["drawn", "3"] == 1
    assert motion["drawn", "1"] < 0.5
    assert motion["first frame repeated", ""] == pytest.approx(1 / 9, abs=1e-3)
    assert float(found["frames shuffled", ""]["acceleration"]) > 2 * float(found["real clips", ""]["acceleration"])
    assert float(found["first frame repeated", ""]["steadiness"]) > float(found["real clips", ""]["steadiness"]) + 10
    assert all((tmp_path / name).is_file() for name in ("figure.png", "samples.png", "samples.gif", "longer.gif"))


def notes_of(module, size: int) -> dict:
    """The facts of `size` notes at three velocities each, in the order of `choose_groups`."""
    velocity = torch.tensor([40, 80, 120]).repeat(size)
    pitch = (69 + 4 * torch.arange(size)).repeat_interleave(3)
    return {"velocity": velocity, "pitch": pitch, "label": torch.arange(size).repeat_interleave(3) % 12}


def test_notes_loudness_is_the_correlation_within_notes():
    """Levels of instruments differ by more than soft and loud; order reversed within each note gives -1, not less."""
    loudness = load("notes/measure.py").loudness_correlation
    velocity = torch.tensor([40, 80, 120]).repeat(5)
    level = velocity * torch.tensor([1.0, 30, 0.1, 7, 300]).repeat_interleave(3)
    sine = torch.sin(torch.arange(400) / 3)
    assert loudness(level[:, None] * sine, velocity) == pytest.approx(1)
    assert loudness(1e4 / level[:, None] * sine, velocity) == pytest.approx(-1)
    assert loudness(level.reshape(5, 3)[:, [1, 0, 2]].reshape(-1, 1) * sine, velocity) == pytest.approx(
        0.2216, abs=1e-3
    )


def test_notes_groups_are_whole_and_spread():
    module = load("notes/measure.py")
    notes = [SimpleNamespace(bank=b, program=p, pitch=60, velocity=v) for b in "ab" for p in range(200) for v in (1, 2)]
    rows = module.choose_groups(notes[:-1])  # the last note has one velocity only
    assert len(rows) == 2 * module.GROUPS
    assert all(
        (notes[i].bank, notes[i].program) == (notes[j].bank, notes[j].program)
        for i, j in zip(rows[::2], rows[1::2], strict=True)
    )
    assert {notes[i].bank for i in rows} == {"a", "b"}
    assert 798 not in rows


def test_notes_table_has_controls_and_guidance(tmp_path, monkeypatch):
    """A model that plays the right pitch from guidance 2 on, and a first stage that makes all softer alike."""
    module = load("notes/measure.py")
    facts = notes_of(module, 4)
    time = torch.arange(16_384) / 16_000
    hertz = 440 * 2 ** ((facts["pitch"] - 69) / 12)
    wave = facts["velocity"][:, None] / 400 * torch.sin(2 * math.pi * hertz[:, None] * time)
    image = module.log_mel(wave)
    rows = [
        SimpleNamespace(bank="fluid", program=p, pitch=int(facts["pitch"][3 * p]), velocity=v)
        for p in range(4) for v in (40, 80, 120)
    ]  # fmt: skip
    data = SimpleNamespace(
        notes=rows,
        batch=lambda at: {
            "image": image[[i for _, i in at]], "wave": wave[[i for _, i in at]], "caption": [f"{i}" for _, i in at],
            **{name: fact[[i for _, i in at]] for name, fact in facts.items()},
        },
    )  # fmt: skip
    drawings = []

    def draw(model, captions, rows, guidance):
        drawings.append(guidance.keywords["scale"])
        rows = torch.tensor([int(caption) for caption in captions])
        return image[rows] if guidance.keywords["scale"] >= 2 else image[(rows + 3) % 12]

    def hear(wave):
        peak = torch.fft.rfft(wave[:, :8_000], n=64_000).abs().argmax(1) / 4
        return (69 + 12 * (peak / 440).log2()).round().long()

    class Judge(nn.Module):
        def forward(self, x):
            return torch.stack([x.float().mean((1, 2, 3)), x.float().flatten(1).argmax(1).float()], 1)

        def classify_all(self, features):
            classes = nn.functional.one_hot(facts["label"], 12)
            return {"label": classes, "pitch": nn.functional.one_hot(facts["pitch"], 128)}

    judge = Judge()
    for name, value in {
        **{
            "HERE": tmp_path,
            "SHOWN": 2,
            "draw": draw,
            "find_run": lambda run: tmp_path,
            "pitch_listener": lambda: hear,
        },
        **{"load_run_config": lambda run: None, "load_held_out": lambda run: data},
        "load_model": lambda run: SimpleNamespace(encode=lambda x: x, decode=lambda x: x - 0.1),
        "griffin_lim": partial(module.griffin_lim, rounds=6),
        "load_evaluator": lambda *words: (judge, judge(module.to_uint8(image))),
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.cache, "ensure_evaluator", lambda config: tmp_path)
    module.main("run")
    found = {(row["source"], row["guidance"], row["sound"]): row for row in report_rows.read(tmp_path / "results.csv")}
    assert list(found)[:3] == [
        ("real", "", "as rendered"),
        ("real", "", "Griffin-Lim"),
        ("first stage", "", "Griffin-Lim"),
    ]
    pitches = {scale: float(found["drawn", scale, "Griffin-Lim"]["pitch"]) for scale in ("1", "1.5", "2", "3")}
    assert pitches["1"] == pitches["1.5"] < 0.3
    assert pitches["2"] == pitches["3"] > 0.7
    real = found["real", "", "as rendered"]
    assert [float(real[name]) for name in ("pitch", "family", "own_pitch", "n")] == [1, 1, 1, 12]
    assert float(real["fd_notes"]) == pytest.approx(0, abs=1e-4)
    assert float(real["mel_error"]) == 0 < float(found["real", "", "Griffin-Lim"]["mel_error"])
    assert float(real["loudness"]) > 0.999
    assert float(found["first stage", "", "Griffin-Lim"]["fd_notes"]) > 1
    written = {path.name for path in tmp_path.iterdir()}
    assert {"figure.png", "real.wav", "real-griffin-lim.wav", "drawn-2-griffin-lim.wav"} <= written
    module.main("run")
    assert len(drawings) == 4  # what is stored is not drawn again


class Posterior(SimpleNamespace):
    """A posterior that is its sample, of 3 nats."""

    def kl(self):
        return torch.full((len(self.mode),), 3.0)


def test_molecules_rows_of_known_samples(tmp_path, monkeypatch):
    """With a sampler that obeys, a first stage that fails at noise, and a KL weight of 0.05 that is the best."""
    module = load("molecules/measure.py")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "some.smi").write_text("".join(f"{'C' * n}{end}\n" for n in range(1, 14) for end in ("O", "Cl", "S")))
    data = Moses("test", path=tmp_path / "some.smi", test_fraction=0.99)
    stage = SimpleNamespace(encode=lambda x: x, normalise=lambda z: z, posterior=lambda x: Posterior(mode=x))
    stage.decode = lambda z: z if set(z.unique().tolist()) <= {-1, 1} else z.roll(1, 1)  # of other symbols
    runs, distances = [], {"kl_0.05": 1.0, "long": 0.5}

    def trained(folder, *words):
        runs.append((folder.name, words))
        return folder

    def sample(model, batch, seeds, ts, sampler, guidance, task):
        leads = batch["index"] if "image" not in batch else None
        return data.pixels(leads) if leads is not None else batch["image"]

    monkeypatch.setattr(molecules, "chemnet_distance", lambda smiles, mu, sigma: distances.get(runs[-1][0], 9.0))
    for name, value in {
        **{"HERE": tmp_path, "TABLE": tmp_path / "results.csv", "trained": trained, "sample": sample},
        **{"data_of": lambda run: data, "trailing": lambda schedule, steps: None, "SHOWN": 2, "EACH": 1, "LEADS": 3},
        "load_model": lambda run: SimpleNamespace(autoencoder=stage, denoiser=SimpleNamespace(schedule=None)),
        "reference": lambda: molecules.Reference(
            {"CCO"}, [], {"mu": 0, "sigma": 0, "fingerprints": molecules.fingerprints(["CCO"])}
        ),
    }.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "moses.csv").write_text("model,valid,unique,novelty,fcd\nHMM,0.076,0.567,0.999,24.466\n")
    words = (f"runs={tmp_path / 'runs'}", "short=5", "long=7", "few=20", "num=30", "data.num=9")
    module.main(*words)
    found = report_rows.read(tmp_path / "results.csv")
    assert runs[0] == ("kl_0.001", ("training.steps=5", "first_stage.loss.kl_weight=0.001", "data.num=9"))
    assert runs[4][1][:3] == ("training.steps=5", "first_stage.loss.kl_weight=0.05", "data.representation=smiles")
    assert runs[-1] == ("long", ("training.steps=7", "first_stage.loss.kl_weight=0.05", "data.num=9"))
    (first,) = (row for row in found if (row["part"], row["variant"]) == ("first stage", "kl 0.05"))
    assert [first[name] for name in ("nats", "exact", "symbols", "exact_noise_0.1")] == ["3", "1", "1", "0"]
    samples = {(row["variant"], row["guidance"]): row for row in found if row["part"] == "samples"}
    assert [samples[key]["n"] for key in (("SMILES", "1"), ("long", "2"))] == ["20", "30"]
    assert samples["long", "1"]["fcd"] == "0.5"
    assert all(row["elements_right"] == "1" and float(row["logp_error"]) < 1e-5 for row in samples.values())
    chance = next(row for row in found if row["variant"] == "test molecules, facts of others")
    assert float(chance["elements_right"]) < 0.5
    assert [row["fcd"] for row in found if row["variant"] in ("20 test molecules", "30 test molecules")] == ["0.5"] * 2
    analogues = [row for row in found if row["part"] == "analogues"]
    assert [(row["strength"], row["similarity"], row["changed"]) for row in analogues] == [
        (str(strength), "1", "0") for strength in module.STRENGTHS
    ]
    assert all((tmp_path / f"{name}.png").is_file() for name in ("figure", "samples", "analogues", "interpolation"))
    monkeypatch.setattr(molecules, "chemnet_distance", None)  # nothing is computed again
    module.main(*words)
    assert report_rows.read(tmp_path / "results.csv") == found


def test_atoms_table_has_held_out_beside_sampled(tmp_path, monkeypatch):
    module = load("molecules/atoms.py")
    water = to_sample(Atoms(torch.tensor([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]), torch.tensor([3, 0, 0])))
    broken = water.clone()
    broken[0, 1] += 0.5
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "metrics.json").touch()
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: None)
    monkeypatch.setattr(module.build, "build_dataset", lambda config, split: InMemoryDataset("w", water[None]))
    for name, value in {
        **{"HERE": tmp_path, "TABLE": tmp_path / "atoms.csv", "load_run_config": lambda run: None},
        "load_model": lambda run: SimpleNamespace(denoiser=SimpleNamespace(schedule=None)),
        "trailing": lambda schedule, steps: None,
        "sample": lambda model, batch, seeds, *rest: torch.stack([(water, broken)[i % 2] for i in seeds]),
    }.items():
        monkeypatch.setattr(module, name, value)
    module.main(f"runs={tmp_path / 'runs'}", "steps=5", "num=4")
    held_out, found = report_rows.read(tmp_path / "atoms.csv")
    assert (held_out["molecules"], held_out["molecule_stable"], held_out["n"]) == ("held out", "1", "1")
    assert (found["n"], found["molecule_stable"], found["steps"]) == ("4", "0.5", "5")


LOADED = (
    *("augmentation/measure.py", "blue_marble/measure.py", "cifar10/measure.py", "controlnet/measure.py"),
    "domain_adaptation/measure.py",
    *("distillation/speed.py", "emoji/measure.py", "families/measure.py", "faults/kill.py", "faults/memory.py"),
    *(
        "first_stage/measure.py",
        "instruct_pix2pix/measure.py",
        "kuramoto_sivashinsky/measure.py",
        "lora/measure.py",
        "moving/measure.py",
        "notes/measure.py",
        "molecules/atoms.py",
        "molecules/measure.py",
        "quickstart/words.py",
        "scale/simulate.py",
    ),
)

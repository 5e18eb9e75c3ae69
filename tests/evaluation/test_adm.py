"""ADM's evaluation of two npz files: every number is that of a plain numpy computation from the same features."""

import json
import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from smoke import command, here
from torch import Tensor, nn

from ldm.cli.errors import run_guarded
from ldm.errors import UserError
from ldm.evaluation import adm
from ldm.io import npz
from ldm.io.download import AssetNotFoundError
from ldm.metrics import features
from ldm.sampling.prompts import captions_and_labels


class Toy(nn.Module):
    """Five features that stand for pool3, four for the spatial ones, of (B, 3, 4, 4) pictures; its classes are the
    first three.
    """

    name, pooled, num_features, resize, identity = "toy", 5, 9, "none", "0"

    def __init__(self, weights=None):
        super().__init__()
        self.mix = torch.randn(48, 9, generator=torch.Generator().manual_seed(0)) / 48**0.5

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 4, 4)
        return (images.flatten(1).float() / 64 - 2) @ self.mix

    def classify(self, features: Tensor) -> Tensor:
        return 3 * features[:, :3]


def pictures(n: int, seed: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (n, 4, 4, 3), dtype=np.uint8)


def seen(images: np.ndarray) -> np.ndarray:
    return Toy()(torch.as_tensor(images).permute(0, 3, 1, 2)).double().numpy()


def fid(mu1, sigma1, mu2, sigma2) -> float:
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)


def statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    return {
        **{"mu": x[:, :5].mean(0), "sigma": np.cov(x[:, :5], rowvar=False)},
        **{"mu_s": x[:, 5:].mean(0), "sigma_s": np.cov(x[:, 5:], rowvar=False)},
    }


def manifold(x: np.ndarray, centres: np.ndarray) -> float:
    """The share of x in a ball around a centre that reaches its third nearest other one."""
    radius = [np.sort(np.linalg.norm(centres - one, axis=1))[3] for one in centres]
    return np.mean([(np.linalg.norm(centres - one, axis=1) <= radius).any() for one in x])


def by_numpy(samples: np.ndarray, reference: np.ndarray, given: dict[str, np.ndarray]) -> dict[str, float]:
    x, y = seen(samples), seen(reference)
    mine = statistics(x)
    scores = []
    for start in range(0, len(x), 5000):
        e = np.exp(3 * x[start : start + 5000, :3])
        p = e / e.sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    return {
        "fid": fid(mine["mu"], mine["sigma"], given["mu"], given["sigma"]),
        "sfid": fid(mine["mu_s"], mine["sigma_s"], given["mu_s"], given["sigma_s"]),
        "inception_score": np.mean(scores),
        "precision": manifold(x[:, :5], y[:, :5]),
        "recall": manifold(y[:, :5], x[:, :5]),
    }


@pytest.fixture
def whole(tmp_path):
    """A reference like VIRTUAL_imagenet256_labeled.npz, with statistics of more images than it holds; samples."""
    everything, samples = pictures(400, 1), pictures(150, 2, 40)
    np.savez(tmp_path / "VIRTUAL_toy.npz", arr_0=everything[:120], arr_1=np.arange(120), **statistics(seen(everything)))
    np.savez(tmp_path / "samples.npz", arr_0=samples, arr_1=np.arange(150))
    return tmp_path, samples, everything


def evaluated(folder, **options) -> dict[str, float]:
    return adm.adm_metrics(
        npz.NpzImages.open(folder / "VIRTUAL_toy.npz"), npz.NpzImages.open(folder / "samples.npz"), Toy(), **options
    )


def test_adm_evaluation_matches_numpy(whole):
    folder, samples, everything = whole
    expected = by_numpy(samples, everything[:120], statistics(seen(everything)))
    assert 0 < expected["recall"] < 1
    assert evaluated(folder) == pytest.approx(expected, rel=1e-6)
    assert evaluated(folder, batch_size=7) == pytest.approx(expected, rel=1e-6)
    own = by_numpy(samples, everything[:120], statistics(seen(everything[:120])))
    assert abs(own["fid"] - expected["fid"]) > 1e-3  # it is the file's statistics that count
    np.savez(folder / "VIRTUAL_toy.npz", arr_0=everything[:120])
    assert evaluated(folder) == pytest.approx(own, rel=1e-6)
    np.savez_compressed(folder / "samples.npz", arr_0=samples)
    assert evaluated(folder) == pytest.approx(own, rel=1e-6)


def test_inception_score_averages_ordered_blocks(whole):
    from ldm.metrics.inception import inception_score

    logits = (
        torch.randn(130, 4, generator=torch.Generator().manual_seed(0)).double()
        + torch.arange(130)[:, None] * torch.eye(4)[0] / 20
    )
    p = logits.softmax(1).numpy()
    blocks = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in (p[:50], p[50:100], p[100:])]
    assert inception_score(logits, 50).item() == pytest.approx(np.mean(blocks), rel=1e-12)
    assert inception_score(logits.flip(0), 50).item() != pytest.approx(np.mean(blocks), rel=1e-6)
    assert inception_score(torch.tensor([[300.0, -300.0]] * 3 + [[-300.0, 300.0]] * 3)).item() == pytest.approx(
        2
    )  # no log of zero


def test_adm_command_writes_scores(whole, monkeypatch, capsys):
    folder, _, _ = whole
    weights = []
    monkeypatch.setattr(features, "SpatialInception", lambda file: weights.append(file) or Toy())
    typed = [str(folder / name) for name in ("VIRTUAL_toy.npz", "samples.npz")]
    assert adm.main(typed) == 0
    kept = json.loads((folder / "samples.json").read_text())
    assert {name: kept[name] for name in ("fid", "recall")} == pytest.approx(
        {k: v for k, v in evaluated(folder).items() if k in kept and k in ("fid", "recall")}
    )
    assert kept["score/n"] == 150
    assert kept["score/reference"]
    assert kept["protocol"]
    assert "fid" in capsys.readouterr().out
    assert adm.main([*typed, f"out={folder}/out.json", "batch_size=1", "weights=x.pth"]) == 0
    assert weights == [None, "x.pth"]
    again = json.loads((folder / "out.json").read_text())
    assert {
        name: value if isinstance(value, list | str) else pytest.approx(value) for name, value in kept.items()
    } == again
    assert (adm.main([]), adm.main(["--help"]), adm.main([*typed, "-h"])) == (2, 0, 0)
    assert capsys.readouterr().out.count("ADM's evaluation, as papers use it") == 3


def test_adm_command_reports_missing_weights_and_wrong_files(whole, tmp_path, monkeypatch, capsys):
    folder, samples, _ = whole
    monkeypatch.setenv("LDM_OFFLINE", "1")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("LDM_INCEPTION", raising=False)
    typed = [str(folder / name) for name in ("VIRTUAL_toy.npz", "samples.npz")]
    with pytest.raises(AssetNotFoundError, match=r"FID needs .*weights-inception"):
        adm.main(typed)
    assert run_guarded(lambda: adm.main(typed)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for words, said in (
        (typed[:1], "expected REFERENCE.npz"),
        ([*typed, "batch=3"], "expected REFERENCE.npz"),
        ([*typed, "batch_size=0"], "batch_size=0"),
    ):
        with pytest.raises(UserError, match=said):
            adm.main(words)
    bad = folder / "bad.npz"
    for arrays, said in (
        ({"images": samples}, "expected arr_0"),
        ({"arr_0": samples.astype(np.float32)}, "arr_0 is float32"),
        ({"arr_0": samples[..., :1]}, r"expected images uint8 \(N, height, width, 3\)"),
        ({"arr_0": samples[:3]}, "3 images, expected at least 4"),
        ({"arr_0": samples, "mu": np.zeros(5)}, "has mu, but no sigma, mu_s, sigma_s"),
        (
            {"arr_0": samples, "mu": np.zeros(5), "sigma": np.eye(4), "mu_s": np.zeros(4), "sigma_s": np.eye(4)},
            r"sigma is \(4, 4\), expected \(5, 5\)",
        ),
        (
            {
                "arr_0": samples,
                "mu": np.zeros(5),
                "sigma": np.eye(5) * np.nan,
                "mu_s": np.zeros(4),
                "sigma_s": np.eye(4),
            },
            "all finite",
        ),
    ):
        np.savez(bad, **arrays)
        with pytest.raises(UserError, match=said):
            adm.adm_metrics(npz.NpzImages.open(bad), npz.NpzImages.open(typed[1]), Toy())
    with pytest.raises(UserError, match="no such file"):
        npz.NpzImages.open(folder / "none.npz")
    bad.write_bytes((folder / "samples.npz").read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot be read as an"):
        npz.NpzImages.open(bad)


def test_npz_images_refuse_pickles(tmp_path):
    np.savez(tmp_path / "bad.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="arr_0 is object"):
        npz.NpzImages.open(tmp_path / "bad.npz")


def share(rank: int, ranks: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    images = {row: torch.full((1, 2, 4), row, dtype=torch.uint8) for row in range(7) if (row > 4) == bool(rank)}
    npz.write_npz(adm.Path(folder, "made.npz"), images, (7, 2, 4))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_npz_images_are_written_by_several_processes(tmp_path):
    torch.multiprocessing.spawn(share, (2, str(tmp_path)), nprocs=2)
    made = np.load(tmp_path / "made.npz")["arr_0"]
    assert made.shape == (7, 2, 4, 3)
    assert (made == np.arange(7)[:, None, None, None]).all()
    assert not list(tmp_path.glob(".*"))


def test_sample_saves_npz_for_adm(lively, smoke, tmp_path):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("sample.py", f"run={lively}", "num=6", "steps=1", "save=all", "output_dir=a") == 0
        assert command("sample.py", f"run={lively}", "num=6", "steps=1", "save=npz", "output_dir=c") == 0
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["grid.png", "metrics.json", "samples.npz"]
    with zipfile.ZipFile(tmp_path / "c" / "samples.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"]
    made = np.load(tmp_path / "c" / "samples.npz")["arr_0"]
    for i, image in enumerate(made):
        assert (image == np.asarray(Image.open(tmp_path / "a" / f"{i:06d}.png"))[..., None]).all()
    batch = npz.NpzImages.open(tmp_path / "c" / "samples.npz")
    assert batch.shape == made.shape
    assert torch.equal(torch.cat(list(batch.iter_batches(4))), torch.as_tensor(made).permute(0, 3, 1, 2))


def test_sample_labels_are_balanced_or_random_by_seed():
    card = SimpleNamespace(classes=["a", "b", "c"], captions=[["a"], ["b"], ["c"]])

    def labels(**asked) -> list:
        return [k for _, k in captions_and_labels(card, 600, **asked)]

    assert labels(labels="balanced")[:5] == [0, 1, 2, 0, 1]
    drawn = labels(labels="random")
    counts = np.bincount(drawn)
    assert drawn[:12] != labels(labels="balanced")[:12]
    assert len(counts) == 3
    assert counts.min() > 160
    assert len(set(counts)) > 1


@pytest.mark.slow
def test_adm_command_with_inception_weights(tmp_path, capsys):
    """Weights drawn at random, of the published file's shapes; a reference of 2,048 and 2,023 features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **options):
            return None

    torch.manual_seed(0)
    torch.save({}, tmp_path / "inception.pth")
    torch.save(
        Empty(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "inception.pth")
        ).state_dict(),
        tmp_path / "inception.pth",
    )
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=pictures(5, 1), **statistics)
    np.savez(tmp_path / "samples.npz", arr_0=pictures(6, 2, 99))
    assert (
        adm.main(
            [str(tmp_path / name) for name in ("VIRTUAL.npz", "samples.npz")]
            + [f"weights={tmp_path / 'inception.pth'}"]
        )
        == 0
    )
    found = json.loads((tmp_path / "samples.json").read_text())
    assert found["score/network"] == "inception_spatial"
    net = features.SpatialInception(tmp_path / "inception.pth")
    x = net(torch.as_tensor(pictures(6, 2, 99)).permute(0, 3, 1, 2)).double().numpy()
    for name, part in (("fid", x[:, :2048]), ("sfid", x[:, 2048:])):
        roots = np.sqrt(
            np.linalg.eigvalsh((part - part.mean(0)) @ (part - part.mean(0)).T / 5).clip(0)
        )  # of the covariance's few
        expected = (part.mean(0) ** 2).sum() + part.var(0, ddof=1).sum() + part.shape[1] - 2 * roots.sum()
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert "inception_score" in capsys.readouterr().out

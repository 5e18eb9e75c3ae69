"""What anybody may have written is refused in one line: nothing in it runs, nothing is written, nothing grows without
end.
"""

import io
import json
import os
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from smoke import command, composed, here

from ldm.checkpoint import external
from ldm.checkpoint.load import load_run_config, read_data_card
from ldm.config import trust
from ldm.data.folder import ImageFolder
from ldm.data.shards import TarShardDataset
from ldm.data.standard_datasets import COCO
from ldm.errors import UserError
from ldm.io import images
from ldm.io.parse import parse_json, parse_yaml
from ldm.runs.data_card import DataCard
from ldm.sampling.inputs import InputSpec, image_input
from ldm.sampling.request import SampleRequest

HOSTILE = [  # all of these can be called from a config that a person types, or by Hydra, or both
    *(
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.save",
        "torch.utils.collect_env.run",
        "torch.distributed.run.main",
    ),
    *(
        "numpy.save",
        "numpy.f2py.main",
        "pip.main",
        "pip._internal.main",
        "safetensors.torch.save_file",
        "lightning.Trainer",
        "wandb.init",
    ),
    *(
        "torch.optim.optimizer.torch.utils.collect_env.run",
        "torch.nn.modules.module.torch.save",
        "torch.nn._reduction.warnings.warn",
    ),
    *(
        "ldm.io.atomic.write_text",
        "ldm.data.image_cache.write_tensors",
        "ldm.data.latents.write_latents",
        "ldm.data.shards.local_path",
        "ldm.runs.cache.ensure_trained",
    ),
    *(
        "ldm.metrics.features.fetch",
        "ldm.report.browse.main",
        "ldm.io.images.save_png",
        "ldm.interop.single_file.save",
        "ldm.training.checkpoints.CheckpointCallback",
    ),
    *(
        "ldm.net.unet.UNet.forward.__globals__.clear",
        "ldm.checkpoint.load.load_model",
        "train.train",
        "sample.sample",
        "spy.torch.save",
        "spy.__loader__.exec_module",
    ),
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ran(monkeypatch) -> list:
    """Whatever was run or opened for writing by a file's order."""
    calls: list = []
    monkeypatch.setattr(os, "system", lambda *a: calls.append(a))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(torch, "save", lambda *a, **k: calls.append(a))
    return calls


def run_with(folder: Path, config: object) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    (folder / "data.json").write_text("{}")
    return folder


@pytest.mark.parametrize("target", HOSTILE)
def test_run_config_targets_are_restricted(tmp_path, target, ran):
    for place, node in enumerate(
        ({"net": {"_target_": target, "_partial_": True}}, {"a": [{"b": {"_target_": target, "_args_": ["x"]}}]})
    ):
        with pytest.raises(UserError, match=r"_target_") as error:
            load_run_config(run_with(tmp_path / str(place), node))
        assert "\n" not in str(error.value)
    assert not ran


def test_check_target_allows_parts_of_models(monkeypatch):
    for name in (
        "ldm.net.unet.UNet",
        "ldm.data.folder.ImageFolder",
        "ldm.data.degrade.bicubic",
        "ldm.recipes.diffusion.DiffusionRecipe",
        "spy.Spy",
    ):
        trust.check_target(name)
    for name in (
        "torch.optim.AdamW",
        "torch.nn.LayerNorm",
        "torch.nn.functional.silu",
        "ldm.checkpoint.teachers.autoguidance",
        "ldm.training.lr.cosine",
    ):
        trust.check_target(name)
    with pytest.raises(UserError, match="set LDM_TRUST=lightning"):
        trust.check_target("lightning.pytorch.callbacks.EarlyStopping")
    monkeypatch.setenv("LDM_TRUST", "timm,lightning")
    trust.check_target("lightning.pytorch.callbacks.EarlyStopping")


def test_check_target_allows_every_target_in_conf():
    for file in (Path(trust.__file__).parents[1] / "conf").rglob("*.yaml"):
        for line in file.read_text().splitlines() if file.parent.name != "logger" else ():
            if "_target_: " in line and not {"{", "?"} & set(line.partition("_target_: ")[2]):
                trust.check_target(line.partition("_target_: ")[2].split("#")[0].split(",")[0].strip("} "))


def test_load_run_config_drops_logger(tmp_path, ran):
    cfg = load_run_config(run_with(tmp_path / "run", {"logger": {"_target_": HOSTILE[0]}, "seed": 3}))
    assert "logger" not in cfg
    assert cfg.seed == 3


def test_run_config_text_is_not_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    planted = "${oc.create:{_target_:os.system}}"
    cfg = load_run_config(
        run_with(tmp_path / "run", {"name": "${oc.env:SECRET}", "net": planted, "prompt": "a ${ b", "missing": "???"})
    )
    assert (cfg.name, cfg.net, cfg.prompt, cfg.missing) == ("${oc.env:SECRET}", planted, "a ${ b", "???")


def test_sample_refuses_hostile_run(smoke, tmp_path, capsys, ran):
    config = (smoke.run / "config.yaml").read_text()
    run = run_with(tmp_path / "run", config.replace("ldm.net.unet.UNet", "torch.utils.collect_env.run"))
    (run / "data.json").write_text((smoke.run / "data.json").read_text())
    with here(tmp_path):
        assert command("sample.py", f"run={run}", "num=1") == 2
    assert "is refused" in capsys.readouterr().err
    assert not ran
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "data.json"]


def test_safetensors_header_targets_are_restricted(tmp_path, ran):
    header = {"config": {"net": {"_target_": "torch.utils.collect_env.run", "command": "x"}}, "data": {}}
    save_file(
        {"net.w": torch.ones(1), "autoencoder.w": torch.ones(1)},
        tmp_path / "a.safetensors",
        {"ldm": json.dumps(header)},
    )
    with pytest.raises(UserError, match=r"collect_env\.run.* is refused"):
        external.open_pipeline(tmp_path / "a.safetensors")
    assert not ran


def test_png_record_targets_are_restricted(tmp_path, ran):
    cfg = composed(name="sample")
    told = {
        "request": {**dict(cfg), "task": {"_target_": "torch.utils.collect_env.run"}, "run": "x"},
        "rows": [0],
        "row": 0,
    }
    told |= {"told": [], "inputs": {}, "weights": ""}
    from ldm.config.build import to_container

    for change, why in (
        ({}, "is refused"),
        ({"inputs": 3, "task": None}, "run=x: no such folder"),
        ({"run": {"a": 1}, "task": None}, "reproduce="),
    ):
        text = json.dumps(
            told | {"request": {key: to_container(one) for key, one in (told["request"] | change).items()}}
        )
        images.save_png(tmp_path / "a.png", torch.zeros(1, 4, 4, dtype=torch.uint8), {"reproduce": text})
        asked = cfg.copy()
        asked.reproduce = str(tmp_path / "a.png")
        with pytest.raises(UserError, match=why):
            SampleRequest.from_config(asked)
    assert not ran


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "alias"),
        ("a: &a [*a]", "alias"),
        ("[" * 100_000, "nested deeper"),
        ("a: " + "{a: " * 200 + "1" + "}" * 200, "nested deeper"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!binary aGk=", "bytes"),
        ("1: x", "the key 1 is not text"),
        ("a: " + "9" * 5000, "limit"),
        ("- x", "holds no config"),
        ("\x00", "special characters"),
    ],
)
def test_yaml_bomb_is_one_error(tmp_path, text, why):
    with pytest.raises(UserError, match=why) as error:
        load_run_config(run_with(tmp_path / "run", text))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_parse_yaml_leaves_dates_as_text():
    assert parse_yaml("a: 2001-99-99\nb: 2001-01-01") == {"a": "2001-99-99", "b": "2001-01-01"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, "[" * 200 + "]" * 200, "9" * 5000, "nan", ""])
def test_json_bomb_is_one_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"nested|limit|Expecting"):
        parse_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 3},
        {"classes": [3]},
        {"captions": [[]]},
        {"captions": [["a"], ["b"]]},
        {"classes": [], "captions": [["a"], ["b"]]},
        {"shape": [1]},
        {"shape": [1, 2, 3, 4, 5]},
        {"shape": [1, 32, 10**9]},
        {"shape": [1, 32, "32"]},
        {"shape": [1, 0, 32]},
        {"channels": 1},
        {"more": 1},
        {"medium": 3},
        {"medium": "../clip"},
        {"rate": "8"},
        {"rate": 0},
        {"rate": True},
    ],
)
def test_data_card_is_validated(change, tmp_path):
    card = {"fingerprint": "", "classes": ["a"], "captions": [["a"]], "shape": [1, 32, 32]}
    assert DataCard.from_dict(card).shape == (1, 32, 32)
    (tmp_path / "data.json").write_text(json.dumps(card | change))
    with pytest.raises(UserError, match=r"data\.json is damaged \(expected"):
        read_data_card(tmp_path)


def test_data_card_names_media_of_ldm_and_of_the_users_own_packages_only(tmp_path, monkeypatch):
    card = {"fingerprint": "", "classes": [], "captions": [], "shape": [1, 32, 32]}
    assert DataCard.from_dict(card).medium == "image"
    stored = DataCard.from_dict({**card, "medium": "clip", "rate": 12.5})
    assert (stored.medium, stored.rate) == ("clip", 12.5)
    (tmp_path / "our_lab").mkdir()
    (tmp_path / "our_lab" / "scope.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert DataCard.from_dict({**card, "medium": "our_lab.scope"}).medium == "our_lab.scope"
    for name in ("os.path", "shutil.x", "torch.hub", "ldm.io", "train.x", "our_lab.scope.write", "our_lab._scope"):
        with pytest.raises(UserError, match=f"^medium={name} is refused: .* LDM_TRUST={name.split('.')[0]}$"):
            DataCard.from_dict({**card, "medium": name})
    (tmp_path / "data.json").write_text(json.dumps({**card, "medium": "os.path"}))
    with pytest.raises(UserError, match=r"data\.json: medium=os\.path is refused"):
        read_data_card(tmp_path)
    with pytest.raises(UserError, match=r"^medium=os\.path is refused"):
        external.data_card({**card, "medium": "os.path"})
    monkeypatch.setenv("LDM_TRUST", "torch")
    assert DataCard.from_dict({**card, "medium": "torch.hub"}).medium == "torch.hub"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is that large, with more chunks before its few bytes of picture."""
    every = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in every
    )


def good() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


BAD_IMAGES = {
    "giant.png": png(20_000, 20_000),
    "wide.png": png(2**31 - 1, 2**31 - 1),
    "words.png": png(20, 20, (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))),
    "profile.png": png(20, 20, (b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20)))),
    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n(touch) run\nshowpage\n",
    "page.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
    "list.jpg": b"#EXTM3U\nhttp://localhost/\n",
}


def test_hostile_images_are_skipped(tmp_path, ran):
    root = tmp_path / "pictures"
    root.mkdir()
    for name, data in {**BAD_IMAGES, "good.png": good()}.items():
        (root / name).write_bytes(data)
    with pytest.raises(UserError, match=r"more than data\.max_unreadable=0\.2: giant\.png"):
        ImageFolder(root, size=16, channels=3, test_fraction=0)
    data = ImageFolder(root, size=16, channels=3, test_fraction=0, max_unreadable=1.0)
    assert len(data) <= 3, "two may be read after all: their words or profile were left out"
    assert {"giant.png", "list.jpg", "page.png", "script.jpg", "wide.png"} <= set(data.skipped)
    for name in ("giant.png", "wide.png", "script.jpg"):
        with pytest.raises(UserError, match=name):
            image_input(InputSpec((16, 16), 3), str(root / name))
    assert not ran


def tarred(path: Path, *members: tuple[str, bytes, dict]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data, options in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in options.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shard_members_outside_are_not_extracted(tmp_path):
    """Shards are read where they lie, by offset: nothing is unpacked, and a link is no image."""
    (tmp_path / "secret.png").write_bytes(good())
    path = tarred(
        tmp_path / "x.tar",
        ("../../outside.png", good(), {}),
        ("/etc/absolute.png", good(), {}),
        ("link.png", b"", {"type": tarfile.SYMTYPE, "linkname": str(tmp_path / "secret.png")}),
        ("hard.png", b"", {"type": tarfile.LNKTYPE, "linkname": "../secret.png"}),
        ("device.png", b"", {"type": tarfile.CHRTYPE}),
        ("pipe.png", b"", {"type": tarfile.FIFOTYPE}),
    )
    before = sorted(tmp_path.rglob("*"))
    data = TarShardDataset(path, size=16, test_fraction=0)
    assert len(data) == 2
    assert data.batch([(0, 0), (0, 1)])["image"].shape == (2, 3, 16, 16)
    assert [one for one in sorted(tmp_path.rglob("*")) if one not in before and "cache" not in one.parts] == []


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("1.png", good(), {}), ("1.cls", b"9" * 18, {})], "not a number below"),
        ([("1.png", good(), {}), ("1.cls", b"9" * 100_000, {})], "not a number below"),
        ([("1.png", good(), {}), ("1.cls", b"-2", {})], "not a number below"),
    ],
)
def test_shard_labels_are_bounded(tmp_path, members, why):
    with pytest.raises(UserError, match=why):
        TarShardDataset(tarred(tmp_path / "x.tar", *members), size=16, test_fraction=0)


def test_nested_tar_headers_are_refused(tmp_path):
    """Ten thousand long names, one for the other: Python's tarfile calls itself for each."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    (tmp_path / "x.tar").write_bytes((info.tobuf() + b"name\0".ljust(512, b"\0")) * 10_000)
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        TarShardDataset(tmp_path / "x.tar", size=16, test_fraction=0)


def test_captions_are_bounded(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for name, text in {
        "deep.json": "[" * 100_000,
        "long.txt": "word " * 1_000_000,
        "list.json": '{"caption": [[[["a"]]], {}, 3, null]}',
    }.items():
        (root / name).write_text(text)
        (root / Path(name).with_suffix(".png")).write_bytes(good())
    data = ImageFolder(root, size=16, test_fraction=0)
    assert max(len(text) for texts in data.texts for text in texts) <= 1 << 20
    path = tarred(
        tmp_path / "x.tar",
        ("1.png", good(), {}),
        ("1.json", b'{"caption": ' + b"[" * 100_000, {}),
        ("2.png", good(), {}),
        ("2.txt", b"a " * (1 << 20), {}),
    )
    data = TarShardDataset(path, size=16, test_fraction=0)
    assert data.batch([(0, 0), (0, 1)])["caption"] == ["", ""]


def test_caption_lists_cannot_name_files_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(good())
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "a.png").write_bytes(good())
    (root / "metadata.csv").write_text(f"file_name,caption\na.png,red\n../secret.png,out\n{tmp_path}/secret.png,out\n")
    data = ImageFolder(root, size=16, test_fraction=0)
    assert (len(data), data.texts) == (1, [["red"]])
    (root / "metadata.csv").write_text('file_name,caption\na.png,"' + "x" * 200_000 + '"\n')
    with pytest.raises(UserError, match="is not a list of captions"):
        ImageFolder(root, size=16, test_fraction=0)

    for name in ("../../secret.png", str(tmp_path / "secret.png")):
        listed = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
        (tmp_path / "coco" / "train2017").mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "coco" / "annotations" / "captions_train2017.json").write_text(json.dumps(listed))
        with pytest.raises(UserError, match="names a file outside its folder"):
            COCO(tmp_path / "coco", size=16)

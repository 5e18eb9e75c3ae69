import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.data import captions as captions_module
from ldm.data import decode, folder
from ldm.data.captions import sidecar_captions, words_from_filename
from ldm.data.decode import load_rectangle
from ldm.data.folder import ImageFolder, infer_size_and_channels, split_train_test
from ldm.data.memory import InMemoryDataset
from ldm.errors import UserError
from ldm.runs.data_card import DataCard

DRAFT = (13, 3)  # grey levels by which a JPEG decoded small is another picture: at most, and on average
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def paint(path: Path, colour=RED, size=(20, 20), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def level(image) -> list[float]:
    return image.double().mean((1, 2)).tolist()


@pytest.fixture
def pictures(tmp_path):
    """Forty readable images of two classes."""
    root = tmp_path / "pictures"
    for i in range(20):
        paint(root / "golden_retriever" / f"{i:03d}.png", (200, 10 * i, 0))
        paint(root / "sports-car" / f"{i:03d}.jpg", (0, 10 * i, 200))
    return root


def test_folder_classes_are_subfolders(pictures):
    data = ImageFolder(pictures, size=16, test_fraction=0)
    assert data.images.shape == (40, 3, 16, 16)
    assert data.classes == ["golden_retriever", "sports-car"]
    assert data.labels.tolist() == [0] * 20 + [1] * 20
    assert {data.caption(p, 0) for p in range(50)} == {
        "golden retriever",
        "a photo of golden retriever",
        "a picture of golden retriever",
    }
    assert data.captions[1][0] == "sports car"
    batch = data.batch([(0, 0), (3, 39)])
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["image"][0, 0].mean().item() == pytest.approx(200 / 127.5 - 1)
    assert DataCard.from_dataset(data).shape[0] == 3


def test_folder_class_captions_from_file(pictures, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"sports-car": ["a fast car"], "golden_retriever": ["a dog"], "more": ["x"]}))
    data = ImageFolder(pictures, captions=file, test_fraction=0)
    assert data.captions == [["a dog"], ["a fast car"]]
    assert (data.caption(0, 0), data.caption(0, 39)) == ("a dog", "a fast car")
    file.write_text(json.dumps({"sports-car": ["a fast car"]}))
    with pytest.raises(UserError, match=r"no caption for golden_retriever"):
        ImageFolder(pictures, captions=file)
    file.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        ImageFolder(pictures, captions=file)


SMALL = ", 5 smaller than 32 px and enlarged: IMG_1234.png, a.png, b.png, ..."


def test_folder_captions_from_sidecar_files(tmp_path):
    root = tmp_path / "pictures"
    for name in ("a", "b", "sub/c", "red_car-2 (copy)", "IMG_1234"):
        paint(root / f"{name}.png")
    (root / "a.txt").write_bytes("\ufeffun café, l'été\r\n\r\nat  night\n".encode())
    (root / "b.json").write_text(json.dumps({"caption": ["one", "two"], "other": 3}))
    (root / "sub" / "c.json").write_text("{broken")
    data = ImageFolder(root, test_fraction=0)
    told = [{data.caption(epoch, i) for epoch in range(40)} for i in range(5)]
    assert told == [{""}, {"un café, l'été", "at night"}, {"one", "two"}, {"red car"}, {"c"}]
    assert data.classes == ["image"]
    assert data.captions == [["un café, l'été", "at night", "one", "two", "red car", "c"]]
    assert [data.caption(p, 2) for p in range(9)] == [
        ImageFolder(root, test_fraction=0).caption(p, 2) for p in range(9)
    ]
    assert data.summary.endswith(
        "5 images, captions beside them, 1 without caption: IMG_1234.png, 32 px, fits in memory, 0 held out" + SMALL
    )
    with pytest.raises(UserError, match="captions to classes"):
        ImageFolder(root, captions=tmp_path / "captions.json")


def test_folder_captions_from_file_names(tmp_path, monkeypatch):
    monkeypatch.setattr(captions_module, "SHOWN", 4)
    for name in "abcdefghij":
        paint(tmp_path / "pictures" / f"{name}.png")
    data = ImageFolder(tmp_path / "pictures", test_fraction=0)
    assert data.captions == [["a", "d", "g", "j"]]
    assert [data.caption(0, i) for i in range(10)] == list("abcdefghij")


def test_words_from_filename():
    said = {
        "cat12": "cat",
        "DSC01234": "",
        "a3f9bc": "",
        "Screenshot 2024-01-02": "",
        "a red_über-car": "a red über car",
        "123": "",
    }
    assert {name: words_from_filename(name) for name in said} == said
    assert sidecar_captions(Path("/nowhere/x.png")) == []


def test_folder_order_and_fingerprint_are_independent_of_disk_order(pictures, tmp_path):
    for path in sorted(pictures.rglob("*.*"), reverse=True):
        target = tmp_path / "again" / path.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    first, second = ImageFolder(pictures), ImageFolder(tmp_path / "again")
    assert torch.equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint != ImageFolder(pictures, size=16).fingerprint


def test_split_train_test_is_stable_when_images_are_added(pictures):
    names = [f"{i:05d}.png" for i in range(4000)]
    held, rows = split_train_test(names, 0.05)["test"]
    assert held == len(rows)
    assert 150 < held < 250
    more = sorted([*names, *(f"{i:05d}b.png" for i in range(500))])
    assert {more[i] for i in split_train_test(more, 0.05)["test"][1]} & set(names) == {names[i] for i in rows}
    train, test = ImageFolder(pictures, test_fraction=0.2), ImageFolder(pictures, "test", test_fraction=0.2)
    assert len(train) + len(test) == 40
    assert min(len(train), len(test)) > 0
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(ImageFolder(pictures, test_fraction=0).images.flatten(1).unique(dim=0))


def test_split_train_test_of_one_image_shares_it(tmp_path):
    paint(tmp_path / "pictures" / "one.png")
    assert [len(ImageFolder(tmp_path / "pictures", split)) for split in ("train", "test")] == [1, 1]


def test_load_rectangle_crops_centre(tmp_path):
    image = Image.new("RGB", (90, 30), GREEN)
    image.paste(RED, (0, 0, 30, 30))
    image.paste(BLUE, (60, 0, 90, 30))
    image.save(tmp_path / "wide.png")
    image.rotate(90, expand=True).save(tmp_path / "tall.png")
    for name, size in (("wide.png", (30, 90)), ("tall.png", (90, 30))):
        pixels, original = load_rectangle(tmp_path / name, 10, 10, 3)
        assert level(pixels) == [0, 255, 0]
        assert (original, pixels.dtype) == (size, torch.uint8)


def test_load_rectangle_applies_exif_orientation(tmp_path):
    image = Image.new("RGB", (40, 40), BLUE)
    image.paste(RED, (0, 0, 20, 40))  # red on the left; orientation 6 turns it clockwise: red on top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    pixels, _ = load_rectangle(tmp_path / "x.jpg", 8, 8, 3)
    assert pixels[0, :3].min() > 200
    assert pixels[0, 5:].max() < 55
    Image.new("RGB", (160, 40), BLUE).save(tmp_path / "wide.jpg", exif=exif)
    assert load_rectangle(tmp_path / "wide.jpg", 8, 8, 3)[1] == (160, 40)  # decoded at a half, upright


def test_load_rectangle_fills_transparency_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (*RED, 0)).save(tmp_path / "a.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "b.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "c.png", transparency=1)
    palette.save(tmp_path / "d.gif", transparency=1)
    for name in ("a.png", "b.png", "c.png", "d.gif"):
        assert level(load_rectangle(tmp_path / name, 8, 8, 3)[0]) == [255, 255, 255], name
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert level(load_rectangle(tmp_path / "half.png", 8, 8, 1)[0]) == [pytest.approx(127, abs=1)]


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "L", "1", "YCbCr"])
def test_load_rectangle_supports_colour_modes(tmp_path, mode):
    name = "x.tif" if mode in ("CMYK", "YCbCr") else "x.png"
    white = mode in ("L", "1")
    # packed: Pillow before 13 does not read its own raw YCbCr
    paint(
        tmp_path / name,
        (255, 255, 255) if white else RED,
        mode=mode,
        **({"compression": "tiff_lzw"} if name == "x.tif" else {}),
    )
    assert level(load_rectangle(tmp_path / name, 8, 8, 3)[0]) == pytest.approx(
        [255] * 3 if white else [255, 0, 0], abs=2
    )


def test_load_rectangle_scales_16_bit_and_rejects_float(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "x.png")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.int32)).save(tmp_path / "y.tif")
    assert level(load_rectangle(tmp_path / "x.png", 8, 8, 1)[0]) == [128]
    assert level(load_rectangle(tmp_path / "y.tif", 8, 8, 3)[0]) == [128] * 3
    for name, kind in (("f.tif", np.float32), ("i.tif", np.int32)):
        Image.fromarray(np.full((8, 8), 70000, dtype=kind)).save(tmp_path / name)
        with pytest.raises(ValueError, match="8 or 16 bits"):
            load_rectangle(tmp_path / name, 8, 8, 1)


def test_load_rectangle_of_large_jpeg_is_exact(tmp_path):
    ramp = np.linspace(0, 255, 1000).round().astype(np.uint8)
    Image.fromarray(np.repeat(np.tile(ramp, (700, 1))[..., None], 3, 2)).save(tmp_path / "x.jpg", quality=95)
    pixels, _ = load_rectangle(tmp_path / "x.jpg", 16, 16, 1)
    centres = 150 + 700 * (np.arange(16) + 0.5) / 16
    assert pixels[0].double().mean(0).numpy() == pytest.approx(centres / 999 * 255, abs=3)  # a pixel is 11 apart


def test_folder_skips_unreadable_images_with_message(pictures, monkeypatch):
    whole = (pictures / "sports-car" / "000.jpg").read_bytes()
    bad = pictures / "sports-car"
    paint(bad / "noise.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (bad / "empty.png").touch()
    (bad / "page.jpg").write_text("<html>")
    (bad / "gone.webp").symlink_to(pictures / "nowhere.webp")
    (bad / "._000.jpg").write_bytes(whole)
    (bad / "Thumbs.db").write_bytes(b"x")
    paint(pictures / ".hidden" / "x.png")
    paint(bad / "giant.png", size=(300, 300))
    monkeypatch.setattr(decode, "MAX_PIXELS", 300 * 300 - 1)
    data = ImageFolder(pictures, size=32, test_fraction=0)
    assert len(data) == 40
    out = data.summary
    assert "40 images, 2 classes, 32 px, fits in memory, 0 held out, 40 smaller than 32 px and enlarged: " in out
    assert "enlarged: golden_retriever/000.png, " in out
    assert (
        "5 skipped: sports-car/empty.png, sports-car/giant.png, sports-car/gone.webp, ... (cannot identify image file)"
        in out
    )
    assert ImageFolder(pictures, size=32, test_fraction=0).summary == data.summary  # from the cache


def test_folder_refuses_more_unreadable_images_than_allowed(tmp_path, capsys):
    root = tmp_path / "pictures"
    for name in "abcd":
        paint(root / f"{name}.png")
    (root / "e.avif").touch()  # listed, although not every Pillow reads the format
    with pytest.raises(UserError, match=r"1 of 5 images cannot be read, more than data\.max_unreadable=0\.19: e\.avif"):
        ImageFolder(root, size=16, channels=3, max_unreadable=0.19)
    assert len(ImageFolder(root, size=16, channels=3, max_unreadable=0.2, test_fraction=0)) == 4
    assert " 5/5 " in capsys.readouterr().out


def test_images_fit_in_memory_of_more_bytes(monkeypatch):
    images = [torch.empty(n, dtype=torch.uint8) for n in (299, 300)]
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 3}.__getitem__)
    assert [folder.fits_in_memory(image) for image in images] == [True, False]
    monkeypatch.delattr(os, "sysconf")  # of Windows
    assert folder.fits_in_memory(images[1])


def test_folder_packed_images_equal_single_decodes(pictures, tmp_path, monkeypatch):
    (pictures / "sports-car" / "broken.jpg").write_text("no")
    data = ImageFolder(pictures, size=16, test_fraction=0.3)
    plain = torch.stack([load_rectangle(pictures / file.name, 16, 16, 3)[0] for file in data.files]).float() / 127.5 - 1
    assert len(data) < 40
    assert torch.equal(data.pixels(range(len(data))), plain)
    assert torch.equal(data.pixels([5, 2]), plain[[5, 2]])
    plainly = InMemoryDataset(
        data.name,
        (plain * 127.5 + 127.5).round().byte(),
        data.labels,
        dict(zip(data.classes, data.captions, strict=True)),
    )
    assert data.fingerprint == plainly.fingerprint
    (pack,) = (tmp_path / "cache" / "folders").glob("*.safetensors")
    assert data.stored.shape == (41, 3, 16, 16), "with a place for the broken one"
    mapping = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(pack))]
    assert mapping or not Path("/proc").is_dir()
    monkeypatch.setattr(folder, "fits_in_memory", lambda images: False)
    assert "16 px, read from the disk, " in ImageFolder(pictures, size=16).summary


@pytest.fixture
def photograph(tmp_path):
    """A JPEG with something at every scale, 600 x 450."""
    draw = np.random.default_rng(0)
    image = np.zeros((450, 600, 3))
    for scale in (4, 16, 64):
        coarse = (
            draw.normal(128, 24 * scale**0.25, (450 // scale + 2, 600 // scale + 2, 3)).clip(0, 255).astype(np.uint8)
        )
        image += np.asarray(Image.fromarray(coarse).resize((600, 450), Image.Resampling.BICUBIC)) / 3
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "photograph.jpg", quality=90)
    return tmp_path / "photograph.jpg"


@pytest.mark.parametrize("size", [16, 64, 100, 200, 300])
def test_load_rectangle_uses_reduced_jpeg_decoding(photograph, size, monkeypatch):
    """And how far that is from decoding it whole: its texture is finer than most, and the mean stays."""
    seen = []
    monkeypatch.setattr(decode, "to_8bit", lambda image: (seen.append(image.size), image)[1])
    fast = load_rectangle(photograph, size, size, 3)[0].double()
    monkeypatch.setattr(Image.Image, "draft", lambda self, mode, wanted: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda self, mode, wanted: None)
    whole = load_rectangle(photograph, size, size, 3)[0].double()
    assert seen[1] == (600, 450)
    assert min(seen[0]) >= min(2 * size, 450)
    assert (seen[0] == (600, 450)) == (size > 112), "at half the size or less where twice the target still fits"
    difference = (fast - whole).abs()
    assert float(difference.max()) <= DRAFT[0]
    assert float(difference.mean()) <= DRAFT[1]
    assert abs(float((fast - whole).mean())) < 0.2


def test_folder_follows_links_once(pictures):
    (pictures / "golden_retriever" / "back").symlink_to(pictures)
    (pictures.parent / "linked").symlink_to(pictures)
    assert len(ImageFolder(pictures.parent / "linked", test_fraction=0)) == 40


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_folder_accepts_non_utf8_names(tmp_path):
    paint(tmp_path / "pictures" / os.fsdecode(b"caf\xe9 noir") / os.fsdecode(b"\xe9.png"))
    data = ImageFolder(tmp_path / "pictures", test_fraction=0)
    assert data.classes == ["caf\ufffd noir"]
    json.dumps(data.captions).encode()


def test_folder_decodes_once(pictures, tmp_path, monkeypatch):
    first = ImageFolder(pictures)
    calls = Counter()
    monkeypatch.setattr(folder, "load_rectangle", lambda *args: (calls.update(["read"]), load_rectangle(*args))[1])
    assert torch.equal(ImageFolder(pictures).images, first.images)
    assert ImageFolder(pictures, "test", seed=3, flip=False, test_fraction=0.5)
    assert not calls
    paint(pictures / "golden_retriever" / "000.png", BLUE)
    assert not torch.equal(ImageFolder(pictures).images, first.images)
    assert calls["read"] == 40
    for path in (tmp_path / "cache" / "folders").glob("*.safetensors"):
        path.write_bytes(b"cut")
    ImageFolder(pictures)
    assert calls["read"] == 80


def test_folder_of_height_and_width_crops_each_image_to_cover_it(pictures):
    data = ImageFolder(pictures, size=[24, 40], channels=3, test_fraction=0)
    assert data.shape == (3, 24, 40)
    one = load_rectangle(pictures / data.files[0].name, 24, 40, 3)[0]
    assert torch.equal(data.images[0], one)
    assert data.resolved_config.items() >= {"size": [24, 40], "channels": 3}.items()
    square, same = (ImageFolder(pictures, size=size, channels=3) for size in (24, [24, 24]))
    assert same.resolved_config == square.resolved_config
    assert same.fingerprint == square.fingerprint


def test_folder_size_and_channels_are_majority(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    for i, (side, mode) in enumerate([(40, "L"), (130, "L"), (150, "RGB"), (900, "L"), (70, "1")]):
        paint(root / f"{i}.png", (9, 9, 9), (side, side + 30), mode)
    data = ImageFolder(root, test_fraction=0)
    assert data.shape == (1, 64, 64)
    assert "64 px, grey, fits in memory" in data.summary
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ImageFolder(root, test_fraction=0).shape[1:] == (128, 128)
    assert (ImageFolder(root, size=48).shape[1], ImageFolder(root, channels=3).shape[0]) == (48, 3)
    monkeypatch.setattr(folder, "HEADERS_READ", 2)
    assert infer_size_and_channels(root, [f"{i}.png" for i in (0, 2, 2, 0, 2)]) == (32, 1), "those at 0 and 3"
    for path in root.iterdir():
        paint(path, size=(20, 20))
    assert ImageFolder(root).resolved_config.items() >= {"size": 32, "channels": 3}.items()


def test_folder_content_hash_depends_on_images_captions_and_classes(pictures, tmp_path):
    first = ImageFolder(pictures).content
    assert ImageFolder(pictures, "test", seed=3, flip=False, test_fraction=0.5, content_hash=first).content == first
    for path in pictures.rglob("*.png"):
        os.utime(path, (1, 1))
    assert ImageFolder(pictures).content == first, "touched, not changed"
    with pytest.raises(UserError, match=f"not those of this run .digest {first}, then 0123"):
        ImageFolder(pictures, content_hash="0123")
    seen = {first}
    (pictures / "sports-car" / "000.txt").write_text("a car")
    seen.add(ImageFolder(pictures).content)
    (pictures / "sports-car" / "000.txt").write_text("a blue car")
    seen.add(ImageFolder(pictures).content)
    paint(pictures / "golden_retriever" / "000.png", BLUE)
    seen.add(ImageFolder(pictures).content)
    (pictures / "golden_retriever" / "001.png").unlink()
    seen.add(ImageFolder(pictures).content)
    assert len(seen) == 5


def test_folder_reports_errors_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.pdf").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("no")
    expected = {
        "nowhere": "no such folder",
        "text/x.pdf": "a file",
        "empty": "among 0 files",
        "text": "among 1 files",
        "bad": "none of 1",
    }
    for name, said in expected.items():
        with pytest.raises(UserError, match=said) as error:
            ImageFolder(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
        if name != "bad":
            assert "x.jpg, x.txt" in str(error.value)
    paint(tmp_path / "good" / "x.png")
    for option in ({"split": "val"}, {"channels": 4}, {"size": 2}, {"test_fraction": 1.0}):
        with pytest.raises(UserError, match=next(iter(option))):
            ImageFolder(tmp_path / "good", **option)
    with pytest.raises(UserError, match=r"1 images of 10000000x10000000 take .* GiB, "):
        ImageFolder(tmp_path / "good", size=10_000_000)
    assert not list(tmp_path.glob("cache/folders/*.safetensors"))


def test_folder_option_lists_every_default():
    import inspect

    option = yaml.safe_load((Path(folder.__file__).parents[2] / "conf" / "data" / "folder.yaml").read_text())
    parameters = inspect.signature(ImageFolder).parameters
    assert option.pop("_target_") == "ldm.data.folder.ImageFolder"
    assert option.pop("path") == "???"
    assert option == {name: one.default for name, one in parameters.items() if name != "path"}

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.augment import AugmentedDataset, RandomCrop
from ldm.data.decode import adm_rectangle, load_rectangle
from ldm.data.lazy import LazyDataset
from ldm.data.standard_datasets import COCO, LSUN, FileSource, ImageNet
from ldm.errors import UserError


def paint(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (red, 0, 0)).save(path, quality=100)


def reds(data):
    image = data.batch([(0, i) for i in range(len(data))])["image"]
    return ((image[:, 0].mean((1, 2)) + 1) * 127.5).round().int().tolist()


@pytest.fixture
def imagenet(tmp_path):
    for c, code in enumerate(("n01440764", "n02012849", "n03126707")):
        for i in range(2):
            paint(tmp_path / "train" / code / f"{code}_{i}.JPEG", 50 * c + i)
        paint(tmp_path / "val" / code / f"ILSVRC2012_val_{c:08d}.JPEG", 200 + c)
    return tmp_path


def test_imagenet_reads_standard_layout(imagenet):
    train, test = ImageNet(imagenet, size=16), ImageNet(imagenet, "test", size=16)
    assert train.batch([(0, i) for i in range(6)])["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert all(abs(a - b) <= 3 for a, b in zip(reds(train), [0, 1, 50, 51, 100, 101], strict=True))
    assert test.batch([(0, i) for i in range(3)])["label"].tolist() == [0, 1, 2]
    assert train.classes == ["n01440764", "n02012849", "n03126707"]
    (imagenet / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    assert ImageNet(imagenet, size=16).classes == ["tench n01440764", "crane n02012849", "crane n03126707"]
    (imagenet / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane2\n"
    )
    named = ImageNet(imagenet, size=16)
    assert named.classes[0] == "tench"
    assert named.caption(0, 0) in ("tench", "a photo of tench", "a picture of tench")
    assert named.content != train.content


def test_imagenet_reads_kaggle_layout(imagenet):
    inner = imagenet / "k" / "ILSVRC" / "Data" / "CLS-LOC"
    inner.mkdir(parents=True)
    (imagenet / "train").rename(inner / "train")
    for i in range(2):
        paint(inner / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", i)
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv: no such file"):
        ImageNet(imagenet / "k", "test")
    rows = [
        "ImageId,PredictionString",
        "ILSVRC2012_val_00000000,n02012849 1 2 3 4 ",
        "ILSVRC2012_val_00000001,n01440764 1 2 3 4",
    ]
    (imagenet / "k" / "LOC_val_solution.csv").write_text("\n".join(rows))
    assert ImageNet(imagenet / "k", "test", size=16).batch([(0, 0), (0, 1)])["label"].tolist() == [1, 0]
    assert len(ImageNet(imagenet / "k", size=16)) == 6


def test_coco_reads_captions(tmp_path):
    for i in (7, 9, 12):
        paint(tmp_path / "val2017" / f"{i:012d}.jpg", 20 * i)
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (12, 7, 9)]
    annotations = [{"image_id": i, "caption": f"{word} {i}\n"} for i in (7, 12) for word in ("one", "two")]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    data = COCO(tmp_path, "test", size=16)
    assert all(abs(a - b) <= 3 for a, b in zip(reds(data), [140, 240], strict=True)), "by name, those with captions"
    assert {data.caption(epoch, 0) for epoch in range(20)} == {"one 7", "two 7"}
    assert data.captions == [["one 7", "one 12"]]
    with pytest.raises(UserError, match="train2017: no such folder"):
        COCO(tmp_path)
    (tmp_path / "train2017").mkdir()
    with pytest.raises(UserError, match=r"captions_train2017\.json: no such file"):
        COCO(tmp_path)


def test_lsun_reads_categories(tmp_path):
    for i in range(3):
        paint(tmp_path / "church_outdoor_train" / str(i) / f"{i}.webp", 80 * i)
    data = LSUN(tmp_path, size=16)
    assert len(data) == 3
    assert data.captions == [["church outdoor", "a photo of church outdoor", "a picture of church outdoor"]]
    with pytest.raises(UserError, match=r"bedroom_val: no such folder .*data\.py export bedroom_val_lmdb"):
        LSUN(tmp_path, "test", category="bedroom")


def test_standard_datasets_reject_unknown_split(tmp_path):
    (tmp_path / "train" / "n1").mkdir(parents=True)
    for data in (ImageNet, COCO, LSUN):
        with pytest.raises(UserError, match="split='val': expected train or test"):
            data(tmp_path, "val")


def test_adm_crop_halves_then_bicubic_then_centre(tmp_path):
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (96, 136, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(tmp_path / "a.png")
    half = noisy
    while min(half.shape[:2]) >= 32:
        tall, wide = half.shape[0] // 2, half.shape[1] // 2
        half = np.floor(half[: 2 * tall, : 2 * wide].reshape(tall, 2, wide, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8)
    assert half.shape == (24, 34, 3)
    small = np.asarray(Image.fromarray(half).resize((23, 16), Image.Resampling.BICUBIC))
    made = adm_rectangle(tmp_path / "a.png", 16, 16, 3)[0].permute(1, 2, 0).numpy()
    assert made.shape == (16, 16, 3)
    assert np.abs(made.astype(int) - small[:, 3:19]).max() <= 2  # grey levels: Pillow's rounding of a half
    small = np.asarray(Image.fromarray(half).resize((32, 23), Image.Resampling.BICUBIC))  # 32 of 34, 32/34 of 24
    made = adm_rectangle(tmp_path / "a.png", 16, 32, 3)[0].permute(1, 2, 0).numpy()
    assert made.shape == (16, 32, 3)
    assert np.abs(made.astype(int) - small[3:19]).max() <= 2
    made = adm_rectangle(tmp_path / "a.png", 16, 16, 3)[0].permute(1, 2, 0).numpy()
    other = load_rectangle(tmp_path / "a.png", 16, 16, 3)[0].permute(1, 2, 0).numpy()
    assert np.abs(made.astype(int) - other).mean() > 3


def test_crop_is_a_dataset_option(imagenet):
    centre, adm = ImageNet(imagenet, size=16), ImageNet(imagenet, size=16, crop="adm")
    assert adm.fingerprint != centre.fingerprint
    assert reds(adm)[3] == pytest.approx(51, abs=3)
    assert ImageNet(imagenet, size=[16, 16]).fingerprint == centre.fingerprint
    wide = ImageNet(imagenet, size=[16, 24])
    assert wide.batch([(0, 0), (0, 1)])["image"].shape[1:] == wide.shape == (3, 16, 24)
    with pytest.raises(UserError, match="crop=middle: expected centre or adm"):
        ImageNet(imagenet, size=16, crop="middle")


@pytest.mark.parametrize("crop", ["centre", "adm"])
def test_batch_records_size_of_file_and_corner(crop, tmp_path):
    """The sizes that conditioner=size_crop reads, also where a crop of the training follows."""
    (tmp_path / "a").mkdir()
    for name, size in (("0", (96, 48)), ("1", (33, 90)), ("2", (16, 16))):
        Image.new("RGB", size).save(tmp_path / "a" / f"{name}.png")
    files = [tmp_path / "a" / f"{i}.png" for i in range(3)]
    source = FileSource(files, (), [0] * 3, {"a": ["a"]}, tmp_path)
    data = LazyDataset("some", source, range(3), 16, 3, None, flip=False, crop=crop)
    samples = [(0, i) for i in range(3)]
    batch = data.batch(samples)
    assert batch["original_size"].tolist() == [[48, 96], [90, 33], [16, 16]]
    assert batch["crop"].tolist() == [[0, 8], [14, 0], [0, 0]]  # 16 x 32, 44 x 16 and 16 x 16 pixels once scaled
    assert batch["target_size"].tolist() == [[16, 16]] * 3
    assert not {"original_size", "crop", "target_size"} & data.batch_metadata(samples).keys()
    still = AugmentedDataset(data, training=False, crop=RandomCrop(8)).batch(samples)
    assert still["original_size"].tolist() == batch["original_size"].tolist()
    assert still["crop"].tolist() == [[4, 12], [18, 4], [4, 4]]
    assert still["target_size"].tolist() == [[8, 8]] * 3

import io
import pickle
import shutil
import sys
import tarfile

import pytest
import torch
from PIL import Image

from ldm.conditioner.size import SIZE_KEYS
from ldm.data import hugging_face
from ldm.data.folder import ImageFolder
from ldm.data.hugging_face import HuggingFace, Rows
from ldm.data.latents import LatentDataset
from ldm.data.memory import InMemoryDataset
from ldm.data.shards import TarShardDataset
from ldm.data.stream import BatchDataset, BatchStream
from ldm.errors import UserError

datasets = pytest.importorskip("datasets")  # of the extras `data` and `dev`
TEXT = datasets.Value("string")
PETS = datasets.ClassLabel(names=["cat", "sea_lion"])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(i, size=(20, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (i, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def table(rows, kind=None, images=None, **columns):
    """A table of `rows` images and (values, kind) columns."""
    cells = [{"bytes": png(i), "path": None} for i in range(rows)] if images is None else images
    features = {"image": kind or datasets.Image(), **{name: kind for name, (_, kind) in columns.items()}}
    values = {"image": cells, **{name: value for name, (value, _) in columns.items()}}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def saved(path, *args, **columns):
    table(*args, **columns).save_to_disk(str(path))
    return str(path)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The hub with one data set of 40 rows and a test split of three."""
    asked = []
    (tmp_path / "7.png").write_bytes(png(7))

    def rows(count):
        columns = {
            "text": (
                [[f"picture {i}", f"number  {i}"] if i % 2 else [f"picture {i}"] for i in range(count)],
                datasets.Sequence(TEXT),
            ),
            "label": ([i % 2 for i in range(count)], PETS),
            "number": ([i % 5 for i in range(count)], datasets.Value("int64")),
        }
        cells = [
            {"bytes": png(i), "path": None} if i != 7 else {"bytes": None, "path": str(tmp_path / "7.png")}
            for i in range(count)
        ]
        return table(count, images=cells, **columns)

    splits = datasets.DatasetDict({"train": rows(40), "test": rows(3)})

    def load_dataset(path, config):
        asked.append((path, config))
        if path != "some/thing":
            raise RuntimeError("not\nfound")
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hugging_face_rows_are_samples(library):
    data = HuggingFace("some/thing", size=16, test_fraction=0.0, config="small")
    assert library == [("some/thing", "small")]
    batch = data.batch([(0, 7), (2, 12)])
    assert ((batch["image"][:, 0].mean((1, 2)) + 1) * 127.5).round().tolist() == [7, 12]
    assert batch["caption"][1] == "picture 12"
    assert {data.caption(epoch, 7) for epoch in range(20)} == {"picture 7", "number 7"}
    assert data.classes == ["image"]
    assert torch.equal(data.batch([(2, 12)])["image"], batch["image"][1:])


def test_hugging_face_labels_and_class_names(library):
    data = HuggingFace("some/thing", size=16, test_fraction=0.0, caption=None, label="label")
    assert data.batch_metadata([(0, 3), (0, 4)])["label"].tolist() == [1, 0]
    assert data.classes == ["cat", "sea_lion"]
    assert "sea lion" in data.caption(0, 3)
    assert HuggingFace("some/thing", size=16, caption=None, label="number").classes == ["0", "1", "2", "3", "4"]


def test_hugging_face_splits(library):
    train, test = (HuggingFace("some/thing", split, size=16, test_fraction=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 40
    assert not set(train.rows.tolist()) & set(test.rows.tolist())
    assert len(HuggingFace("some/thing", size=16, test="test")) == 40
    assert len(HuggingFace("some/thing", "test", size=16, test="test")) == 3


def test_hugging_face_saved_to_disk(library, tmp_path):
    assert len(HuggingFace(saved(tmp_path / "x", 4, text=(["a"] * 4, TEXT)), size=16, test_fraction=0.0)) == 4
    assert not library


def test_hugging_face_reports_errors_in_one_line(library, monkeypatch):
    for options, said in (
        ({"path": "other"}, "path=other: not found"),
        ({"path": "some/thing", "train": "x"}, "no split 'x'; it has train, test"),
        ({"path": "some/thing", "caption": "words"}, "no column 'words'; it has image, text, label, number"),
    ):
        with pytest.raises(UserError, match=said) as error:
            HuggingFace(**options)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
        hugging_face.load("some/thing", None, "train")


def test_caption_sources_give_equal_batches(tmp_path):
    """60 images, six of them without a caption, from a folder, a table, a shard and memory."""
    captions = ["" if i % 10 == 7 else f"picture {i}" for i in range(60)]
    pictures = [png(4 * i, (24, 20)) for i in range(60)]
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            for ending, content in {"png": picture, **({"txt": caption.encode()} if caption else {})}.items():
                (tmp_path / "folder" / f"{i:04d}.{ending}").write_bytes(content)
                member = tarfile.TarInfo(f"{i:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    path = saved(tmp_path / "table", 60, images=cells, text=([caption or None for caption in captions], TEXT))
    folder = ImageFolder(tmp_path / "folder", size=16, channels=3, test_fraction=0.0)
    texts = [[caption] if caption else [] for caption in captions]
    sources = {
        "hf": HuggingFace(path, size=16, test_fraction=0.0),
        "webdataset": TarShardDataset(tmp_path / "shard.tar", size=16, test_fraction=0.0),
        "memory": InMemoryDataset("memory", folder.images, folder.labels, {"image": ["x"]}, flip=True, texts=texts),
    }
    stream = BatchStream(60, 24, steps=6)
    for name, data in sources.items():
        assert data.uncaptioned == folder.uncaptioned == 6, name
        for part in stream:
            one, other = BatchDataset(folder)[part], BatchDataset(data)[part]
            sizes = () if name == "memory" else SIZE_KEYS  # of files that are read lazily
            assert {*one, *sizes} == {*other}
            for key, value in one.items():
                same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
                assert same, (name, key, part.step)
    assert "6 without a caption" in sources["hf"].summary
    assert "6 without caption" in folder.summary


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, "", "a  cat"], TEXT),
        ([None, [None, " "], ["a cat"]], datasets.Sequence(TEXT)),
        ([None, {"id": 1, "raw": None}, {"id": 2, "raw": "a cat"}], {"id": datasets.Value("int64"), "raw": TEXT}),
        ([None, [], [{"raw": "a cat"}]], [{"raw": TEXT}]),
    ],
)
def test_hugging_face_accepts_all_caption_forms_and_counts_missing(tmp_path, values, kind):
    data = HuggingFace(saved(tmp_path / "x", 3, text=(values, kind)), size=16, test_fraction=0.0)
    assert [{data.caption(epoch, i) for epoch in range(9)} for i in range(3)] == [{""}, {""}, {"a cat"}]
    assert ", 2 without a caption" in data.summary
    assert data.captions == [["a cat"]]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], datasets.Value("int64")),
        ([0, 1], PETS),
        ([[["a"]], [["b"]]], [[TEXT]]),
        ([{"id": 1}] * 2, {"id": datasets.Value("int64")}),
    ],
)
def test_hugging_face_rejects_captions_that_are_not_strings(tmp_path, values, kind):
    with pytest.raises(
        UserError, match=r"column 'text' holds .*: expected texts, lists of texts, or records with one of"
    ) as error:
        HuggingFace(saved(tmp_path / "x", 2, text=(values, kind)), size=16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "kind", "labels", "classes"),
    [
        ([-1, None, 1, 0], PETS, [-1, -1, 1, 0], ["cat", "sea_lion"]),
        ([-1, -1, -1, -1], PETS, [-1, -1, -1, -1], ["cat", "sea_lion"]),
        ([None, 2, 0, -1], datasets.Value("int32"), [-1, 2, 0, -1], ["0", "1", "2"]),
        ([float("nan"), 1.0, 0.0, None], datasets.Value("float64"), [-1, 1, 0, -1], ["0", "1"]),
        ([None, "dog", "cat", ""], TEXT, [-1, 1, 0, -1], ["cat", "dog"]),
    ],
)
def test_hugging_face_missing_label_is_not_a_class(tmp_path, values, kind, labels, classes):
    data = HuggingFace(
        saved(tmp_path / "x", 4, label=(values, kind)), size=16, test_fraction=0.0, caption=None, label="label"
    )
    assert data.batch_metadata([(0, i) for i in range(4)])["label"].tolist() == labels
    assert data.classes == classes
    missing = labels.count(-1)
    assert [data.caption(0, i) == "" for i in range(4)] == [label < 0 for label in labels]
    assert f"{missing} without a caption (the empty one stands for it), {missing} without a label" in data.summary


@pytest.mark.parametrize(
    ("values", "kind", "why"),
    [
        ([0, -2], datasets.Value("int64"), "holds -2: expected class numbers from 0 to 0, and -1 or null for none"),
        ([0, 1 << 40], datasets.Value("int64"), "holds 1099511627776: expected class numbers"),
        ([0.5, 1.0], datasets.Value("float64"), "holds 0.5: expected class numbers"),
        ([None, None], TEXT, "no label in any row"),
        ([[0], [1]], datasets.Sequence(PETS), "expected one class a row, a number or a word"),
    ],
)
def test_hugging_face_rejects_invalid_labels(tmp_path, values, kind, why):
    with pytest.raises(UserError, match=why) as error:
        HuggingFace(saved(tmp_path / "x", 2, label=(values, kind)), size=16, caption=None, label="label")
    assert "\n" not in str(error.value)


def test_hugging_face_string_labels_are_equal_over_splits(monkeypatch):
    splits = {"train": ["dog", "cat", "ape"], "test": ["dog", "dog"], "other": ["dog", "bee"]}
    tables = datasets.DatasetDict({name: table(len(words), label=(words, TEXT)) for name, words in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: tables)
    test = HuggingFace("some/thing", "test", size=16, caption=None, label="label", test="test")
    assert test.classes == ["ape", "cat", "dog"]
    assert test.batch_metadata([(0, 0), (0, 1)])["label"].tolist() == [2, 2]
    with pytest.raises(UserError, match="'bee', which is no class of the training split"):
        HuggingFace("some/thing", "test", size=16, caption=None, label="label", test="other")


def test_hugging_face_accepts_all_image_forms(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(50 * i))
    binary = datasets.Value("binary")
    kinds = {
        "bytes": (binary, [png(50 * i) for i in range(4)]),
        "paths": (TEXT, [str(tmp_path / f"{i}.png") for i in range(4)]),
        "relative": (TEXT, [f"../{i}.png" for i in range(4)]),
        "struct": ({"bytes": binary, "path": TEXT}, [{"bytes": png(50 * i), "path": None} for i in range(4)]),
    }
    for name, (kind, cells) in kinds.items():
        data = HuggingFace(saved(tmp_path / name, 4, kind, cells), size=16, test_fraction=0.0, caption=None)
        assert ((data.pixels(range(4))[:, 0].mean((1, 2)) + 1) * 127.5).round().tolist() == [0, 50, 100, 150], name
    for kind, cells in (
        ([datasets.Image()], [[{"bytes": png(i), "path": None}] for i in range(4)]),
        (datasets.Value("int64"), [1] * 4),
    ):
        with pytest.raises(
            UserError, match=r"column 'image' holds .*: expected one image a row, its bytes or its path"
        ) as error:
            HuggingFace(saved(tmp_path / type(kind).__name__, 4, kind, cells), size=16, caption=None)
        assert "\n" not in str(error.value)


def test_hugging_face_content_hash_depends_on_rows_not_folder(tmp_path, monkeypatch):
    def made(name, texts, first=0, labels=(0, 1)):
        cells = [{"bytes": png(i), "path": None} for i in (first, 1)]
        return saved(tmp_path / name, 2, images=cells, text=(texts, TEXT), label=(list(labels), PETS))

    def read(path, content=None):
        return HuggingFace(path, size=16, test_fraction=0.0, label="label", content_hash=content)

    path = made("here", ["a", "b"])
    before = read(path)
    shutil.move(path, tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    for other in ("there", "../" + tmp_path.name + "/there", made("again", ["a", "b"])):
        after = read(other, before.content)
        assert (after.content, after.fingerprint) == (before.content, before.fingerprint)
    for name, changed in (("text", {"texts": ["a", "c"]}), ("image", {"first": 9}), ("label", {"labels": (1, 1)})):
        with pytest.raises(UserError, match="not those of this run"):
            read(made(name, **{"texts": ["a", "b"], **changed}), before.content)


@pytest.mark.parametrize("kind", ["image", "record", "bytes", "paths", "large_paths"])
def test_hugging_face_digest_reads_sizes_names_and_some_tails(tmp_path, monkeypatch, kind):
    """Of five rows read in pairs: all sizes, in order, and the tails of the first and the fourth; also of no rows."""
    for name, value in {"ROWS": 2, "SHOWN": 2, "TAIL": 10}.items():
        monkeypatch.setattr(hugging_face, name, value)
    content = [bytes(range(i, 2 * i + 10)) for i in range(5)]
    for i, data in enumerate(content):
        (tmp_path / f"{i}.png").write_bytes(data)
    binary = datasets.Value("binary")
    sizes = [str(len(data)).encode() for data in content]
    named = [repr((f"{i}.png", len(data))).encode() for i, data in enumerate(content)]
    tails = [content[0][-10:], content[3][-10:]]
    feature, images, expected = {
        "image": (
            datasets.Image(),
            [
                None if i == 4 else {"bytes": data if i < 2 else None, "path": f"{i}.png"}
                for i, data in enumerate(content)
            ],
            [*sizes[:2], *named[2:4], b"None", *tails],
        ),
        "record": ({"bytes": binary}, [{"bytes": data} for data in content], [*sizes, *tails]),
        "bytes": (binary, [*content[:3], None, content[4]], [*sizes[:3], b"None", sizes[4], tails[0], b"-"]),
        "paths": (TEXT, [f"{i}.png" for i in range(5)], [*named, *tails]),
        "large_paths": (datasets.Value("large_string"), [f"{i}.png" for i in range(5)], [*named, *tails]),
    }[kind]
    rows = Rows(table(5, feature, images), "x", "image", None, None, folder=tmp_path)
    assert list(rows._images_digested()) == expected
    assert list(Rows(table(0, feature, []), "x", "image", None, None)._images_digested()) == []


def test_hugging_face_reads_columns_in_parts(monkeypatch):
    monkeypatch.setattr(hugging_face, "ROWS", 2)
    monkeypatch.setattr(hugging_face, "SHOWN", 2)
    texts = list("abcde")
    rows = Rows(table(5, text=(texts, TEXT)), "x", "image", "text", None)
    assert list(hugging_face.cells(rows.table, "text")) == [rows.texts(i)[0] for i in range(5)] == texts
    assert rows.classes == {"image": ["a", "d"]}
    again = pickle.loads(pickle.dumps(rows))
    assert {*vars(rows)} - {*vars(again)} == {"_captions"}, "which is mapped again where it is read"
    assert again.texts(3) == ["d"]


def test_hugging_face_image_folder_hash_is_independent_of_location(tmp_path):
    for i in range(8):
        (tmp_path / "here" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / ("cat", "dog")[i % 2] / f"{i}.png").write_bytes(png(i))
    options = {"size": 16, "test_fraction": 0.0, "caption": None, "label": "label"}
    before = HuggingFace(str(tmp_path / "here"), **options)
    assert before.classes == ["cat", "dog"]
    images = before.pixels(range(8))
    (tmp_path / "here").rename(tmp_path / "there")
    assert torch.equal(
        HuggingFace(str(tmp_path / "there"), **options, content_hash=before.content).pixels(range(8)), images
    )
    (tmp_path / "there" / "cat" / "0.png").write_bytes(png(200, (30, 30)))
    with pytest.raises(UserError, match="not those of this run"):
        HuggingFace(str(tmp_path / "there"), **options, content_hash=before.content)


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_hugging_face_rejects_class_named_like_split(tmp_path, name):
    for folder in ("bus", "car", name):
        (tmp_path / "vehicles" / folder).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "vehicles" / folder / f"{i}.png").write_bytes(png(i))
    split = {"val": "validation"}.get(name, name)
    with pytest.raises(UserError, match=rf"4 of its 6 images are in no split \({split} of 2\)") as error:
        HuggingFace(str(tmp_path / "vehicles"), size=16, train=split, caption=None, label="label")
    assert "\n" not in str(error.value)


def test_hugging_face_counts_images_of_image_folders_alone(tmp_path, monkeypatch):
    """Files that are not its images do not count, nor those beside a list, and of other formats none is asked for."""
    for name in ("a.png", "in/b.AVIF", "in/.c.png", "d.txt", ".e/f.png", "__MACOSX/g.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    hugging_face.check_splits(tmp_path, {"train": 2})
    with pytest.raises(UserError, match=r"1 of its 2 images are in no split \(train of 1\)"):
        hugging_face.check_splits(tmp_path, {"train": 1})
    tables = datasets.DatasetDict({"train": table(1)})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: tables)
    assert hugging_face.load(str(tmp_path), None, "train") is tables["train"]
    tables["train"].info.builder_name = "imagefolder"
    with pytest.raises(UserError, match="in no split"):
        hugging_face.load(str(tmp_path), None, "train")
    (tmp_path / "metadata.csv").touch()
    hugging_face.check_splits(tmp_path, {"train": 1})


class CaptionsAlone:
    """A table that gives no other column than that of captions."""

    def __init__(self, table):
        self.given = table

    def select_columns(self, names):
        assert names == ["text"]
        return self.given.select_columns(names)


def test_hugging_face_metadata_reads_no_image(tmp_path, monkeypatch):
    columns = {"text": (["a", None, "c", "d"], TEXT), "label": ([0, 1, -1, 0], PETS)}
    data = HuggingFace(saved(tmp_path / "x", 4, **columns), size=16, test_fraction=0.0, label="label")
    latents = LatentDataset(data, torch.zeros(2, 4, 8, 2, 2, dtype=torch.float16))
    assert data.source.images.column_names == ["image"]
    monkeypatch.delattr(data.source, "images")
    monkeypatch.setattr(data.source, "table", CaptionsAlone(data.source.table))
    batch = latents.batch([(1, i) for i in range(4)])
    assert batch["caption"] == ["a", "", "c", "d"]
    assert batch["label"].tolist() == [0, 1, -1, 0]
    with pytest.raises(AttributeError):
        data.source.image(0)

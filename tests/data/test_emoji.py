import io
import json
import tarfile

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.data import decode, glyphs
from ldm.data.emoji import Emoji, captions, words
from ldm.data.glyphs import GROUPS, Glyph, annotated, code
from ldm.data.stream import BatchStream
from ldm.io.download import AssetNotFoundError

TONES = {"1F3FB": "light", "1F3FF": "dark"}


def row(hexcode, annotation, tags="", group="objects", base="", tone=""):
    return {
        "hexcode": hexcode,
        "emoji": "".join(chr(int(point, 16)) for point in hexcode.split("-")),
        "annotation": annotation,
        "tags": tags,
        "group": group,
        "skintone": tone,
        "skintone_base_hexcode": base,
    }


ROWS = [row(f"1F4{i:02X}", f"thing {i}", f"tag {i}, thing, use", GROUPS[i % 9]) for i in range(60)]
ROWS += [row("1F44B", "waving hand", "bye, hand", "people-body", "1F44B")]
ROWS += [row(f"1F44B-{c}", f"waving hand: {t} skin tone", "", "people-body", "1F44B", 1) for c, t in TONES.items()]
ROWS += [row("2764-FE0F", "red heart"), row("1F1E6", "an addition", group="extras-openmoji"), row("1F600", "not drawn")]


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def webp(colour):
    buffer = io.BytesIO()
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste(colour, (8, 8, 24, 24))
    picture.save(buffer, "webp", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Archives as they are published, in small, and another artist in the place of the font; the codes that the artist
    has drawn.
    """
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    pictures = {
        f"package/assets/{one['hexcode'].lower()}.webp": webp((i, 255, 0, 255)) for i, one in enumerate(ROWS[:-1])
    }
    openmoji = archive(
        tmp_path / "o.tgz", {"package/data/openmoji.json": json.dumps(ROWS).encode(), "package/x.json": b"?"}
    )
    fluent = archive(tmp_path / "f.tgz", pictures)
    monkeypatch.setattr(glyphs, "openmoji", lambda: openmoji)
    monkeypatch.setattr(glyphs, "fluent_archive", lambda: fluent)
    asked = []

    def artist(glyph):
        asked.append(glyph.code)
        return None if glyph.code == "2764" else Image.new("RGBA", (20, 20), (0, 0, 255, 128))

    monkeypatch.setitem(glyphs.ARTISTS, "flat", lambda: artist)
    return asked


def test_emoji_contains_every_glyph_and_style(drawn):
    train, test = Emoji(size=16, test_fraction=0.3), Emoji("test", size=16, test_fraction=0.3)
    assert len(train) + len(test) == 2 * 61, (
        "the heart has no drawing, the face no render, the addition is none of ours"
    )
    assert train.images.shape[1:] == (3, 16, 16)
    batch = train.batch([(0, 0), (0, 1), (5, 3)])
    assert batch["style"].tolist() == [0, 1, 1]
    assert torch.equal(train.images[1, :, 8, 8], torch.tensor([127, 127, 255], dtype=torch.uint8)), (
        "half transparent, on white"
    )
    assert train.images[0, :, 0, 0].tolist() == [255, 255, 255]
    assert train.images[0, 1:, 8, 8].tolist() == [255, 0]
    assert train.labels[::2].tolist() == train.labels[1::2].tolist() == [GROUPS.index(g.group) for g in train.glyphs]
    assert train.classes == list(GROUPS)
    assert train.fingerprint != test.fingerprint


def test_emoji_split_is_by_glyph(drawn):
    train, test = (Emoji(split, size=16, test_fraction=0.3, skin_tones=True) for split in ("train", "test"))
    bases = [{glyph.base for glyph in data.glyphs} for data in (train, test)]
    assert not bases[0] & bases[1]
    assert 8 <= len(bases[1]) <= 28
    hands = next(data for data, some in zip((train, test), bases, strict=True) if "1F44B" in some)
    assert [glyph.code for glyph in hands.glyphs if glyph.base == "1F44B"] == ["1F44B", "1F44B-1F3FB", "1F44B-1F3FF"]
    plain = [Emoji(split, size=16, test_fraction=0.3) for split in ("train", "test")]
    assert [{g.base for g in data.glyphs} for data in plain] == bases


def test_emoji_captions_name_glyph_and_style(drawn):
    data = Emoji(size=16, test_fraction=0.01)
    for i in range(0, len(data), 7):
        said = {data.caption(epoch, i) for epoch in range(60)}
        assert said == set(data.texts[i])
        style = data.batch_metadata([(0, i)])["style"].item()
        assert all(("3d" in text) == (style == 0) and ("flat" in text) == (style == 1) for text in said)
        assert all(data.glyphs[i // 2].annotation in text for text in said)
        assert data.texts[i][0] in data.captions[data.labels[i]]
    assert data.caption(3, 4) == Emoji(size=16, test_fraction=0.01).caption(3, 4)
    glyph = Glyph("1", "1", "x", "flag: Chad", ["chad", "green", "nation", "the sun", "of CHAD", "sand"], "flags")
    assert captions(glyph, "flat") == [
        "a flat illustration of the flag of Chad",
        "the flag of Chad, flat illustration",
        "a flat drawing: the flag of Chad",
        "a flat illustration of the flag of Chad, green, nation, the sun",
        "a flat illustration of the flag of Chad, sand",
    ]
    assert words("kiss: man, man") == "kiss, man, man"


def test_emoji_skin_tones_inherit_tags():
    plain, toned = (annotated(json.dumps(ROWS).encode(), tones) for tones in (False, True))
    assert len(toned) - len(plain) == 2
    assert {glyph.base: glyph.tags for glyph in toned if glyph.base == "1F44B"} == {"1F44B": ["bye", "hand"]}
    assert all(glyph.tags == ["bye", "hand"] for glyph in toned if glyph.base == "1F44B")


def test_emoji_codes_are_normalized():
    assert code("0023-fe0f-20e3") == code("23-20E3") == "23-20E3"
    assert code("1f3f4-e0067_e0062") == "1F3F4-E0067-E0062"


def test_emoji_renders_once(drawn):
    first = Emoji(size=16)
    count = len(drawn)
    assert torch.equal(Emoji(size=16).images, first.images)
    assert Emoji("test", size=16, test_fraction=0.5, seed=3)
    assert len(drawn) == count > 0
    Emoji(size=20)
    assert len(drawn) == 2 * count


def test_emoji_single_style(drawn):
    data = Emoji(size=16, styles=["3d"], test_fraction=0.01)
    assert not drawn
    assert set(data.batch_metadata([(0, i) for i in range(len(data))])["style"].tolist()) == {0}
    assert len(data) == len(data.glyphs)
    assert BatchStream(len(data), 4, 2).batch_at(0).samples


def test_noto_draws_what_is_as_wide_as_one_emoji(monkeypatch):
    """With Pillow's own font in the place of Noto's, and other widths."""
    font, plain = ImageFont.load_default(109), ImageFont.load_default(109)
    font.getlength = {"A": 136, "B": 124, "C": 148, "D": 123, "E": 149, " ": 136}.__getitem__
    monkeypatch.setattr(glyphs, "noto_font", lambda: "noto.ttf")
    monkeypatch.setattr(ImageFont, "truetype", lambda path, size: {("noto.ttf", 109): font}[path, size])
    draw = glyphs.noto()
    made = {text: draw(Glyph("1", "1", text, "x", [], "flags")) for text in "ABCDE "}
    assert {text for text, image in made.items() if image is not None} == {"A", "B", "C"}, "one glyph, not blank"
    for text in "ABC":
        expected = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
        ImageDraw.Draw(expected).text((0, 4), text, font=plain, embedded_color=True)
        assert made[text].tobytes() == expected.tobytes()


def test_pencil_draws_edges_alone(monkeypatch):
    """A step of 60 grey levels, blurred with a deviation of 1, falls by 0.866 of them within three pixels."""
    flat = Image.new("RGBA", (32, 8), (255, 255, 255, 255))
    flat.paste((195, 195, 195, 255), (16, 0, 32, 8))
    monkeypatch.setattr(glyphs, "noto", lambda: {"A": flat, "B": None}.__getitem__)
    draw = glyphs.pencil()
    lines = decode.to_tensor(draw("A").convert("L"), 1)[0, 4].int()
    assert lines[:10].tolist() == lines[-10:].tolist() == [255] * 10
    assert lines.min().item() == pytest.approx(255 - 3 * 0.866 * 60, abs=12)
    assert draw("B") is None


def test_glyph_archives_are_files_of_what_is_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        glyphs, "fetch", lambda name, files, *args, **options: (asked.append((name, files)), tmp_path)[1]
    )
    made = [asset() for asset in (glyphs.openmoji, glyphs.fluent_archive, glyphs.noto_font)]
    assert asked == [
        ("openmoji", glyphs.OPENMOJI),
        ("fluent-emoji-3d", glyphs.FLUENT),
        ("noto-color-emoji", glyphs.NOTO),
    ]
    assert made == [tmp_path / name for _, files in asked for name in files]


@pytest.mark.parametrize(
    "option", [{"split": "val"}, {"styles": ["oil"]}, {"styles": []}, {"size": 8}, {"test_fraction": 0.0}]
)
def test_emoji_rejects_invalid_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Emoji(**option)


def test_emoji_reports_missing_images(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    for asset in (glyphs.openmoji, glyphs.fluent_archive):
        with pytest.raises(AssetNotFoundError, match=r"is missing.*put .*\.tgz into"):
            asset()
    with pytest.raises(AssetNotFoundError, match="openmoji is missing"):
        Emoji()


@pytest.mark.slow
def test_emoji_real_data():
    train, test, toned = Emoji(), Emoji("test"), Emoji(skin_tones=True)
    assert (len(train) + len(test)) // 2 == 1852
    assert len(toned) + len(Emoji("test", skin_tones=True)) == 2 * 3372
    assert 100 <= len(test.glyphs) <= 250
    apple = next(i for i, glyph in enumerate(train.glyphs) if glyph.annotation == "red apple")
    assert train.texts[2 * apple][0] == "a 3d render of red apple"
    for image in train.images[2 * apple : 2 * apple + 2].float():
        red, green, blue = image[:, 20:44, 20:44].mean((1, 2))
        assert red > 150 > max(green, blue)
        assert image[:, 0, 0].min() > 250
    drawn = train.images.float().flatten(1)
    assert drawn.std(1).min() > 5, "none is blank"
    assert (drawn[0::2] - drawn[1::2]).abs().mean(1).min() > 1, "a render and a drawing are two pictures"

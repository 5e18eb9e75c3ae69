"""The files that a user gives to sample.py, read directly: values, sizes, order, and mistakes in one line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.data import decode
from ldm.errors import UserError
from ldm.sampling.inputs import (
    InputFiles,
    InputSpec,
    boxes_input,
    image_input,
    keypoints_input,
    label_map,
    list_files,
    mask_input,
    open_image,
)

SPEC = InputSpec((4, 6), 3, ("cat", "dog"))  # height 4, width 6


def save(path: Path, mode: str, size: tuple[int, int], colour) -> str:
    Image.new(mode, size, colour).save(path)
    return str(path)


def test_rows_take_the_files_in_turn_and_their_digest_tells_names_and_contents_apart(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text(file.name)
    source = InputFiles(files, Path.read_text, "".join)
    assert source([0, 4, 2]) == "abc"
    digests = {source.digest}
    files[0].write_text("other")
    digests.add(source.digest)
    renamed = files[0].rename(tmp_path / "d")
    digests.add(InputFiles([renamed, *files[1:]], Path.read_text, "".join).digest)
    assert len(digests) == 3


def test_images_are_scaled_cropped_and_put_on_white(tmp_path):
    colour = (255, 0, 51)
    path = save(tmp_path / "wide.png", "RGB", (24, 8), colour)  # covers 6 x 4 twice over; the sides are cut
    expected = torch.tensor(colour)[:, None, None] / 127.5 - 1
    assert torch.equal(image_input(SPEC, path)([0, 0]), expected.expand(2, 3, 4, 6))
    assert torch.equal(image_input(SPEC, path, keep_size=True)([0]), expected.expand(1, 3, 8, 24))
    clear = save(tmp_path / "clear.png", "RGBA", (6, 4), (0, 0, 0, 0))
    assert torch.equal(image_input(SPEC, clear)([0]), torch.ones(1, 3, 4, 6))
    four = image_input(InputSpec((4, 6), 4), clear)([0])
    assert torch.equal(four, -torch.ones(1, 4, 4, 6))  # RGBA keeps its transparency


def test_masks_are_white_above_half_and_of_their_images_size(tmp_path):
    for name in ("masks", "images"):
        (tmp_path / name).mkdir()
    mask = Image.new("L", (6, 4), 127)
    mask.putpixel((2, 1), 128)
    for stem, size in (("a", (6, 4)), ("b", (12, 8))):
        mask.resize(size, Image.Resampling.NEAREST).save(tmp_path / "masks" / f"{stem}.png")
        save(tmp_path / "images" / f"{stem}.png", "L", size, 0)
    masks, images = str(tmp_path / "masks"), str(tmp_path / "images")
    white = torch.zeros(1, 4, 6)
    white[0, 1, 2] = 1
    small = mask_input(SPEC, f"{masks}/a.png", None)([0])
    assert torch.equal(small, white[None])
    assert torch.equal(mask_input(SPEC, masks, images)([0]), small)  # each belongs to the image of its own name
    assert mask_input(SPEC, masks, images)([1]).shape == (1, 1, 4, 6)
    with pytest.raises(UserError, match=r"b\.png is 12x8 \(width x height\), image=.*a\.png is 6x4: expected one size"):
        mask_input(SPEC, f"{masks}/b.png", f"{images}/a.png")  # a single image is every mask's
    black = save(tmp_path / "black.png", "L", (6, 4), 127)
    with pytest.raises(UserError, match="has no white in it"):
        mask_input(SPEC, black, None)


def test_class_numbers_are_not_mixed(tmp_path):
    picture = Image.new("L", (12, 8))
    picture.paste(9, (6, 0, 12, 8))
    picture.save(tmp_path / "map.png")
    expected = torch.tensor([0, 0, 0, 9, 9, 9]).expand(1, 4, 6)
    assert torch.equal(label_map(SPEC, str(tmp_path / "map.png"))([0]), expected)
    picture.paste(250, (5, 0, 12, 8))  # through the middle of a pixel
    picture.save(tmp_path / "map.png")
    assert set(label_map(SPEC, str(tmp_path / "map.png"))([0]).unique().tolist()) == {0, 250}
    assert len(image_input(SPEC, str(tmp_path / "map.png"))([0]).unique()) > 2  # images are
    colour = save(tmp_path / "colour.png", "RGB", (6, 4), 0)
    with pytest.raises(UserError, match="is of mode RGB"):
        label_map(SPEC, colour)


def test_boxes_and_keypoints_are_read_from_json(tmp_path):
    boxes, points = tmp_path / "boxes.json", tmp_path / "points.json"
    boxes.write_text(json.dumps([["dog", 0, 0.25, 1, 0.5], [7, 0, 0, 1, 1]]))
    assert boxes_input(SPEC, str(boxes))([0]) == [[(1.0, 0.0, 0.25, 1.0, 0.5), (7.0, 0.0, 0.0, 1.0, 1.0)]]
    points.write_text(json.dumps([[0.25, 1], None]))
    assert keypoints_input(str(points))([0]) == [[(0.25, 1.0), None]]
    for read, file in ((lambda path: boxes_input(SPEC, path), boxes), (keypoints_input, points)):
        file.write_text('[["bird"]]')
        with pytest.raises(UserError, match=f"={file}: expected"):
            read(str(file))


def test_input_files_are_those_of_a_folder_in_order(tmp_path):
    folder, empty = tmp_path / "some", tmp_path / "empty"
    folder.mkdir(), empty.mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (folder / name).touch()
    assert list_files("image", str(folder)) == [folder / "a.jpg", folder / "b.PNG"]
    assert list_files("image", str(folder / "notes.txt")) == [folder / "notes.txt"]
    for path, said in (
        (None, "image=FILE must be given"),
        (str(empty), "a folder without files of the kinds"),
        (str(folder / "c"), "no such file or folder"),
    ):
        with pytest.raises(UserError, match=said):
            list_files("image", path)


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("too \n many"), "too many"), (ValueError(), "ValueError()")], ids=["text", "none"]
)
def test_an_image_that_cannot_be_read_is_named_with_the_reason(error, said, monkeypatch):
    def fail(file):
        raise error

    monkeypatch.setattr(decode, "open_image", fail)
    with pytest.raises(UserError) as raised:
        open_image("image", Path("a.png"))
    assert str(raised.value) == f"image=a.png cannot be read as an image: {said}"

import pytest
import torch
from PIL import Image

from ldm.io.images import make_grid, save_png


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_png_preserves_pixels_and_text(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    words = {"prompt": "it's a=b, [x] 100% ü 🎨\nsecond line", "seed": "7"}
    save_png(tmp_path / "new" / "one.png", image, words)
    with Image.open(tmp_path / "new" / "one.png") as opened:
        assert opened.text == words
        assert opened.size == (7, 5)
        pixels = torch.tensor(list(opened.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels, image.permute(1, 2, 0).flatten())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.png"]


def test_make_grid_is_row_major_with_white_gaps():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3).contiguous()
    sheet = make_grid(images, columns=2, gap=1)
    assert sheet.shape == (1, 3 * 3 + 1, 2 * 4 + 1)
    assert [int(sheet[0, 1 + 3 * row, 1 + 4 * column]) for row in range(3) for column in range(2)] == [
        0,
        1,
        2,
        3,
        4,
        255,
    ]
    assert (sheet[0, 0] == 255).all()
    assert (sheet[0, :, 4] == 255).all()


def test_make_grid_zoom_repeats_pixels():
    image = torch.tensor([[[[1, 2]]]], dtype=torch.uint8)
    assert make_grid(image, columns=1, gap=0, zoom=2)[0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]

"""What many tests do: read and write images, randomise weights, run sample.py, and check that an error is one line."""

import shutil
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from smoke import command
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def read_image(path: str | Path, mode: str | None = None) -> Tensor:
    """Return an image file's values 0 to 255: (H, W) if grey, else (H, W, C). mode: Pillow's, to convert to first."""
    with Image.open(path) as image:
        image = image.convert(mode) if mode else image.copy()
    return torch.tensor(list(image.tobytes())).reshape(image.height, image.width, -1).squeeze(-1)


def read_pngs(folder: Path) -> Tensor:
    """Return the images that sample.py wrote into a folder, in the order of their seeds: (N, H, W) if grey."""
    return torch.stack([read_image(path) for path in sorted(folder.glob("[0-9]*.png"))])


def write_image(path: str | Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Write a grey image of random values 40 to 215. size: (width, height)."""
    values = torch.randint(40, 216, (size[0] * size[1],), generator=torch.Generator().manual_seed(seed))
    Image.frombytes("L", size, bytes(values.tolist())).save(path)
    return Path(path)


def randomize_weights(module: Module, seed: int = 0, std: float | None = None) -> Module:
    """Draw every parameter at random, those that are zero at init too, and put the module into eval mode.

    std: of all parameters; without it 1 / sqrt(fan-in) for matrices and kernels, 0.3 for vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = std if std is not None else 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return module.eval()


def run_sample(*overrides: str, output_dir: str | Path = "drawn") -> Path:
    """Run sample.py into an empty folder, which is returned as a path below the working directory."""
    folder = Path.cwd() / output_dir
    shutil.rmtree(folder, ignore_errors=True)
    assert command("sample.py", f"output_dir={folder}", *overrides) == 0
    return folder


def assert_one_line_error(capfd, expected: str, script: str, *overrides: str) -> str:
    """Check that a command ends with exit code 2 and one line on stderr that contains `expected`; return it."""
    capfd.readouterr()
    assert command(script, *overrides) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: "), error
    assert expected in error, error
    assert "\n" not in error
    return error

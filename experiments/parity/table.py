"""Write the parity table of experiments/README.md: python experiments/parity/table.py

Counts each network on the meta device, gives the original code and ours the same weights and lets both answer
(tests/interop and
tests/net hold the originals, or what was recorded of them), estimates what an evaluation would cost, and writes
parity.csv and the table.
"""

import csv
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.config.build import to_container
from ldm.io import atomic
from ldm.plan.config import composed
from ldm.plan.cost import estimate
from ldm.plan.data_info import card_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "interop"), str(ROOT / "tests" / "net")]
RATE = 1e14  # FLOP/s that a GPU is taken to reach: a third of an A100's peak in bf16
SAMPLES = 50_000
COLUMNS = ("model", "parameters", "published", "difference", "original", "published_fid", "ours", "command")
Differences = dict[str, float]  # precision -> largest difference over largest value


def compvis_unet() -> Differences:
    from test_tables import unet_differences

    return unet_differences("unet", "sd")


def compvis_first_stage() -> Differences:
    from test_tables import stage_differences

    return stage_differences("paper_autoencoder", "kl_f8", 32)


@torch.no_grad()
def dit(halved: bool) -> Differences:
    """halved: SiT, whose time runs the other way and whose second half of the output is thrown away."""
    from seeded import numbers
    from test_dit_names import Y, labels_of, ours_of, theirs_of

    from ldm.interop.dit import import_dit, import_sit
    from ldm.net.blocks import reversed_timestep_embedding

    found = {}
    for precision in ("float32", "float64"):
        dtype = getattr(torch, precision)
        net = theirs_of(halved=halved).to(dtype)
        ours = ours_of(3, time_embedding=reversed_timestep_embedding).to(dtype) if halved else ours_of(6).to(dtype)
        ours.load_state_dict((import_sit if halved else import_dit)(net.state_dict()))
        told = labels_of(net.state_dict()).to(dtype)({"label": Y})
        x, t = numbers("x", (2, 3, 8, 8)).to(dtype), torch.tensor([0.25, 0.9], dtype=dtype)
        theirs = -net(x, 1 - t, Y) if halved else net(x, 1000 * t, Y)  # SiT's velocity points to the data
        found[precision] = relative(ours(x, 1000 * t, told), theirs)
    return found


@torch.no_grad()
def ddpm() -> Differences:
    """diffusers' UNet2DModel as it runs google/ddpm-cifar10-32, narrow."""
    from diffusers import UNet2DModel
    from hydra.utils import instantiate
    from seeded import fill, numbers
    from test_counts import config

    from ldm.condition import Condition
    from ldm.interop.diffusers import import_unet

    kinds = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    options = {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }
    theirs = fill(
        UNet2DModel(block_out_channels=(32, 64, 64, 64), down_block_types=kinds, up_block_types=ups, **options)
    ).eval()
    ours = instantiate(
        config("ddpm_cifar", "channels=32"), in_channels=3, out_channels=3, context_dim=None, vector_dim=None
    ).eval()
    ours.load_state_dict(import_unet(theirs.state_dict()))
    found = {}
    for precision in ("float32", "float64"):
        dtype = getattr(torch, precision)
        x, t = numbers("x", (2, 3, 16, 16)).to(dtype), torch.tensor([3.0, 700.0], dtype=dtype)
        found[precision] = relative(ours.to(dtype)(x, t, Condition()), theirs.to(dtype)(x, t).sample)
    return found


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@dataclass(frozen=True)
class Row:
    """original: what ours was compared with, and at which width.  fid: as printed, with its table.  steps, calls: of an
    evaluation, and
    evaluations of the network at each.  needs: what is missing to run it.
    """

    model: str
    preset: str
    parts: tuple[str, ...]
    differences: Callable[[], Differences]
    original: str
    fid: str
    command: str
    steps: int = 0
    calls: int = 1
    needs: str = "weights"
    published: int | None = None


ROWS = (
    Row(
        *(
            "SD 1 VAE (KL-f8)",
            "sd1",
            ("first stage",),
            compvis_first_stage,
            "CompVis, full width",
            "rFID 0.90 (LDM tab. 8)",
        ),
        "python train.py autoencoder=kl_f8 training=autoencoder_ldm data=folder data.path=OPENIMAGES data.size=256",
        needs="OpenImages",
        published=83_653_863,
    ),
    Row(
        *("SD 1 U-Net", "sd1", ("network",), compvis_unet, "CompVis, width 32", "none published"),
        *(
            "python sample.py run=sd-v1-4.ckpt prompts=CAPTIONS.csv num=1 steps=50 guidance.scale=7.5 metrics=fid save=none",
            50,
            2,
        ),
    ),
    Row(
        *("LDM-4 cin256", "ldm4_cin256", ("network",), compvis_unet, "CompVis, width 32", "10.56 (LDM tab. 3)"),
        *("python sample.py run=cin256-v2.ckpt num=50000 steps=250 guidance.scale=1 metrics=fid save=none", 250),
    ),
    Row(
        *(
            "DiT-XL/2",
            "dit_xl2",
            ("network", "conditioner"),
            lambda: dit(False),
            "written out with timm, width 32",
            "9.62 (DiT tab. 4)",
        ),
        *("python train.py preset=dit_xl2 data.path=IMAGENET", 250, 1, "training"),
    ),
    Row(
        *(
            "SiT-XL/2",
            "sit_xl2",
            ("network", "conditioner"),
            lambda: dit(True),
            "written out with timm, width 32",
            "8.3 (SiT tab. 9)",
        ),
        *("python train.py preset=sit_xl2 data.path=IMAGENET", 250, 1, "training"),
    ),
    Row(
        *("DDPM CIFAR-10", "ddpm_cifar10", ("network",), ddpm, "diffusers, width 32", "3.17 (DDPM tab. 1)"),
        *("python train.py preset=ddpm_cifar10", 1000, 1, "training"),
    ),
)


def row_of(row: Row) -> dict[str, str]:
    cfg, said = composed([f"preset={row.preset}"])
    published = to_container(cfg.paper)
    found = estimate(cfg, card_of(cfg, said or published))
    count = sum(found.parts[name]["parameters"] for name in row.parts) + (
        published["extra_parameters"] if row.published is None else 0
    )
    expected = row.published or published["parameters"]
    differences = row.differences()
    evaluation = SAMPLES * (
        row.steps * row.calls * found.flops["network, an image"] + found.flops["first stage decodes an image"]
    )
    training = found.images * found.flops["training, an image"] if row.needs == "training" else 0
    hours = (evaluation + training) / RATE / 3600
    return {
        "model": row.model,
        "parameters": str(count),
        "published": "the same" if count == expected else f"{expected}",
        "difference": ", ".join(f"{value:.1e} in {name}" for name, value in differences.items()),
        "original": row.original,
        "published_fid": row.fid,
        "ours": f"not run: needs {row.needs} + 1 GPU, {hours:,.0f} h"
        if hours >= 1
        else f"not run: needs {row.needs} + 1 GPU",
        "command": row.command,
    }


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [
        "| model | parameters = the paper's? | largest difference from the original | FID published | ours | command |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        same = f"{int(row['parameters']):,}, {row['published']}"
        cells = [
            row["model"],
            same,
            f"{row['difference']} ({row['original']})",
            row["published_fid"],
            row["ours"],
            f"`{row['command']}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    for row in ROWS:
        rows.append(row_of(row))
        print(rows[-1], flush=True)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    table.writerows(rows)
    atomic.write_text(HERE / "parity.csv", text.getvalue())
    readme = HERE.parent / "README.md"
    pattern = r"(<!-- parity -->\n).*?(<!-- /parity -->)"
    atomic.write_text(
        readme, re.sub(pattern, lambda m: m[1] + markdown(rows) + "\n" + m[2], readme.read_text(), flags=re.DOTALL)
    )


if __name__ == "__main__":
    main()

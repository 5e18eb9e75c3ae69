"""The networks of the literature have the parameters that were published, to the last one; nothing is allocated.

The class table belongs to the conditioner (conditioner=label, label_vector), and DiT's fixed positions are computed.
Where the published
number includes them, `beside` adds them here.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from smoke import ROOT

from ldm.condition import Condition
from ldm.config.overrides import ConfigSearchPath
from ldm.net.classifier import NoisyClassifier
from ldm.net.positions import sincos


@dataclass(frozen=True)
class Row:
    """One published count.

    net: its option, with the overrides `typed`.  z: channels in and out.  expected: a count, or millions and decimals
    as printed.
    """

    net: str
    z: int
    expected: int | str
    context: int | None = None
    vector: int | None = None
    out: int | None = None
    beside: int = 0
    typed: tuple[str, ...] = field(default=())


IMAGENET = {  # LDM tab. 13: f -> z channels, channels, mult, attention, printed
    1: (3, 192, (1, 1, 2, 2, 4, 4), (8, 16, 32), "396.84"),
    2: (2, 192, (1, 2, 2, 4, 4), (4, 8, 16), "390.89"),
    4: (3, 192, (1, 2, 3, 5), (2, 4, 8), "400.92"),
    8: (4, 256, (1, 2, 4), (1, 2, 4), "394.98"),
    16: (8, 256, (1, 2, 4), (1, 2, 4), "395.00"),
    32: (32, 256, (1, 2, 4), (1, 2, 4), "395.11"),
}
CELEBA = {  # LDM tab. 14
    1: (3, 192, (1, 1, 2, 2, 4, 4), (8, 16, 32), "270.46"),
    2: (2, 192, (1, 2, 2, 4, 4), (4, 8, 16), "264.51"),
    4: (3, 224, (1, 2, 3, 4), (2, 4, 8), "274.06"),
    8: (4, 256, (1, 2, 4), (1, 2, 4), "257.73"),
    16: (8, 256, (1, 2, 4), (1, 2, 4), "257.75"),
    32: (32, 256, (1, 2, 4), (1, 2, 4), "257.86"),
}


def ablation(net: str, z: int, channels: int, mult, attention, expected: str, context: int | None = None) -> Row:
    typed = (f"channels={channels}", f"channel_mult={list(mult)}", f"attention_resolutions={list(attention)}")
    return Row(net, z, expected, context, typed=typed)


ROWS = {
    "SD 1.x": Row("sd1", 4, 859_520_964, 768),
    "SD 1.x inpaint": Row("sd1_inpaint", 4, 859_535_364, 768),
    "SD 2.x": Row("sd2", 4, 865_910_724, 1024),
    "SDXL": Row("sdxl", 4, 2_567_463_684, 2048, 2816),
    "LDM-8 txt2img": Row("ldm8_txt2img", 4, 872_300_484, 1280),
    "LDM-4 txt2img (CC)": Row("ldm4_txt2img", 3, 403_623_939, 640),
    "cin256-v2 LDM-4": Row("ldm4_cin256", 3, 400_920_579, 512),
    "cin LDM-8": Row("ldm8_cin", 4, 394_984_196, 512),
    "FFHQ/CelebA/bedrooms LDM-4": Row("ldm4_ffhq", 3, 274_056_163),
    "churches LDM-8": Row("ldm8_churches", 4, 294_966_916),
    "layout OpenImages": Row("layout", 3, 246_277_379, 512),
    "SR bsr": Row("sr_bsr", 3, 113_622_563),
    "inpaint big": Row("inpaint_big", 3, 387_245_827),
    "inpaint w/ attn": Row("inpaint_attn", 3, "215.230"),
    "semantic (landscapes)": Row("semantic", 3, 215_229_315),
    "RDM 768": Row("rdm", 16, 1_335_480_400, 768),
    **{f"f-ablation ImageNet LDM-{f}": ablation("ldm8_cin", *row, 512) for f, row in IMAGENET.items()},
    **{f"f-ablation CelebA LDM-{f}": ablation("ldm4_ffhq", *row) for f, row in CELEBA.items()},
    "ours: tiny": Row("tiny", 4, "17.56", 512),
    "ours: small": Row("small", 4, "101.38", 512),
    "ours: base": Row("base", 4, "227.99", 768),
    # 1001 classes, the null one too, and the fixed positions of 16 x 16 patches
    "DiT-S/2": Row("dit_s2", 4, 32_963_360, None, 384, 8, 1001 * 384 + sincos((16, 16), 384).numel()),
    "DiT-B/2": Row("dit_b2", 4, 130_512_416, None, 768, 8, 1001 * 768 + sincos((16, 16), 768).numel()),
    "DiT-L/2": Row("dit_l2", 4, 458_102_816, None, 1024, 8, 1001 * 1024 + sincos((16, 16), 1024).numel()),
    "DiT-XL/2": Row("dit_xl2", 4, 675_129_632, None, 1152, 8, 1001 * 1152 + sincos((16, 16), 1152).numel()),
    "Latte-XL/2": Row("latte_xl2", 4, "673.68", out=8),  # unconditional
    # pixel space: their papers print these; ADM's table has no null class
    "DDPM CIFAR-10": Row("ddpm_cifar", 3, "35.7"),
    "IDDPM CIFAR-10": Row("iddpm_cifar", 3, "52.5", out=6),
    "IDDPM ImageNet-64": Row("iddpm_64", 3, "121", out=6),
    "ADM-64": Row("adm_64", 3, "296", None, 768, 6, 1000 * 768),
    "ADM-256": Row("adm_256", 3, "554", None, 1024, 6, 1000 * 1024),
}
CALLED = (
    "sd1_inpaint",
    "sdxl",
    "ldm8_churches",
    "inpaint_attn",
    "ddpm_cifar",
    "adm_64",
    "dit_s2",
)  # together they have every part


def config(net: str, *typed: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(f"net/{net}", overrides=[f"net.{one}" for one in typed]).net


def built(row: Row) -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate(
            config(row.net, *row.typed),
            in_channels=row.z,
            out_channels=row.out or row.z,
            context_dim=row.context,
            vector_dim=row.vector,
        )


def answer(net: torch.nn.Module, row: Row) -> torch.Tensor:
    cond = Condition(
        context=torch.empty(2, 5, row.context, device="meta") if row.context else None,
        vector=torch.empty(2, row.vector, device="meta") if row.vector else None,
        concat=torch.empty(2, extra, 32, 32, device="meta") if (extra := config(row.net).concat_channels) else None,
    )
    return net(torch.empty(2, row.z, 32, 32, device="meta"), torch.empty(2, device="meta"), cond)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check(found: int, expected: int | str) -> None:
    """Equal, or equal in the millions that were printed."""
    if isinstance(expected, str):
        assert f"{found / 1e6:.{len(expected.partition('.')[2])}f}" == expected
    else:
        assert found == expected


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Weights that hold nothing need not be drawn."""
    for layer in (torch.nn.Linear, torch.nn.Conv2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


@pytest.mark.parametrize("name", ROWS)
def test_net_has_published_parameter_count(name):
    row = ROWS[name]
    net = built(row)
    check(count(net) + row.beside, row.expected)
    if row.net in CALLED and not row.typed:
        assert answer(net, row).shape == (2, row.out or row.z, 32, 32)


@pytest.mark.parametrize(
    ("size", "mult", "blocks", "printed"),
    [(64, (1, 2, 3, 4), 4, "65"), (128, (1, 1, 2, 3, 4), 2, "43"), (256, (1, 1, 2, 2, 4, 4), 2, "54")],
)
def test_noisy_classifier_has_published_parameter_count(size, mult, blocks, printed):
    with torch.device("meta"):
        net = NoisyClassifier(
            3,
            1000,
            (size, size),
            channel_mult=mult,
            num_res_blocks=blocks,
            attention_resolutions=[size // at for at in (32, 16, 8)],
        )
    check(count(net), printed)


def test_every_paper_net_option_is_counted():
    uncounted = {"unet", "quick", "quick_guidance_embed", "smoke", "smoke_guidance_embed", "lightningdit_xl1"}
    uncounted |= {
        "inflated",
        "audioldm_s",
        "audioldm_l",
        "dit_qm9",
        "unet_1d",
    }  # see test_presets.py, test_temporal.py
    options = ConfigSearchPath((ROOT / "conf",), ROOT).groups()["net"]
    assert set(options) - uncounted == {row.net for row in ROWS.values()}


@pytest.mark.parametrize("patch", [4, 8])
def test_dit_patch_size_changes_first_and_last_layer_only(patch):
    two, more = (built(Row("dit_s2", 4, 0, None, 384, 8, typed=(f"patch_size={p}",))) for p in (2, patch))
    assert count(more) - count(two) == (patch**2 - 4) * (4 * 384 + 8 * (384 + 1))


def test_lightningdit_has_size_of_dit():
    check(
        count(built(Row("lightningdit_xl1", 32, 0, None, 1152))) + 1001 * 1152 + sincos((16, 16), 1152).numel(),
        675_256_736,
    )

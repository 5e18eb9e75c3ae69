"""Released files of DiT and SiT with a first stage beside them: whole models, and one line for what is missing."""

import pytest
import torch
from omegaconf import OmegaConf
from seeded import fill, numbers
from smoke import command, here

from ldm.checkpoint import external
from ldm.config import build
from ldm.errors import UserError
from ldm.interop import config_nodes, diffusers, diffusers_config
from ldm.interop.dit import LABELS, dit, import_sit
from ldm.interop.folder import WEIGHTS
from ldm.interop.keymap import export_state
from ldm.io import atomic
from ldm.net.blocks import reversed_timestep_embedding
from ldm.net.dit import DiT
from ldm.net.positions import sincos

CHANNELS, DEPTH, CLASSES = 384, 1, 3


def net(outputs: int, **options) -> DiT:
    return DiT(4, outputs, channels=CHANNELS, depth=DEPTH, num_heads=6, vector_dim=CHANNELS, **options).eval()


@pytest.fixture(scope="module")
def state():
    """A file of DiT-S's width, one block deep, for latents of 8 x 8 and three classes."""
    made = export_state(dit(DEPTH, False), fill(net(8)).state_dict(), "DiT")
    return {
        **made,
        LABELS: numbers("labels", (CLASSES + 1, CHANNELS)),
        "pos_embed": sincos((4, 4), CHANNELS)[None].float(),
    }


@pytest.fixture
def folder(tmp_path):
    """An empty folder but for a first stage of factor 4, as diffusers has it, in vae."""
    node = config_nodes.first_stage(4, 16, (1, 2, 2), 1, groups=8)
    stage = fill(build.build_autoencoder(OmegaConf.create(node), 3))
    weights = {name: value for name, value in stage.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    atomic.write_json(tmp_path / "vae" / "config.json", diffusers_config.export_first_stage(node, 3, 0.5, (32, 32)))
    atomic.write_tensors(tmp_path / "vae" / WEIGHTS, diffusers.export_autoencoder(weights))
    return tmp_path


@torch.no_grad()
def test_dit_file_opens_as_model_with_learned_variance(state, folder):
    torch.save(state, folder / "DiT-S-2-32x32.pt")
    model = external.build_from_pipeline(external.open_pipeline(folder / "DiT-S-2-32x32.pt"))
    plain = fill(net(8))
    x, t, label = numbers("x", (2, 4, 8, 8)), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    cond = model.condition({"label": label})
    assert torch.equal(cond.vector, state[LABELS][label])
    assert torch.equal(model.denoiser.net(x, 1000 * t, cond), plain(x, 1000 * t, cond))
    assert model.denoiser(x, t[:1], cond).var_frac is not None
    assert model.autoencoder.scale.tolist() == pytest.approx([0.18215] * 4)
    assert (model.size, model.denoiser.schedule.T) == ((32, 32), 1000)


@pytest.mark.slow
def test_sample_runs_on_dit_file(state, folder):
    torch.save(state, folder / "DiT-S-2-32x32.pt")
    with here(folder):
        typed = (
            f"run={folder / 'DiT-S-2-32x32.pt'}",
            "label=2",
            "num=2",
            "steps=2",
            "output_dir=drawn",
            "guidance=cfg_channels",
        )
        assert command("sample.py", *typed, "sampler=ddpm_learned", "timestep_spacing=linspace") == 0
    assert (folder / "drawn" / "000001.png").is_file()


@torch.no_grad()
def test_sit_file_opens_as_flow_model(state, folder):
    torch.save({"ema": state, "model": {}}, folder / "SiT-S-2.pt")
    model = external.build_from_pipeline(external.open_pipeline(folder / "SiT-S-2.pt"))
    plain = net(4, time_embedding=reversed_timestep_embedding)
    plain.load_state_dict(import_sit(state))
    x, t, cond = numbers("x", (1, 4, 8, 8)), torch.tensor([300.0]), model.condition({"label": torch.tensor([1])})
    assert torch.equal(model.denoiser.net(x, t, cond), plain(x, t, cond))
    assert (type(model.denoiser.schedule).__name__, type(model.denoiser.prediction).__name__) == ("Flow", "Flow")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("model.pt", {}, "expected one of the two in the file's name"),
        (
            "DiT.pt",
            {"x_embedder.proj.weight": torch.zeros(100, 4, 2, 2)},
            "a network of 100 channels; expected DiT or SiT of 384",
        ),
        (
            "DiT.pt",
            {"x_embedder.proj.weight": torch.zeros(384, 8, 2, 2)},
            "has 4 latent channels; expected the file's 8",
        ),
        ("DiT.pt", {"cls_token": torch.zeros(1)}, "unknown names cls_token"),
    ],
)
def test_dit_file_of_unknown_kind_is_refused(name, change, expected, state, folder):
    torch.save({**state, **change}, folder / name)
    with pytest.raises(UserError, match=expected):
        external.open_pipeline(folder / name)


def test_dit_file_without_first_stage_names_remedy(state, tmp_path):
    torch.save(state, tmp_path / "DiT.pt")
    with pytest.raises(UserError, match=r"DiT\.pt: no first stage; put diffusers' AutoencoderKL \(.*\) into .*vae"):
        external.open_pipeline(tmp_path / "DiT.pt")

"""An adapter's reference to its base model, and LoRA files of diffusers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoint.adapters import BaseModelRef, apply_lora_file
from ldm.errors import UserError
from ldm.net.unet import UNet


def test_base_model_ref_round_trip_and_errors(tmp_path):
    ref = BaseModelRef(str(tmp_path), "a" * 64)
    ref.write(tmp_path)
    assert BaseModelRef.read(tmp_path) == ref
    ref.check_weights("a" * 64, tmp_path)
    with pytest.raises(UserError, match=r"trained on other weights of .* \(a{12}\) than are there now \(b{12}\)"):
        ref.check_weights("b" * 64, tmp_path)
    BaseModelRef(str(tmp_path / "gone"), "a" * 64).write(tmp_path)
    with pytest.raises(UserError, match=r"is an adapter on .*gone, which is not there"):
        BaseModelRef.read(tmp_path)


def test_lora_file_is_scaled_by_alpha_over_rank_and_own_scale(tmp_path):
    """W + 0.5 * (8 / 2) up @ down."""
    model = nn.Module()
    model.denoiser = nn.Module()
    model.denoiser.net = UNet(
        4,
        4,
        channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        context_dim=4,
        num_head_channels=8,
        num_groups=4,
    )
    layer = model.denoiser.net.middle1.attention.proj_in
    before, generator = layer.weight.detach().clone(), torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    name, header = "unet.mid_block.attentions.0.proj_in", json.dumps({"unet.lora_alpha": 8, "unet.r": 2})
    state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": header})
    apply_lora_file(model, tmp_path / "lora.safetensors", 0.5)
    torch.testing.assert_close(layer.weight.flatten(1), before.flatten(1) + 2 * up @ down)
    assert not any(p.requires_grad for p in model.parameters())

"""DiT, SiT and LightningDiT written out under their own names: ours, from their weights, answer the same."""

import math
from functools import partial

import pytest
import torch
from seeded import fill, numbers
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn

from ldm.conditioner.label import LabelVector
from ldm.diffusion import prediction, schedule
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.interop.dit import dit, import_dit, import_labels, import_sit
from ldm.interop.keymap import export_state
from ldm.net.blocks import reversed_timestep_embedding
from ldm.net.dit import DiT, SwiGLU
from ldm.net.positions import rope, sincos

CHANNELS, SIDE, DEPTH, HEADS, CLASSES = 32, 4, 2, 2, 5


class Time(nn.Module):
    """t_embedder: cosines, then sines."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, CHANNELS), nn.SiLU(), nn.Linear(CHANNELS, CHANNELS))

    def forward(self, t):
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=t.dtype) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class Labels(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_table = nn.Embedding(CLASSES + 1, CHANNELS)


class Gated(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.w12, self.w3 = nn.Linear(CHANNELS, 2 * inside), nn.Linear(inside, CHANNELS)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(a) * b)


class Turned(Attention):
    """Attention whose queries and keys, as complex numbers, are turned by their row and column."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        d = q.shape[-1]
        rates = 10_000.0 ** (-torch.arange(0, d // 2, 2, dtype=x.dtype) / (d // 2))
        row, column = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
        angle = torch.cat([row[:, None] * rates, column[:, None] * rates], dim=1)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(one.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for one in (q, k)
        )
        return self.proj(((q @ k.transpose(-1, -2) * d**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, lightning):
        super().__init__()
        norm = partial(nn.RMSNorm, eps=1e-6) if lightning else partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)
        self.norm1, self.norm2 = norm(CHANNELS), norm(CHANNELS)
        self.attn = (Turned if lightning else Attention)(CHANNELS, num_heads=HEADS, qkv_bias=True)
        inside = 4 * CHANNELS
        self.mlp = (
            Gated(int(2 / 3 * inside))
            if lightning
            else Mlp(CHANNELS, inside, act_layer=partial(nn.GELU, approximate="tanh"))
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(CHANNELS, 6 * CHANNELS))

    def forward(self, x, c):
        a, b, g, d, e, h = (one.unsqueeze(1) for one in self.adaLN_modulation(c).chunk(6, dim=1))
        x = x + g * self.attn(self.norm1(x) * (1 + b) + a)
        return x + h * self.mlp(self.norm2(x) * (1 + e) + d)


class Final(nn.Module):
    def __init__(self, features, lightning):
        super().__init__()
        self.norm_final = (
            nn.RMSNorm(CHANNELS, eps=1e-6) if lightning else nn.LayerNorm(CHANNELS, elementwise_affine=False, eps=1e-6)
        )
        self.linear = nn.Linear(CHANNELS, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(CHANNELS, 2 * CHANNELS))

    def forward(self, x, c):
        shift, scale = (one.unsqueeze(1) for one in self.adaLN_modulation(c).chunk(2, dim=1))
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Theirs(nn.Module):
    """DiT; halved: SiT, whose second half of channels is thrown away; lightning: LightningDiT."""

    def __init__(self, patch=2, outputs=6, halved=False, lightning=False):
        super().__init__()
        self.patch, self.outputs, self.halved = patch, outputs, halved
        self.x_embedder = PatchEmbed(SIDE * patch, patch, 3, CHANNELS)
        self.t_embedder, self.y_embedder = Time(), Labels()
        self.pos_embed = nn.Parameter(torch.empty(1, SIDE * SIDE, CHANNELS), requires_grad=False)
        self.blocks = nn.ModuleList(Block(lightning) for _ in range(DEPTH))
        self.final_layer = Final(patch * patch * outputs, lightning)
        if lightning:
            self.feat_rope = nn.Module()
            for name in ("freqs_cos", "freqs_sin"):
                self.feat_rope.register_buffer(name, torch.zeros(SIDE * SIDE, CHANNELS // HEADS))

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (SIDE, SIDE)).unflatten(3, (self.patch, self.patch, self.outputs))
        out = torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)
        return out.chunk(2, dim=1)[0] if self.halved else out


def theirs_of(**options):
    net = fill(Theirs(**options)).double()
    net.pos_embed.data.copy_(sincos((SIDE, SIDE), CHANNELS)[None])
    return net


def ours_of(outputs=3, **options):
    options = {"patch_size": 2, **options}
    return (
        DiT(3, outputs, channels=CHANNELS, depth=DEPTH, num_heads=HEADS, vector_dim=CHANNELS, **options).double().eval()
    )


def labels_of(state):
    labels = LabelVector(CLASSES, CHANNELS).double()
    labels.load_state_dict(import_labels(state))
    return labels


LIGHTNING = {"norm": partial(nn.RMSNorm, eps=1e-6), "feed_forward": SwiGLU, "rotary": rope, "patch_size": 1}
Y = torch.tensor([1, 4])


@torch.no_grad()
def test_dit_matches_original():
    net, ours = theirs_of(), ours_of(6)
    state = net.state_dict()
    ours.load_state_dict(import_dit(state))
    told = labels_of(state)({"label": Y})
    x, t = numbers("x", (2, 3, 8, 8)).double(), torch.tensor([3.0, 700.0]).double()
    assert torch.allclose(ours(x, t, told), net(x, t, Y), atol=1e-6)
    null = labels_of(state).null({"label": Y})
    assert torch.allclose(ours(x, t, null), net(x, t, torch.full((2,), CLASSES)), atol=1e-6)


@pytest.mark.parametrize("lightning", [False, True], ids=["sit", "lightningdit"])
@torch.no_grad()
def test_sit_and_lightningdit_match_originals(lightning):
    net = theirs_of(patch=1, outputs=3, lightning=True) if lightning else theirs_of(halved=True)
    ours = ours_of(time_embedding=reversed_timestep_embedding, **(LIGHTNING if lightning else {}))
    state = net.state_dict()
    ours.load_state_dict(import_sit(state))
    size = SIDE * net.patch
    x, t = numbers("x", (2, 3, size, size)).double(), torch.tensor([0.25, 0.9]).double()
    velocity = net(x, 1 - t, Y)  # theirs: x_t = s x0 + (1 - s) eps at s = 1 - t, and the answer is x0 - eps
    found = Denoiser(ours, schedule.Flow(), prediction.Flow())(x, t, labels_of(state)({"label": Y}))
    assert torch.allclose(found.x0 - found.eps, velocity, atol=1e-6)
    assert torch.allclose((1 - t)[:, None, None, None] * found.x0 + t[:, None, None, None] * found.eps, x, atol=1e-9)


@pytest.mark.parametrize("lightning", [False, True], ids=["dit", "lightningdit"])
def test_dit_name_table_is_invertible(lightning):
    state = theirs_of(lightning=lightning).state_dict()
    back = export_state(dit(DEPTH, lightning), import_dit(state), "DiT")
    computed = {"pos_embed", "y_embedder.embedding_table.weight", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert back.keys() == state.keys() - computed
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_import_dit_rejects_unknown_tensors():
    state = theirs_of().state_dict()
    with pytest.raises(UserError, match=r"DiT: unknown names cls_token"):
        import_dit({**state, "cls_token": torch.zeros(1)})
    with pytest.raises(UserError, match="pos_embed is not the sine-cosine embedding"):
        import_dit({**state, "pos_embed": torch.zeros(1, SIDE * SIDE, CHANNELS)})
    with pytest.raises(UserError, match="pos_embed is not the sine-cosine embedding"):
        import_dit({**state, "pos_embed": torch.zeros(1, 5, CHANNELS)})
    with pytest.raises(UserError, match="not the weights of a class-conditional DiT"):
        import_labels({})

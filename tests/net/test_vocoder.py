"""The vocoder: what its layers compute, and that it can represent a sound exactly."""

import math

import torch

from ldm.media.mel import log_mel
from ldm.media.stft import HOP, N_FFT, stft
from ldm.net.vocoder import ConvNeXtBlock, Vocoder


def test_block_equals_written_out_block():
    torch.manual_seed(0)
    block = ConvNeXtBlock(6, 10, 0.5).double()
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    padded = torch.cat([x.new_zeros(2, 6, 3), x, x.new_zeros(2, 6, 3)], 2)
    weight, bias = block.depthwise.weight[:, 0], block.depthwise.bias
    h = torch.stack([(padded[:, :, t : t + 7] * weight).sum(2) + bias for t in range(9)], 1)  # (2, 9, 6)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h @ block.mlp[0].weight.T + block.mlp[0].bias
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    expected = x + 0.5 * (h @ block.mlp[2].weight.T + block.mlp[2].bias).transpose(1, 2)
    torch.testing.assert_close(block(x), expected)


def test_vocoder_gives_the_wave_of_its_magnitude_and_phase():
    """With a head whose bias is a frame's logarithm and phase, the wave is that frame's, repeated every hop."""
    vocoder = Vocoder(width=8, hidden=8, depth=2)
    time = torch.arange(12 * HOP, dtype=torch.float64)
    wave = 0.3 * torch.cos(2 * math.pi * 8 * time / HOP + 0.7)[None]  # whole periods a hop: every frame is the same
    frame = stft(wave)[0, :, 5]
    with torch.no_grad():
        vocoder.head.weight.zero_()
        vocoder.head.bias.copy_(torch.cat([frame.abs().clamp_min(1e-9).log(), frame.angle()]))
    found = vocoder(torch.zeros(1, 1, 128, 12))
    assert (found.shape, found.dtype) == ((1, 12 * HOP), torch.float32)
    torch.testing.assert_close(found[:, N_FFT:-N_FFT], wave[:, N_FFT:-N_FFT].float(), atol=1e-5, rtol=0)


def test_vocoder_is_float32_under_autocast_and_shifts_with_its_input():
    torch.manual_seed(0)
    vocoder = Vocoder(width=8, hidden=16, depth=2)
    image = log_mel(torch.randn(2, 64 * HOP) / 10)
    with torch.no_grad():
        plain, shifted = vocoder(image), vocoder(image[..., 8:])
        with torch.autocast("cpu", torch.bfloat16):
            assert vocoder(image).dtype == torch.float32
    reach = 3 * 3 + 4  # frames that depend on the edge: three convolutions over 7 frames, and the overlap of frames
    shifts = plain[:, (8 + reach) * HOP : -reach * HOP]
    torch.testing.assert_close(shifted[:, reach * HOP : -reach * HOP], shifts, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vocoder(image[:1]), plain[:1], atol=1e-4, rtol=1e-4)

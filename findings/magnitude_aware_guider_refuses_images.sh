#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.14.1: the guider MagnitudeAwareGuidance takes no image and no video.
#
# Guess before the run: guiders are combinations of two predictions of any shape (B, ...), as the base class and the
# others are; this one differs from plain guidance by a factor for each sample.
# Seen: its norms are taken over the list of all axes but the first, and torch.norm reads such a list as the two axes of
# a matrix: predictions (B, N, C) of a transformer over tokens are guided, those of an image (B, C, H, W) or a video
# (B, C, F, H, W) end in RuntimeError, while the guiders beside it take all three shapes.
# Output: one line a shape with what each guider did; exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 diffusers==0.42.1 numpy==2.2.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY'
import sys

import torch
from diffusers.guiders import ClassifierFreeGuidance, MagnitudeAwareGuidance, TangentialClassifierFreeGuidance

GUIDERS = (ClassifierFreeGuidance, TangentialClassifierFreeGuidance, MagnitudeAwareGuidance)


def outcome(guider, shape):
    conditional, unconditional = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        guided = guider(guidance_scale=3.0).forward(conditional, unconditional).pred
    except RuntimeError:
        return "RuntimeError"
    return "guided" if guided.shape == conditional.shape else "another shape"


rows = {shape: [outcome(guider, shape) for guider in GUIDERS] for shape in [(2, 64, 16), (2, 4, 8, 8), (2, 4, 3, 8, 8)]}
for shape, row in rows.items():
    print(shape, ", ".join(f"{guider.__name__}: {done}" for guider, done in zip(GUIDERS, row)))
tokens, image, video = rows.values()
sys.exit(0 if tokens == ["guided"] * 3 and image == video == ["guided", "guided", "RuntimeError"] else 1)
PY

#!/usr/bin/env bash
# torch 2.14.1: torch.utils.flop_counter.FlopCounterMode changes the gradients of the step that it counts.
#
# Guess before the run: a counter looks on; a step under it is the same, bit for bit, as without it.
# Seen: the mode decomposes every operator that it has no formula for before it runs it. SiLU's backward pass becomes
# several products, which round otherwise, so the convolution's gradients differ in their last digits (float32, CPU).
# A training whose one step is counted is therefore another training from that step on. With ReLU nothing differs.
# Output: "silu: forward equal, gradients differ" and "relu: forward equal, gradients equal"; exits with 1 otherwise.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PY'
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def step(activation, mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), activation(), nn.Conv2d(16, 16, 3, padding=1))
    images = torch.randn(4, 3, 16, 16)
    with mode:
        loss = net(images).square().mean()
        loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


lines = []
for name, activation in (("silu", nn.SiLU), ("relu", nn.ReLU)):
    (loss, grads), (counted_loss, counted) = step(activation, nullcontext()), step(activation, FlopCounterMode(display=False))
    forward = "equal" if torch.equal(loss, counted_loss) else "differs"
    backward = "equal" if all(map(torch.equal, grads, counted)) else "differ"
    lines.append(f"{name}: forward {forward}, gradients {backward}")
    print(lines[-1])
sys.exit(lines != ["silu: forward equal, gradients differ", "relu: forward equal, gradients equal"])
PY

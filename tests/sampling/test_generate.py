"""Batches of rows with seeds of their own, and what a sampler's monitor says."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_tasks import model

from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import ddim
from ldm.diffusion.schedule import linear
from ldm.sampling import generate, monitor
from ldm.sampling.generate import generate_samples, rank_slice
from ldm.sampling.monitor import SamplerMonitor, SamplerState
from ldm.sampling.tasks import sample


@pytest.mark.parametrize(("num", "ranks"), [(7, 3), (2, 4), (12, 5)])
def test_slices_of_ranks_partition_the_rows(num, ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    slices = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        slices.append(rank_slice(num))
    assert [row for rows in slices for row in rows] == list(range(num))
    assert {len(rows) for rows in slices} <= {num // ranks, -(-num // ranks)}


def test_rows_have_seeds_of_their_own_in_batches_and_the_precision_asked_for():
    made, ts = model(linear()), trailing(linear(), 6)[:4]
    rows, guided = [3, 5, 6, 8, 9], partial(cfg, scale=1.0)
    whole = sample(made, {"caption": ["four"] * 5}, [10 + row for row in rows], ts, ddim, guided)
    used = []
    made.denoiser.register_forward_pre_hook(lambda *_: used.append(torch.is_autocast_enabled("cpu")))

    def run(precision: str):
        batches = partial(generate_samples, made, lambda part: {"caption": ["four"] * len(part), "index": part}, rows)
        return list(batches(10, 2, ts, ddim, guided, precision))

    parts = run("32")
    assert [batch["index"] for _, batch in parts] == [[3, 5], [6, 8], [9]]
    assert torch.equal(torch.cat([image for image, _ in parts]), whole)
    assert not any(used)
    used.clear()
    assert {image.dtype for image, _ in run("bf16")} == {torch.float32}
    assert all(used)


def test_layers_are_packed_in_the_precision_of_sampling(monkeypatch):
    packed = []
    monkeypatch.setattr(generate, "fast_inference", lambda made, dtype: packed.append(dtype) or nullcontext())
    for precision in ("32", "bf16"):
        next(generate_samples(model(), lambda part: {}, [0], 0, 1, trailing(linear(), 1), ddim, cfg, precision))
    assert packed == [torch.float32, torch.bfloat16]


def test_time_left_is_that_of_the_steps_so_far():
    assert SamplerState(4, 10, 6.0, torch.zeros(1), lambda z: z).seconds_left == 9.0


def test_monitor_counts_steps_and_seconds(monkeypatch):
    clock = iter([100.0, 102.0, 105.0, 109.0])
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    seen, states, ts = SamplerMonitor(), [], torch.tensor([1.0, 0.75, 0.5, 0.0])

    def sampler(denoise, schedule, x, ts, noise):
        for t in (ts[0], ts[1], ts[2]):
            denoise(x, t)
            states.append(seen.state)
        return x

    def denoise(x, t):
        return SimpleNamespace(x0=x + t)

    seen.wrap(lambda z: z)(sampler)(denoise, None, torch.zeros(1), ts, None)
    assert [state[:3] for state in states] == [(1, 3, 2.0), (2, 3, 5.0), (3, 3, 9.0)]
    assert [float(state.x0) for state in states] == [1.0, 0.75, 0.5]

"""torch.compile with Inductor: the compiled network is the eager one, at other sizes, under DDP, and with averages."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from helpers import randomize_weights
from smoke import port
from tiny_diffusion import Losses, make_convolutions, make_lit, train
from torch._dynamo.testing import CompileCounterWithBackend

from ldm.compat import is_compiled
from ldm.condition import Condition
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import ddim
from ldm.ema import ConstantEMA
from ldm.net.dit import DiT
from ldm.sampling.tasks import sample
from ldm.training.callbacks import EMACallback, EvaluationCallback

pytestmark = pytest.mark.slow
F64 = torch.float64
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compile in an empty folder, in this process: its headers are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        with torch._inductor.config.patch(compile_threads=1):
            yield


@pytest.fixture(autouse=True)
def uncompiled():
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(dtype: torch.dtype, height: int, width: int) -> tuple:
    generator = torch.Generator().manual_seed(height + 100 * width)
    x, vector = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((2, 1, height, width), (2, 16)))
    return x.to(dtype), torch.tensor([3.0, 700.0], dtype=dtype), Condition(vector=vector.to(dtype))


def ramps(grid: torch.Size, dim: int, device: torch.device) -> torch.Tensor:
    """Return numbers that are exact in float32, different at every position: (height * width, dim)."""
    height, width = grid
    return torch.arange(height * width * dim, device=device).reshape(height * width, dim) / 1024


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-12), (torch.float32, 100 * 2**-24)])
def test_compiled_network_equals_eager_at_every_size(dtype, bound):
    """A transformer of one block: after a second size there are no more graphs.

    In float64 without what the network computes in float32: the time's embedding is an input, and positions are ramps.
    """
    positions = {"positions": ramps} if dtype == F64 else {}
    net = DiT(1, 1, channels=16, depth=1, num_heads=2, frequencies=16, vector_dim=16, **positions)
    eager = randomize_weights(net).to(dtype)
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend("inductor")
    compiled.compile(backend=counter)
    with torch.no_grad():
        for size in ((8, 8), (16, 24), (12, 16), (24, 8)) if dtype == F64 else ((8, 8),):
            given = inputs(dtype, *size)
            emb = eager.embed(*given[1:]) if dtype == F64 else None
            exact = eager(*given, emb=emb)
            assert (compiled(*given, emb=emb) - exact).norm() < bound * exact.norm()
    assert counter.frame_count == (2 if dtype == F64 else 1)


def test_average_swapped_in_is_what_compiled_network_samples_with():
    """In the middle of a compiled training scores are those of the averaged weights, and the training goes on with its
    own: weights are inputs of the compiled graph.
    """
    results = {}
    ts = torch.tensor([1.0, 0.5, 0.0], dtype=F64)

    @torch.no_grad()
    def draw(model) -> torch.Tensor:
        return sample(model, {"index": [0, 1]}, [0, 1], ts, ddim, cfg)

    for compiled in (False, True):
        lit, samples, seen = make_lit(make_convolutions(), drop=0.0).double(), [], Losses()
        average = ConstantEMA(lit.model, 0.9)

        def score(lit=lit, samples=samples) -> dict[str, float]:
            samples.append(draw(lit.model))
            return {}

        callbacks = [EMACallback(average), seen, EvaluationCallback(score, lambda *row: None, 2, average)]
        train(lit, callbacks, 4, precision="64", torch_compile=compiled)
        assert is_compiled(lit.model.denoiser.net) == compiled
        other = make_convolutions().double().eval()
        other.load_state_dict({**lit.model.state_dict(), **average.shadow})
        torch.testing.assert_close(samples[1], draw(other), rtol=1e-9, atol=1e-9)
        other.load_state_dict(lit.model.state_dict())
        assert (draw(other) - samples[1]).abs().max() > 1e-4
        losses = torch.tensor(seen.losses, dtype=F64)
        results[compiled] = [*samples, losses, *lit.parameters(), *average.shadow.values()]
    for one, two in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def run_rank(rank: int, world: int, address: int, folder: str, compiled: bool) -> None:
    """Train as one process of several, and save losses and weights."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": address, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    env |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in env.items()}
    torch.set_num_threads(1)
    lit, seen = make_lit(make_convolutions(), drop=0.0), Losses()
    average = ConstantEMA(lit.model, 0.9)
    options = {"strategy": "ddp", "devices": world} if world > 1 else {}
    train(lit, [EMACallback(average), seen], STEPS, precision="64", torch_compile=compiled, **options)
    saved = {"losses": seen.losses, "weights": list(lit.parameters()), "average": list(average.shadow.values())}
    torch.save(saved, Path(folder) / f"{world}-{rank}.pt")


def test_compiled_ddp_equals_eager_process(tmp_path):
    """Two processes with compiled networks take the steps of one eager process at the same global batch."""
    torch.multiprocessing.spawn(run_rank, (2, port(), str(tmp_path), True), nprocs=2)
    torch.multiprocessing.spawn(run_rank, (1, port(), str(tmp_path), False), nprocs=1)
    first, second, whole = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    means = torch.tensor([first["losses"], second["losses"]], dtype=F64).mean(0)
    torch.testing.assert_close(means, torch.tensor(whole["losses"], dtype=F64), rtol=1e-9, atol=0)
    for part in ("weights", "average"):
        for one, two, three in zip(first[part], second[part], whole[part], strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(one, three, rtol=1e-7, atol=1e-8)

"""Which parameters decay, which go to Muon, and that two optimisers which step as one are two."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ldm.checkpoint.dtensor import full_tensors, is_dtensor
from ldm.training.optimizers import ChainedOptimizer, Muon, adamw, muon


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.step(lambda: (optimizer.zero_grad(), model(x).square().sum().backward()))


def test_adamw_does_not_decay_vectors():
    groups = adamw(net().parameters(), weight_decay=0.3).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [
        (0.3, {2, 4}),
        (0.0, {1}),
    ]
    assert [group["weight_decay"] for group in adamw(nn.GroupNorm(1, 4).parameters()).param_groups] == [0.0]


def test_muon_takes_matrices_and_adamw_the_rest():
    model = net()
    both = muon(model.parameters(), lr=1e-3, matrix_lr=0.1)
    first, second = both.optimizers
    assert [p.shape for group in first.param_groups for p in group["params"]] == [(3, 16)]
    assert {p.ndim for group in second.param_groups for p in group["params"]} == {1, 4}
    assert [group["lr"] for group in both.param_groups] == [0.1, 1e-3, 1e-3]
    assert isinstance(muon(nn.GroupNorm(1, 4).parameters()), torch.optim.AdamW)


@pytest.mark.parametrize("make", [adamw, muon])
def test_optimizer_state_resumes_exactly(make):
    whole, model = net(), net()
    stepped(whole, make(whole.parameters(), lr=1e-2), 6)
    before = make(model.parameters(), lr=1e-2)
    stepped(model, before)
    after = make(model.parameters(), lr=1e-2)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    stepped(model, after)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_chained_optimizer_propagates_learning_rate():
    model = net()
    both = muon(model.parameters())
    state = both.state_dict()
    both.load_state_dict(state)
    for group in both.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    stepped(model, both)
    assert isinstance(both, ChainedOptimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def after_two_steps(rows, mesh=None):
    """A matrix (rows, 64) after two steps of muon on gradients of 8 samples, unsharded."""
    torch.manual_seed(0)
    net = nn.Linear(64, rows, bias=False)
    if mesh is not None:
        fully_shard(net, mesh=mesh)
    optimizer = muon(net.parameters())
    for _ in range(2):
        net(torch.randn(8, 64)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_tensors(net.weight.detach())


def compare_on_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for rows in (128, 1):
        assert torch.equal(after_two_steps(rows, mesh), after_two_steps(rows))
    dist.destroy_process_group()


def test_muon_on_matrices_sharded_over_one_process_matches_unsharded(tmp_path, monkeypatch):
    """Momenta and parameters stay sharded between steps, and the parameter groups are the former ones."""
    unsharded, step = [], Muon._step_unsharded
    monkeypatch.setattr(Muon, "_step_unsharded", lambda *args: (unsharded.append(args[2]), step(*args)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = after_two_steps(8, mesh)
        assert len(unsharded) == 2
        assert torch.equal(sharded, after_two_steps(8))
        assert len(unsharded) == 2, "torch's own step suffices where nothing is sharded"
        net = fully_shard(nn.Linear(4, 3, bias=False), mesh=mesh)
        other = fully_shard(nn.Linear(4, 3, bias=False), mesh=mesh)  # without gradient
        before = full_tensors(other.weight.detach()).clone()
        optimizer = muon([net.weight, other.weight])
        groups = optimizer.optimizers[0].param_groups

        def closure():
            loss = net(torch.ones(2, 4)).sum()
            loss.backward()
            return loss

        assert torch.is_grad_enabled()
        with torch.no_grad():
            loss = optimizer.optimizers[0].step(closure)
        assert loss.requires_grad
        assert optimizer.optimizers[0].param_groups is groups
        (state,) = optimizer.optimizers[0].state.values()
        assert all(is_dtensor(value) for value in state.values() if value.ndim)
        assert torch.equal(full_tensors(other.weight.detach()), before)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_muon_on_sharded_matrices_matches_one_process(tmp_path):
    """Bit for bit, of a matrix with fewer rows than processes too."""
    torch.multiprocessing.spawn(compare_on_two, args=(tmp_path,), nprocs=2)

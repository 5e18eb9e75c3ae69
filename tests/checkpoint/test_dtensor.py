import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ldm.checkpoint.dtensor import distribute_optimizer_state, full_tensors, is_dtensor
from ldm.training.optimizers import adamw, muon

LAYOUTS = ("contiguous", "channels_last", "sharded")
OPTIMIZERS = {
    "adamw": adamw,
    "muon": muon,
    "torch's AdamW": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
}


@pytest.fixture(scope="module")
def mesh():
    """A device mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def after_a_step(make, layout, mesh):
    """A network laid out as named, and its optimiser after one step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    if layout == "sharded":
        fully_shard(net, mesh=mesh)
    elif layout == "channels_last":
        net.to(memory_format=torch.channels_last)
    optimizer = make(net.parameters())
    step(net, optimizer)
    return net, optimizer


def step(net, optimizer):
    net(torch.ones(1, 2, 4, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer):
    """The tensors of each parameter's state, by its number among all and their name."""
    states = [one.state for one in getattr(optimizer, "optimizers", [optimizer])]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = [(i, p, state[p]) for i, p in enumerate(parameters) for state in states if p in state]
    return {
        (i, name): (value, p)
        for i, p, values in found
        for name, value in values.items()
        if torch.is_tensor(value) and value.ndim
    }


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", LAYOUTS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_loaded_optimizer_state_has_layout_of_parameters(make, writer, reader, mesh):
    """Shards, strides, device and type are those of the parameter, the values those that were saved, and the next step
    can be taken.
    """
    _, source = after_a_step(make, writer, mesh)
    net, target = after_a_step(make, reader, mesh)
    expected = {key: full_tensors(value).clone() for key, (value, _) in moments(source).items()}
    target.load_state_dict(distribute_optimizer_state(copy.deepcopy(full_tensors(source.state_dict())), target))
    loaded = moments(target)
    assert loaded.keys() == expected.keys() != set()
    for key, (value, p) in loaded.items():
        assert is_dtensor(value) == is_dtensor(p) == (reader == "sharded")
        assert (value.dtype, value.device, value.shape) == (p.dtype, p.device, p.shape)
        if is_dtensor(p):
            assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
            assert value.to_local().stride() == p.to_local().stride()
        else:
            assert value.stride() == p.stride()
        assert torch.equal(full_tensors(value), expected[key])
    step(net, target)


@pytest.mark.parametrize("make", [adamw, muon])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("saved", [torch.channels_last, torch.contiguous_format])
def test_fused_optimizer_step_is_independent_of_saved_layout(layout, saved, make):
    """A fused step with moments that were saved in another layout is the step with those that were not."""
    ends = []
    for source in (layout, saved):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).to(memory_format=layout)
        optimizer = make(net.parameters(), lr=0.1)
        for step in range(2):
            net(torch.randn(1, 2, 4, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                state = optimizer.state_dict()
                for part in state.get("optimizers", [state]):
                    for values in part["state"].values():
                        for name, value in values.items():
                            values[name] = value.contiguous(memory_format=source) if value.ndim == 4 else value
                optimizer.load_state_dict(distribute_optimizer_state(state, optimizer))
        ends.append(net[0].weight.detach().clone())
    assert torch.equal(*ends)

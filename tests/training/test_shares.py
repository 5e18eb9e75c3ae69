import pytest
import torch

from ldm.training.shares import states_like


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("saved", [torch.channels_last, torch.contiguous_format])
def test_moments_lie_in_memory_as_their_parameters_do(layout, saved):
    """A fused step with moments that were saved in another layout is the step with those that were not."""
    ends = []
    for source in (layout, saved):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(2, 3, 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        for step in range(2):
            net(torch.randn(1, 2, 4, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                state = optimizer.state_dict()
                for kept in state["state"].values():
                    for name, one in kept.items():
                        kept[name] = one.contiguous(memory_format=source) if one.ndim == 4 else one
                optimizer.load_state_dict(states_like(state, optimizer))
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)

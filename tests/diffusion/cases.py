"""The schedules, predictions and shapes that every test of the mathematics runs over."""

import torch
from torch import Tensor, nn

from ldm.diffusion import prediction, schedule

F64 = torch.float64
TABLES = {
    "linear": schedule.linear(),
    "scaled_linear": schedule.scaled_linear(),
    "cosine": schedule.cosine(),
    "sigmoid": schedule.sigmoid(),
    "sigmoid_beta": schedule.sigmoid_beta(),
    "sqrt": schedule.sqrt(),
    "zero_terminal_snr": schedule.zero_terminal_snr(schedule.scaled_linear()),
    "shifted": schedule.shifted(schedule.cosine(), 4.0),
}
CONTINUOUS = {
    "flow": schedule.Flow(),
    "flow_shift": schedule.Flow(3.0),
    "vp": schedule.VP(),
    "gvp": schedule.GVP(),
    "edm": schedule.EDM(),
}
SCHEDULES = TABLES | CONTINUOUS
PREDICTIONS = {
    "eps": prediction.Eps(),
    "x0": prediction.X0(),
    "v": prediction.V(),
    "flow": prediction.Flow(),
    "edm": prediction.EDM(0.5),
}
NO_SIGNAL = ("zero_terminal_snr", "flow", "flow_shift", "gvp")  # at t = 1, where eps is refused
SHAPES = [(3, 5), (3, 2, 6), (3, 2, 4, 4), (3, 2, 2, 4, 4)]


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


class Net(nn.Module):
    """Not linear, bounded, and different at every time."""

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        time = time.reshape(-1, *[1] * (x.ndim - 1)) if time.ndim else time
        return torch.tanh(0.7 * x + 0.3 * torch.cos(time / 150)) + 0.2 * x.flip(-1)


def draw(k: int, shape: tuple[int, ...] = (2, 4)) -> Tensor:
    """The k-th of some numbers that stand for noise, float64, the same wherever they are made."""
    n = torch.Size(shape).numel()
    return 1.4 * torch.sin(torch.arange(1, n + 1, dtype=F64) * (k + 1) * 1.7).reshape(shape)

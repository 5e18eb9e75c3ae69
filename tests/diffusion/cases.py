"""The schedules, predictions and shapes that every test of the mathematics runs over."""

import torch

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

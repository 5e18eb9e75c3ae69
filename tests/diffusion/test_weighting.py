"""Every weighting against its paper's formula, for every prediction: the loss on the output is w / gain, the papers' on
eps, x0, v.
"""

import pytest
import torch
from cases import F64, PREDICTIONS, f64

from ldm.diffusion import schedule, weighting
from ldm.diffusion.prediction import output_gain

LOG_SNR = f64(-6, -2, 0, 1, 5)
ALPHA, SIGMA = LOG_SNR.sigmoid().sqrt(), (-LOG_SNR).sigmoid().sqrt()
SNR = LOG_SNR.exp()

# Squared error of (eps, v, x0, flow) per squared error of x0, at fixed x_t and alpha^2 + sigma^2 = 1.
PER_X0 = {"eps": SNR, "v": SNR + 1, "x0": torch.ones_like(SNR), "flow": (1 + SNR.sqrt()) ** 2}
# The weight that the paper writes on the error it is written for.
PAPER = {
    "eps": (weighting.eps, "eps", torch.ones_like(SNR)),
    "v": (weighting.v, "v", torch.ones_like(SNR)),
    "x0": (weighting.x0, "x0", torch.ones_like(SNR)),
    "flow": (weighting.flow, "flow", torch.ones_like(SNR)),
    "min_snr": (weighting.min_snr, "eps", SNR.clamp(max=5) / SNR),  # Hang et al. 2023, section 3.4
    "min_snr_v": (weighting.min_snr, "v", SNR.clamp(max=5) / (SNR + 1)),
    "soft_min_snr": (weighting.soft_min_snr, "x0", 1 / (1 / SNR + 1 / 5)),
    "p2": (weighting.p2, "eps", 1 / (1 + SNR)),
    "p2_half": (lambda *a: weighting.p2(*a, gamma=0.5, k=2.0), "eps", (2 + SNR) ** -0.5),
}


@pytest.mark.parametrize("pred", PREDICTIONS)
@pytest.mark.parametrize("name", PAPER)
def test_weighting_matches_paper(name, pred):
    weigh, error, want = PAPER[name]
    row = PREDICTIONS[pred].coefficients(ALPHA, SIGMA)
    on_output = weigh(ALPHA, SIGMA, row) / output_gain(row, ALPHA, SIGMA)
    output_per_x0 = PER_X0[pred] if pred != "edm" else (SIGMA**2 + ALPHA**2 / 4) / (SIGMA / 2) ** 2
    assert torch.allclose(on_output * output_per_x0, want * PER_X0[error], rtol=1e-9)


@pytest.mark.parametrize("pred", PREDICTIONS)
def test_output_weighting_is_plain_output_error(pred):
    row = PREDICTIONS[pred].coefficients(ALPHA, SIGMA)
    assert torch.allclose(weighting.output(ALPHA, SIGMA, row) / output_gain(row, ALPHA, SIGMA), torch.ones_like(SNR))


def test_output_weighting_at_log_snr_0_is_2_for_v_and_4_for_flow():
    half = f64(0.5).sqrt()
    weight = {name: float(weighting.output(half, half, p.coefficients(half, half))) for name, p in PREDICTIONS.items()}
    assert weight == pytest.approx({"eps": 1, "x0": 1, "v": 2, "flow": 4, "edm": 5})
    straight = f64(0.5)
    assert weighting.output(straight, straight, PREDICTIONS["flow"].coefficients(straight, straight)) == pytest.approx(
        4
    )


def test_weighting_is_finite_at_zero_signal():
    alpha, sigma = f64(0.0), f64(1.0)
    row = PREDICTIONS["v"].coefficients(alpha, sigma)
    for weigh, want in [(weighting.output, 1), (weighting.v, 1), (weighting.min_snr, 0), (weighting.eps, 0)]:
        assert weigh(alpha, sigma, row) / output_gain(row, alpha, sigma) == want


def test_edm_weighting_matches_table_1():
    sigma = f64(0.002, 0.5, 80)
    lam = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert torch.allclose(weighting.edm(torch.ones_like(sigma), sigma, (sigma, sigma)), lam)


def test_vlb_weighting_matches_ddpm_equation_12():
    table = schedule.linear()
    i = torch.tensor([1, 10, 500, 999])
    alpha, sigma = table.alpha_sigma((i + 1) / 1000)
    bar, before = table.alpha_bar[i], table.alpha_bar[i - 1]
    beta = 1 - bar / before
    tilde = beta * (1 - before) / (1 - bar)
    on_eps = beta**2 / (2 * tilde * (1 - beta) * (1 - bar))
    row = PREDICTIONS["eps"].coefficients(alpha.double(), sigma.double())
    got = (
        weighting.vlb(alpha.double(), sigma.double(), row, table)
        / output_gain(row, alpha.double(), sigma.double())
        / 1000
    )
    assert torch.allclose(got, on_eps, rtol=1e-3)
    first, second = (weighting.vlb(*table.alpha_sigma(torch.tensor(t, dtype=F64)), row, table) for t in (0.001, 0.002))
    assert first == pytest.approx(float(second))

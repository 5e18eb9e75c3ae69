"""Three steps of every distillation by the code and by hand, with a teacher of other weights than the student's."""

from functools import partial

import linear_model as linear
import pytest
import torch
from formulas import draw, expand, x0_of
from linear_model import Inputs
from objectives_by_hand import Result, Setting, evaluate, regression, step_of
from steps_by_hand import CLIP, adamw, assert_steps_equal, micro_batches, train, train_by_hand
from test_diffusion_step import DISTILLATIONS, ERRORS, NOISES, TIMES, denoiser, weigh

from ldm.diffusion import distill
from ldm.ema import PowerEMA
from ldm.training.diffusion import LitDiffusion

SCALE, INTERVAL, SCALES, STEPS, SHARE = 2.5, (0.3, 0.9), (1.5, 4.0), 3, 0.3
TEACHER = "objective.teacher.model."


def guided(s: Setting, weights, batch, x_t, t, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's x0 and eps, unconditional + scale (B,) times (conditional - unconditional).

    Ho & Salimans 2022, eq. 6; no condition is dropped.
    """
    estimates = []
    for drop in (0.0, 1.0):
        cond = linear.condition(s.kind, weights, batch, drop, f"{TEACHER}conditioner.", training=False)
        out = evaluate(s, weights, x_t, t, cond, f"{TEACHER}denoiser.net.")[2]
        estimates.append(x0_of(s.prediction, *s.path.alpha_sigma(t), x_t, out)[0])
    conditional, unconditional = estimates
    x0 = unconditional + expand(scale) * (conditional - unconditional)
    alpha, sigma = map(expand, s.path.alpha_sigma(t))
    return x0, (x_t - alpha * x0) / sigma


def scale_at(t: torch.Tensor) -> torch.Tensor:
    """Return SCALE within INTERVAL and 1 elsewhere."""
    return torch.where((t >= INTERVAL[0]) & (t <= INTERVAL[1]), SCALE, 1.0)


def ddim(s: Setting, weights, batch, x_t, t, later) -> torch.Tensor:
    """Return the teacher's DDIM step from t to `later` (Song et al. 2021a, eq. 12)."""
    x0, eps = guided(s, weights, batch, x_t, t, scale_at(t))
    return s.path.noised(x0, eps, later)


def start(s: Setting, batch, z) -> tuple[torch.Tensor, torch.Tensor]:
    """Return t in 1/STEPS, ..., 1 and x_t, with Gaussian noise in every setting."""
    t = ((draw(torch.rand, linear.SEED, "t", batch["rows"]) * STEPS).floor() + 1) / STEPS
    return t, s.path.noised(z, draw(torch.randn, linear.SEED, "eps", batch["rows"], z.shape[1:]), t)


def match(s: Setting, weights, x_t, t, cond, x0) -> Result:
    alpha, sigma = map(expand, s.path.alpha_sigma(t))
    return regression(s, weights, x_t, t, cond, x0, (x_t - alpha * x0) / sigma)


def progressive(s: Setting, weights, batch, z, cond) -> Result:
    """Salimans & Ho 2022, algorithm 2: the x0 with which one step of the student is two of the teacher."""
    t, x_t = start(s, batch, z)
    middle, end = t - 0.5 / STEPS, t - 1 / STEPS
    x_end = ddim(s, weights, batch, ddim(s, weights, batch, x_t, t, middle), middle, end)
    (alpha, sigma), (alpha_end, sigma_end) = (map(expand, s.path.alpha_sigma(time)) for time in (t, end))
    x0 = (x_end - sigma_end / sigma * x_t) / (alpha_end - sigma_end / sigma * alpha)
    return match(s, weights, x_t, t, cond, x0)


def consistency(s: Setting, weights, batch, z, cond) -> Result:
    """Song et al. 2023, algorithm 2: the student's x0 one step of the teacher nearer to the data; at 0 the state."""
    t, x_t = start(s, batch, z)
    nearer = t - 1 / STEPS
    x_s = ddim(s, weights, batch, x_t, t, nearer)
    at_end = (nearer < 1e-6)[:, None, None, None]
    out = evaluate(s, weights, x_s, nearer, cond)[2]
    estimate = x0_of(s.prediction, *s.path.alpha_sigma(nearer), x_s, out)[0]
    return match(s, weights, x_t, t, cond, torch.where(at_end, x_s, estimate))


def guidance(s: Setting, weights, batch, z, cond) -> Result:
    """Meng et al. 2023, eq. 4: the student reads the scale by which the teacher is guided."""
    t, eps = s.draw_times(batch), s.draw_eps(batch, z)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draw(torch.rand, linear.SEED, "scale", batch["rows"])
    inside = (t >= INTERVAL[0]) & (t <= INTERVAL[1])
    x_t = s.path.noised(z, eps, t)
    x0, eps = guided(s, weights, batch, x_t, t, torch.where(inside, scale, 1.0))
    return regression(s, weights, x_t, t, Inputs(cond.context, cond.vector, scale, cond.tables), x0, eps)


def knowledge(s: Setting, weights, batch, z, cond) -> Result:
    """Hinton et al. 2015: the target is SHARE of the teacher's estimates and the rest of the data and noise."""
    t, eps = s.draw_times(batch), s.draw_eps(batch, z)
    x_t = s.path.noised(z, eps, t)
    x0, eps_of_teacher = guided(s, weights, batch, x_t, t, scale_at(t))
    x0, eps = (1 - SHARE) * z + SHARE * x0, (1 - SHARE) * eps + SHARE * eps_of_teacher
    return regression(s, weights, x_t, t, cond, x0, eps)


# by the names of conf/objective: by the code, by hand
METHODS = {
    "progressive": (
        lambda s, teacher: distill.ProgressiveDistillation(teacher, STEPS, weigh(s), ERRORS[s.error]),
        progressive,
    ),
    "consistency": (
        lambda s, teacher: distill.ConsistencyDistillation(teacher, STEPS, weigh(s), ERRORS[s.error]),
        consistency,
    ),
    "guidance_distillation": (
        lambda s, teacher: distill.GuidanceDistillation(
            teacher, TIMES[s.times], weigh(s), SCALES, ERRORS[s.error], NOISES[s.noise]
        ),
        guidance,
    ),
    "knowledge_distillation": (
        lambda s, teacher: distill.KnowledgeDistillation(
            teacher, TIMES[s.times], weigh(s), SHARE, ERRORS[s.error], NOISES[s.noise]
        ),
        knowledge,
    ),
}


@pytest.mark.parametrize(("precision", "accumulate"), [("64", 1), ("64", 2), ("32", 1)])
@pytest.mark.parametrize(
    "s",
    [
        Setting(drop=0.0),
        Setting("flow", "flow", "flow", "uniform", "huber", "offset", kind="both", drop=0.0),
        Setting("linear", "x0", "min_snr", "discrete", kind="text", drop=0.0),
    ],
    ids=lambda s: s.kind,
)
@pytest.mark.parametrize("name", METHODS)
def test_step_of_every_distillation_matches_hand_computation(name, s, precision, accumulate, tmp_path):
    by_code, by_hand = METHODS[name]
    student = linear.make_model(partial(denoiser, s), s.kind, guided=name == "guidance_distillation")
    teacher = linear.make_model(partial(denoiser, s), s.kind, seed=1)
    lit = LitDiffusion(student, by_code(s, distill.Teacher(teacher, SCALE, INTERVAL)), adamw, s.drop, CLIP, linear.SEED)
    weights, data = linear.double_weights(lit), linear.Rows("image")
    expected = train_by_hand(weights, micro_batches(data, linear.SEED, accumulate), step_of(s, by_hand))
    actual = train(lit, PowerEMA(student, 0.2), data, tmp_path, precision, accumulate)
    assert_steps_equal(actual, expected, precision)
    assert all(torch.equal(p.detach().double(), weights[f"{TEACHER}{n}"]) for n, p in teacher.named_parameters())


def test_unguided_teacher_step_matches_hand_computation(tmp_path, monkeypatch):
    """A teacher of scale 1 is evaluated under the condition alone."""
    monkeypatch.setattr("test_distillation_step.SCALE", 1.0)
    test_step_of_every_distillation_matches_hand_computation("progressive", Setting(drop=0.0), "64", 1, tmp_path)


def test_distillations_are_those_of_conf():
    assert METHODS.keys() == DISTILLATIONS

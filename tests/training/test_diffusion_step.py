"""Three steps of a diffusion training by the code and by hand: losses, gradients, weights, averages and rates."""

from functools import partial
from pathlib import Path

import formulas
import linear_model as linear
import pytest
import torch
from features import alignment, make_repa
from objectives_by_hand import (
    CANDIDATES,
    HUBER,
    PATHS,
    PERTURBATION,
    STRENGTH,
    VLB_WEIGHT,
    Objective,
    Setting,
    balanced,
    denoising,
    hybrid,
    importance_sampled,
    prior_preserving,
    step_of,
    with_perturbed_input,
)
from steps_by_hand import BETAS, CLIP, DECAY, EPS, LR, adamw, assert_steps_equal, micro_batches, train, train_by_hand
from tiny_diffusion import make_convolutions, make_lit

from ldm.diffusion import objective, prediction, schedule, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.input_perturbation import InputPerturbation
from ldm.diffusion.prior_preservation import PriorPreservation
from ldm.ema import PowerEMA
from ldm.training import optimizers
from ldm.training.diffusion import LitDiffusion

CONF = Path(__file__).parents[2] / "conf"
SCHEDULES = {
    "cosine": schedule.cosine,
    "cosine_4000": partial(schedule.cosine, 4000),
    "cosine_2": partial(schedule.cosine, 2),
    "cosine_3": partial(schedule.cosine, 3),
    "linear": schedule.linear,
    "scaled_linear": schedule.scaled_linear,
    "sigmoid": schedule.sigmoid,
    "sigmoid_beta": schedule.sigmoid_beta,
    "sqrt": schedule.sqrt,
    "shifted": lambda: schedule.shifted(schedule.cosine(), 2.0),
    "zero_terminal_snr": lambda: schedule.zero_terminal_snr(schedule.scaled_linear()),
    "vp": schedule.VP,
    "gvp": schedule.GVP,
    "edm": schedule.EDM,
    "pde_refiner": schedule.pde_refiner,
    "regression": partial(schedule.pde_refiner, 0),
    "flow": schedule.Flow,
    "flow_3": partial(schedule.Flow, 3.0),
    "flow_at": partial(schedule.flow_at, 8),
}
PREDICTIONS = {
    "eps": prediction.Eps(),
    "x0": prediction.X0(),
    "v": prediction.V(),
    "flow": prediction.Flow(),
    "edm": prediction.EDM(formulas.SIGMA_DATA),
    "regression": prediction.Regression(),
}
WEIGHTINGS = {
    "output": weighting.output,
    "eps": weighting.eps,
    "x0": weighting.x0,
    "v": weighting.v,
    "flow": weighting.flow,
    "edm": partial(weighting.edm, sigma_data=formulas.SIGMA_DATA),
    "min_snr": partial(weighting.min_snr, gamma=formulas.GAMMA),
    "soft_min_snr": partial(weighting.soft_min_snr, gamma=formulas.GAMMA),
    "debiased": weighting.debiased,
    "p2": partial(weighting.p2, gamma=formulas.P2_GAMMA, k=formulas.P2_K),
}
DENSITIES = {
    "discrete": times.discrete,
    "uniform": times.uniform,
    "log_normal": partial(times.log_normal, mean=formulas.LOG_MEAN, std=formulas.LOG_STD),
    "logit_normal": partial(
        times.logit_normal, mean=formulas.LOGIT_MEAN, std=formulas.LOGIT_STD, shift=formulas.LOGIT_SHIFT
    ),
}
TIMES = {
    **{name: partial(times.independent, density=density) for name, density in DENSITIES.items()},
    "stratified": partial(times.stratified, density=times.discrete),
    "stratified_uniform": partial(times.stratified, density=times.uniform),
}
ERRORS = {"l2": objective.l2, "l1": objective.l1, "huber": partial(objective.huber, delta=HUBER)}
NOISES = {
    "gaussian": objective.gaussian,
    "offset": partial(objective.offset, strength=STRENGTH),
    "nearest": partial(objective.nearest, candidates=CANDIDATES),
}
PATHS |= {f"cosine_{T}": formulas.of_function(formulas.cosine_function, T) for T in (2, 3)}


def denoiser(s: Setting, net) -> Denoiser:
    return Denoiser(net, SCHEDULES[s.schedule](), PREDICTIONS[s.prediction])


def weigh(s: Setting):
    return WEIGHTINGS[s.weighting] if s.weighting != "vlb" else partial(weighting.vlb, schedule=SCHEDULES[s.schedule]())


def plain(s: Setting, **options) -> objective.Objective:
    return objective.Objective(TIMES[s.times], weigh(s), ERRORS[s.error], NOISES[s.noise], **options)


def compare_steps(
    s: Setting, by_code, by_hand: Objective, folder, precision, accumulate, *, data=None, start=0, outputs=1, **options
):
    """Train the linear model by the code and by hand, and compare every step.

    options: clip, build (an optimizer), its eps and is_decayed.
    """
    model = linear.make_model(partial(denoiser, s), s.kind, outputs=outputs * linear.CHANNELS)
    clip, build = options.get("clip", CLIP), options.get("build", adamw)
    lit = LitDiffusion(model, by_code(s), build, s.drop, clip, linear.SEED)
    weights, data, average = linear.double_weights(lit), data or linear.Rows("image"), PowerEMA(model, 0.2)
    expected = train_by_hand(
        weights,
        micro_batches(data, linear.SEED, accumulate, start),
        step_of(s, by_hand),
        clip,
        start,
        options.get("is_decayed", lambda value: True),
        options.get("eps", EPS),
    )
    actual = train(lit, average, data, folder, precision, accumulate, start)
    assert_steps_equal(actual, expected, precision)
    assert all(torch.equal(p.detach().double(), weights[n]) for n, p in lit.named_parameters() if not p.requires_grad)
    return expected


BOTH = pytest.mark.parametrize(("precision", "accumulate"), [("64", 2), ("32", 1)])


@BOTH
@pytest.mark.parametrize("kind", ["label", "text", "both"])
def test_denoising_step_matches_hand_computation(kind, precision, accumulate, tmp_path):
    steps = compare_steps(Setting(kind=kind), plain, denoising, tmp_path, precision, accumulate)
    assert all(step.norm > CLIP for step in steps)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_of_images_matches_hand_computation(accumulate, tmp_path):
    """A batch without moments is encoded; the training goes on from step 1, with label -1 and no dropout."""
    s = Setting(drop=0.0, times="stratified_uniform", schedule="flow", prediction="flow", weighting="flow")
    compare_steps(s, plain, denoising, tmp_path, "64", accumulate, data=linear.Rows("moments"), start=1)


@BOTH
@pytest.mark.parametrize("clip", [None, 1e6])
def test_step_without_clipping_matches_hand_computation(clip, precision, accumulate, tmp_path):
    steps = compare_steps(Setting(drop=1.0), plain, denoising, tmp_path, precision, accumulate, clip=clip)
    assert all(step.gradients[f"{linear.NET}clock"].equal(step.clipped[f"{linear.NET}clock"]) for step in steps)


def test_step_with_decay_of_matrices_only_matches_hand_computation(tmp_path):
    build = partial(optimizers.adamw, lr=LR, betas=BETAS, weight_decay=DECAY)
    options = {"build": build, "is_decayed": lambda value: value.ndim > 1, "eps": 1e-8}
    compare_steps(Setting(), plain, denoising, tmp_path, "64", 1, **options)


COMBINATIONS = [
    Setting("linear", "eps", "eps", "discrete"),
    Setting("scaled_linear", "v", "min_snr", "stratified"),
    Setting("cosine_4000", "eps", "soft_min_snr", "discrete"),
    Setting("sigmoid", "x0", "x0", "stratified_uniform"),
    Setting("sigmoid_beta", "flow", "p2", "uniform"),
    Setting("sqrt", "eps", "output", "logit_normal"),
    Setting("shifted", "edm", "eps", "stratified"),
    Setting("zero_terminal_snr", "v", "vlb", "discrete"),
    Setting("vp", "x0", "v", "uniform"),
    Setting("gvp", "flow", "output", "stratified_uniform"),
    Setting("edm", "edm", "edm", "log_normal"),
    Setting("flow", "v", "flow", "uniform"),
    Setting("flow_3", "flow", "flow", "logit_normal"),
    Setting("flow_at", "x0", "min_snr", "logit_normal"),
    Setting("cosine", "v", "v", "stratified"),
    Setting("pde_refiner", "v", "debiased", "discrete"),
    Setting("regression", "regression", "x0", "discrete"),
]


@BOTH
@pytest.mark.parametrize("s", COMBINATIONS, ids=lambda s: s.schedule)
def test_step_of_every_process_matches_hand_computation(s, precision, accumulate, tmp_path):
    compare_steps(s, plain, denoising, tmp_path, precision, accumulate)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("schedule", "schedule"),
        ("prediction", "prediction"),
        ("weighting", "weighting"),
        ("timestep_sampling", "times"),
    ],
)
def test_combinations_have_every_option(group, name):
    assert {getattr(s, name) for s in COMBINATIONS} == {file.stem for file in (CONF / group).glob("*.yaml")}


VLB = Setting("cosine_2", "eps", drop=0.3)  # two entries: the second and third step are importance-sampled
# by the names of conf/objective: setting, objective by the code, by hand, outputs for each channel
OBJECTIVES = {
    "denoising": (Setting(), plain, lambda: denoising, 1),
    "l1": (Setting(error="l1"), plain, lambda: denoising, 1),
    "huber": (Setting(error="huber"), plain, lambda: denoising, 1),
    "offset_noise": (Setting(noise="offset"), plain, lambda: denoising, 1),
    "immiscible": (Setting(noise="nearest"), plain, lambda: denoising, 1),
    "input_perturbation": (
        Setting(),
        lambda s: InputPerturbation(plain(s), PERTURBATION),
        lambda: with_perturbed_input,
        1,
    ),
    "hybrid": (Setting("linear", "eps", "eps", "discrete"), partial(plain, vlb=VLB_WEIGHT), lambda: hybrid, 2),
    "vlb": (
        VLB,
        lambda s: objective.LossSecondMoment(
            objective.VLBObjective(TIMES["discrete"]), T=s.path.steps, history=1, floor=0.1
        ),
        lambda: importance_sampled(history=1, floor=0.1),
        2,
    ),
    "log_variance": (Setting(), lambda s: objective.LogVariance(plain(s), 5, 0.5), lambda: balanced(5), 1),
    "dreambooth": (
        Setting(),
        lambda s: PriorPreservation(plain(s), 0, 0.6),
        lambda: prior_preserving(0, 0.6),
        1,
    ),
    "repa": (Setting(), lambda s: make_repa(plain(s)), lambda: alignment, 1),
}
DISTILLATIONS = {"progressive", "consistency", "guidance_distillation", "knowledge_distillation"}


@pytest.mark.parametrize(("precision", "accumulate"), [("64", 1), ("64", 2), ("32", 1)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_step_of_every_objective_matches_hand_computation(name, precision, accumulate, tmp_path):
    s, by_code, by_hand, outputs = OBJECTIVES[name]
    data = linear.Rows() if name == "repa" else None
    compare_steps(s, by_code, by_hand(), tmp_path, precision, accumulate, data=data, outputs=outputs)


def test_hybrid_and_vlb_steps_reach_first_entry(tmp_path):
    """At t = 1/T the bound's term is the decoder's."""
    s = Setting("cosine_3", "eps", "eps", "stratified")
    for by_code, by_hand in ((partial(plain, vlb=VLB_WEIGHT), hybrid), (OBJECTIVES["vlb"][1], OBJECTIVES["vlb"][2]())):
        compare_steps(s, by_code, by_hand, tmp_path, "64", 1, outputs=2)


def test_frozen_parameters_are_not_in_the_optimizer():
    lit = make_lit(make_convolutions())
    frozen, *others = lit.parameters()
    frozen.requires_grad_(False)
    inside = [p for group in lit.configure_optimizers().param_groups for p in group["params"]]
    assert list(map(id, inside)) == list(map(id, others))


def test_objectives_are_those_of_conf():
    names = {file.stem for file in (CONF / "objective").glob("*.yaml") if not file.stem.startswith("_")}
    assert names == OBJECTIVES.keys() | DISTILLATIONS

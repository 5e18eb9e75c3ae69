"""The interface of a recipe: every option of training= has it, and a person's own class without it is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from smoke import composed

from ldm.config.build import to_container
from ldm.config.compose import compose_option
from ldm.config.trust import check_target
from ldm.config.validate import validate
from ldm.errors import UserError
from ldm.recipes.pretrained_autoencoder import PretrainedAutoencoderRecipe
from ldm.recipes.recipe import METHODS, build_recipe, recipe_class
from ldm.recipes.status import job_status
from ldm.sampling.classifier_guidance import CLASSIFIER_RECIPE

CONF = Path(__file__).parents[2] / "conf" / "training"
OPTIONS = sorted(file.stem for file in CONF.glob("[!_]*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_training_option_lists_every_recipe_option(option):
    node = OmegaConf.to_container(compose_option("training", option), resolve=False)
    recipe = recipe_class(node)
    fields = {field.name for field in dataclasses.fields(recipe)}
    assert fields == node.keys() - {"_target_"}, "each option is a field of the class, and stands in the file"
    check_target(node["_target_"])


@pytest.mark.parametrize("option", OPTIONS)
def test_recipe_status_needs_no_instance(option, monkeypatch, tmp_path):
    """Neither networks nor losses are built: LPIPS would fetch its weights."""
    monkeypatch.setattr("ldm.runs.cache.current_choices", dict)
    monkeypatch.setattr("ldm.recipes.recipe.instantiate", lambda *_, **__: pytest.fail("a recipe is built"))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    status = job_status(composed(f"training={option}", "metrics=none", "autoencoder=identity"))
    assert (status.metrics, status.steps_done, dict(status.missing_dependencies)) == (None, 0, {})


def test_recipe_status_lists_missing_dependencies(monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.runs.cache.current_choices", dict)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    cfg = composed("training=diffusion")
    names = [folder.parent.name for folder in job_status(cfg).missing_dependencies]
    assert sorted(names) == ["evaluator", "first_stage"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond_drop_prob": "much"}, "training.cond_drop_prob=much: .* expects float"),
        ({"lr_schedule": None}, "training.lr_schedule=null: .* expects Callable"),
        ({"stepz": 3}, "takes no 'stepz'; did you mean 'steps'"),
    ],
)
def test_recipe_option_is_validated_by_name_and_type(change, message):
    config = to_container(composed())
    with pytest.raises(UserError, match=message):
        validate({**config, "training": {**config["training"], **change}})


def test_recipe_missing_option_is_named():
    config = to_container(composed())
    del config["training"]["steps"]
    with pytest.raises(UserError, match="DiffusionRecipe also needs steps"):
        validate(config)


OWN = """
class Whole:
    def __init__(self, steps=1): self.steps = steps
    @staticmethod
    def run_dir(cfg): return cfg
    @staticmethod
    def dependencies(cfg): return []
    def train(self, cfg): return self.steps

class WithoutStatus:
    def train(self, cfg): return 1.0

class NotStatic(Whole):
    def run_dir(self, cfg): return cfg

def train(cfg): return 1.0
"""


@pytest.mark.parametrize(
    ("name", "missing"),
    [("WithoutStatus", "run_dir, dependencies"), ("NotStatic", "run_dir"), ("train", ", ".join(METHODS))],
)
def test_user_recipe_without_methods_is_refused(name, missing, tmp_path, monkeypatch):
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": f"own_recipes.{name}"}
    for function in (recipe_class, build_recipe):
        with pytest.raises(
            UserError, match=rf"training._target_=own_recipes.{name}: .*; {missing} missing or not static"
        ):
            function(node)


def test_user_recipe_with_methods_is_built(tmp_path, monkeypatch):
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert build_recipe({"_target_": "own_recipes.Whole", "steps": 3}).train({}) == 3


def test_optimizer_options_of_recipe_are_plain(tmp_path, monkeypatch):
    """Rprop keeps its option as it gets it, as AdamW does in torch 2.9; a checkpoint is read with weights_only."""
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    optimizer = {"_target_": "torch.optim.Rprop", "_partial_": True, "etas": [0.5, 1.25]}
    node = OmegaConf.create({"_target_": "own_recipes.Whole", "steps": optimizer})
    state = build_recipe(node).train({})([torch.ones(2, requires_grad=True)]).state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]["etas"] == [0.5, 1.25]


def test_recipe_names_equal_class_names():
    assert OmegaConf.load(CONF / "classifier.yaml")._target_ == CLASSIFIER_RECIPE
    assert get_object(CLASSIFIER_RECIPE).__name__ == "ClassifierRecipe"
    assert recipe_class({"_target_": "ldm.recipes.pretrained_autoencoder.PretrainedAutoencoderRecipe"}) is (
        PretrainedAutoencoderRecipe
    )

"""Methods besides forward in which FSDP gathers a module's parameters."""

from ldm.diffusion import objective
from ldm.training.sharded import FSDP_METHODS


def test_fsdp_methods_include_what_objectives_call_besides_forward():
    """`loss_at` is called from outside an objective too, by wrappers that draw the times themselves."""
    for cls in (objective.Objective, objective.VLBObjective, objective.LogVariance):
        assert set(FSDP_METHODS) & vars(cls).keys(), cls.__name__

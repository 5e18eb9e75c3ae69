"""The slots of a config (net, conditioner, sampler, ...): what code passes to the function or class that each names.

A constructor gets what its signature names, whichever class it is of, so that a class of another package is used as
one of ldm is. Which values there are is decided by the node's path in the config alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """What code passes to the node at one path of a config.

    supplied: names of values for its constructor and for those nested in it; each gets those that its signature names.
    required: names of values for its constructor, whose signature must have them.
    arguments, keywords: what a `_partial_` node is called with, by position and by name.
    """

    supplied: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    @property
    def construction(self) -> str:
        """The required names of the constructor as text: (split=...)."""
        return f"({', '.join(f'{name}=...' for name in self.required)})"

    @property
    def call(self) -> str:
        """The call of a `_partial_` node as text: (denoiser, cond, uncond, scale=...)."""
        return f"({', '.join([*self.arguments, *(f'{name}=...' for name in self.keywords)])})"


NETWORK = ("in_channels", "out_channels", "context_dim", "vector_dim", "concat_channels")
RECIPE = "(training|first_stage|evaluator)"

SLOTS: Mapping[str, Slot] = {  # a pattern of a node's dotted path -> what is passed to it
    "auto": Slot(arguments=("cfg",)),
    "autoencoder": Slot(supplied=("channels",)),
    "conditioner": Slot(supplied=("num_classes", "image_channels", "factor", "z_channels", "encode")),
    "data": Slot(required=("split",)),
    "degradation": Slot(arguments=("data",)),
    "guidance": Slot(arguments=("denoiser", "cond", "uncond"), keywords=("scale",)),
    r"metrics\.metrics\.\w+": Slot(arguments=("net", "reference")),
    "net": Slot(supplied=NETWORK),
    r"net\.net": Slot(supplied=NETWORK, keywords=NETWORK),  # a network that GuidanceEmbedding builds
    "sampler": Slot(arguments=("denoise", "schedule", "x", "ts", "noise")),
    "task": Slot(arguments=("model", "batch", "noise", "ts")),
    "timestep_sampling": Slot(arguments=("noise", "x0", "schedule")),
    "timestep_spacing": Slot(arguments=("schedule", "steps")),
    "weighting": Slot(arguments=("alpha", "sigma", "row")),
    rf"{RECIPE}\.ema": Slot(arguments=("module",)),
    rf"{RECIPE}\.lr_schedule": Slot(arguments=("step", "steps")),
    rf"{RECIPE}\.optimizer": Slot(arguments=("params",)),
}


def slot_of(path: str) -> Slot:
    """Return what is passed to the node at a dotted path; one nested in a slot gets what is supplied to the slot."""
    matching = (slot for pattern, slot in SLOTS.items() if re.fullmatch(pattern, path))
    top = SLOTS.get(re.split(r"[.\[]", path)[0], Slot())
    return next(matching, Slot(supplied=top.supplied))

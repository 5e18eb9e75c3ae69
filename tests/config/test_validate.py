"""The strict check of configs, by source alone."""

import sys
import textwrap

import pytest

from ldm.config.signatures import read_signature, resolve_definition
from ldm.config.validate import check_target_allowed, validate
from ldm.errors import UserError

MODULE = """
from dataclasses import dataclass, field
from collections.abc import Callable, Sequence
from elsewhere import Shape
from typing import Any, ClassVar, Literal, NamedTuple, Optional, Union
import raised_if_imported
from sample_pkg.other import elsewhere
Pair = tuple[float, float]

def solve(
    x, y, eta: float = 0.0, steps: int = 3, kind: Literal["a", "b"] = "a", *,
    interval: Pair = (0, 1), note: "str | None" = None
): ...
def anything(x: int, **options): ...

class Net:
    def __init__(
        self, width: int, mult: Sequence[int] = (1,), sizes: list[float] | None = None, on: bool = False,
        act: Any = None
    ): ...
    @classmethod
    def small(cls, width: int): ...

class Child(Net):
    def forward(self): ...

class Shaped:
    def __init__(self, made: Shape = 1, call: Callable[[int], int] = abs, rest: Any = 1): ...

@dataclass(frozen=True)
class Schedule:
    name: ClassVar[str] = "s"
    beta: float
    T: int = 1000
    table: list = field(default_factory=list)
    hidden: int = field(init=False, default=0)

@dataclass
class Zero(Schedule):
    shift: Optional[float] = None
    either: Union[int, str] = 1

class Protocol(NamedTuple):
    num: int
    steps: int = 5

class Sized:
    def __init__(
        self, in_channels, out_channels, depth, inner=None, context_dim=None, vector_dim=None, concat_channels=0
    ):
        ...

class Forwarding(Sized):
    def __init__(self, depth, **sizes):
        super().__init__(depth=depth, **sizes)

class Narrow(Sized):
    def __init__(self, *rest, width=1, **sizes):
        Sized.__init__(self, 4, depth=width, **sizes)

class Loose(Sized):
    def __init__(self, width, **options):
        super().__init__(1, 1, width)

class Coder:
    def __init__(self, channels): ...

class Classes:
    def __init__(self, num_classes): ...

class Images:
    def __init__(self, split, size=8): ...

class Metric:
    def __init__(self, net, reference): ...

def sampler(denoise, schedule, x, ts, noise, eta=0.0): ...
def any_sampler(*arguments): ...
def rich_sampler(denoise, schedule, x, ts, noise, eta): ...
def make_sampler(): ...
def guidance(denoiser, cond, uncond, scale=1.0): ...
def unscaled(denoiser, cond, uncond): ...
def rate(step, steps, end): ...
def unit(step): ...
"""
RELATIVE = """
from . import one as first
from .one import Sized as Renamed
from .. import nothing
import sample_pkg.one
import sample_pkg.one as third

class Inner(first.Sized): ...
class Outer(sample_pkg.one.Sized): ...
class Third(third.Sized): ...
class Last(Renamed): ...
"""


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "sample_pkg").mkdir()
    (folder / "sample_pkg" / "__init__.py").write_text("")
    (folder / "sample_pkg" / "one.py").write_text(textwrap.dedent(MODULE))
    (folder / "sample_pkg" / "other.py").write_text("def elsewhere(depth: int = 1): ...")
    (folder / "sample_pkg" / "relative.py").write_text(RELATIVE)
    for name in ORDINARY:
        (folder / "sample_pkg" / f"{name}.py").write_text(DANGEROUS)
    (folder / "ops.py").write_text("class Net: ...")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def node(target, partial=False, **values):
    return {"node": {"_target_": f"sample_pkg.one.{target}", **({"_partial_": True} if partial else {}), **values}}


FINE = [
    node("solve", x=1, y=2, eta=1, steps=4, kind="b", interval=[0, 0.5], note="why"),
    node("solve", partial=True, note=None),
    node("anything", x=1, other=2),
    node("Net", width=8, mult=[1, 2], sizes=[1, 2.5], act={"_target_": "sample_pkg.one.anything", "_partial_": True}),
    node("Net", width=8, sizes=None),
    node("Net.small", width=8),
    node("Child", width=8),
    node("Shaped", rest=None),
    node("Schedule", beta=1, table=[1]),
    node("Zero", beta=0.5, shift=None, either="x"),
    node("Protocol", num=5),
    node("elsewhere", depth=2),
    {
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "_partial_": True,
            "lr": 1e-3,
            "betas": [0.9, 0.99],
            "fused": None,
        }
    },
    {"plain": {"seed": 0}, "list": [node("Protocol", num=1)]},
]


@pytest.mark.parametrize("config", FINE)
def test_validate_accepts_valid_config(config):
    validate(config)
    assert "sample_pkg.one" not in sys.modules


WRONG = [
    (node("solve", partial=True, etta=1), "node.etta=1: sample_pkg.one.solve takes no 'etta'; did you mean 'eta'?"),
    (node("solve", x=1), "node: sample_pkg.one.solve also needs y"),
    (node("solve", partial=True, steps=1.5), "node.steps=1.5: sample_pkg.one.solve expects int"),
    (node("solve", partial=True, steps=True), "node.steps=true: sample_pkg.one.solve expects int"),
    (node("solve", partial=True, eta="high"), "node.eta=high: sample_pkg.one.solve expects float"),
    (node("solve", partial=True, kind="c"), "expects Literal['a', 'b']"),
    (node("solve", partial=True, interval=[0, 0.5, 1]), "node.interval=[0,0.5,1]: sample_pkg.one.solve expects Pair"),
    (node("solve", partial=True, interval=0.5), "node.interval=0.5"),
    (node("solve", partial=True, note=3), "expects 'str | None'"),
    (node("Net", width=8, mult=["x"]), "node.mult=[x]: sample_pkg.one.Net expects Sequence[int]"),
    (node("Net", width=8, sizes=[None]), "node.sizes=[null]"),
    (node("Net", width=8, on=1), "expects bool"),
    (node("Net", width=None), "node.width=null"),
    (node("Shaped", made=None), "node.made=null: sample_pkg.one.Shaped expects Shape"),
    (node("Shaped", call=None), "node.call=null: sample_pkg.one.Shaped expects Callable[[int], int]"),
    (node("Net.small", width="8"), "expects int"),
    (node("Child"), "also needs width"),
    (node("Schedule", beta=1, hidden=1), "takes no 'hidden'"),
    (node("Schedule", beta=1, name="x"), "takes no 'name'"),
    (node("Zero", shift=1.0), "also needs beta"),
    (node("Zero", beta=1, either=1.5), "expects Union[int, str]"),
    (node("Protocol"), "also needs num"),
    (node("elsewhere", depth="a"), "expects int"),
    (
        {"o": {"_target_": "torch.optim.AdamW", "_partial_": True, "lrr": 1}},
        "o.lrr=1: torch.optim.AdamW takes no 'lrr'; did you mean 'lr'?",
    ),
    (
        {"o": {"_target_": "torch.optim.AdamW", "_partial_": True, "betas": [1, 2, 3]}},
        "o.betas=[1,2,3]: torch.optim.AdamW expects tuple[",
    ),
    ({"a": {"b": [node("Protocol")]}}, "a.b[0].node: sample_pkg.one.Protocol also needs num"),
    ({"s": {"_target_": "ldm.diffusion.schedule.cosin"}}, "has no 'cosin'; did you mean 'cosine'?"),
    (
        {"s": {"_target_": "ldm.diffusion.schedul.Cosine"}},
        "s._target_=ldm.diffusion.schedul.Cosine: no such module in ldm",
    ),
]


@pytest.mark.parametrize(("config", "said"), WRONG)
def test_validate_reports_invalid_config_in_one_line(config, said):
    with pytest.raises(UserError) as caught:
        validate(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def at(path, target, partial=False, **values):
    """A config with one node, at a dotted path."""
    config = node(target, partial, **values)["node"]
    for name in reversed(path.split(".")):
        config = {name: config}
    return config


SUPPLIED = [
    at("net", "Sized", depth=1),
    at("net", "Forwarding", depth=1),
    at("net", "Sized", depth=1, inner=node("Sized", depth=2)["node"]),
    at("net.net", "Sized", partial=True, depth=1),
    at("autoencoder.encoder", "Coder"),
    at("autoencoder.encoder", "Coder", channels=64),
    at("conditioner.label", "Classes"),
    at("conditioner", "Classes", num_classes=3),
    at("data", "Images"),
    at("sampler", "sampler", partial=True),
    at("sampler", "sampler", partial=True, eta=0.5),
    at("sampler", "any_sampler", partial=True),
    at("sampler", "make_sampler"),
    at("guidance", "guidance", partial=True),
    at("training.lr_schedule", "rate", partial=True, end=0.1),
    at("metrics.metrics.mine", "Metric", partial=True),
    at("other", "sampler", partial=True),  # nothing is known of its call
]


@pytest.mark.parametrize("config", SUPPLIED)
def test_validate_accepts_what_code_passes(config):
    validate(config)


UNSUPPLIED = [
    (at("net", "Sized"), "net: sample_pkg.one.Sized also needs depth"),
    (at("net.block", "Sized", partial=True, depth=1), None),  # its caller passes the rest
    (at("other", "Sized", depth=1), "other: sample_pkg.one.Sized also needs in_channels, out_channels"),
    (at("objective.net", "Sized", depth=1), "also needs in_channels"),
    (at("autoencoder.encoder", "Classes"), "autoencoder.encoder: sample_pkg.one.Classes also needs num_classes"),
    (
        at("net.net", "Coder", partial=True),
        "Coder takes no 'in_channels', and it is called with (in_channels=..., out_ch",
    ),
    (at("data", "Coder", channels=1), "data: sample_pkg.one.Coder takes no 'split', and it is built with (split=...)"),
    (at("sampler", "rate", partial=True), "rate takes 3 positional arguments, and it is called with (denoise, sched"),
    (at("sampler", "rich_sampler", partial=True), "sampler: sample_pkg.one.rich_sampler also needs eta"),
    (
        at("guidance", "unscaled", partial=True),
        "guidance: sample_pkg.one.unscaled takes no 'scale', and it is called with (denoiser, cond, uncond, scale=...)",
    ),
    (at("evaluator.lr_schedule", "unit", partial=True), "unit takes 1 positional argument, and it is called with (st"),
    (at("metrics.metrics.mine", "Classes", partial=True), "Classes takes 1 positional argument"),
]


@pytest.mark.parametrize(("config", "message"), UNSUPPLIED)
def test_validate_names_what_nobody_passes(config, message):
    if message is None:
        validate(config)
        return
    with pytest.raises(UserError) as caught:
        validate(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ORDINARY = ("ops", "load", "open", "classes", "package", "compile", "hub", "jit", "system", "exec", "pickle")
DANGEROUS = """
import os
import shutil as files
from torch import load
from torch.hub import *
from subprocess import run
from sample_pkg.one import Net

class MyNet:
    @classmethod
    def load(cls): ...

def system(): ...
"""


@pytest.mark.parametrize("module", ORDINARY)
def test_check_target_allowed_accepts_user_modules_of_any_name(module):
    for name in ("MyNet", "MyNet.load", "system", "Net"):
        check_target_allowed(f"sample_pkg.{module}.{name}")
        validate({"node": {"_target_": f"sample_pkg.{module}.{name}", **({"width": 1} if name == "Net" else {})}})
    check_target_allowed("ops.Net")


@pytest.mark.parametrize("name", ["os.system", "files.rmtree", "load", "run", "os.path.exists"])
def test_check_target_allowed_judges_an_import_as_what_it_is(name):
    with pytest.raises(UserError, match=rf"node\._target_=sample_pkg\.ops\.{name} is refused"):
        check_target_allowed(f"sample_pkg.ops.{name}", "node")


@pytest.mark.parametrize("name", ["Inner", "Outer", "Third", "Last", "Renamed", "first.Sized"])
def test_read_signature_follows_relative_and_module_imports(name):
    assert read_signature(f"sample_pkg.relative.{name}") == read_signature("sample_pkg.one.Sized")
    assert resolve_definition("sample_pkg.relative.Renamed") == "sample_pkg.one.Sized"


def test_read_signature_follows_keywords_to_the_base():
    sized = read_signature("sample_pkg.one.Sized").parameters
    forwarding = read_signature("sample_pkg.one.Forwarding")
    assert forwarding.parameters.keys() == sized.keys()
    assert not forwarding.accepts_any
    narrow = read_signature("sample_pkg.one.Narrow")
    assert narrow.parameters.keys() == sized.keys() - {"in_channels", "depth"} | {"width"}
    assert narrow.parameters["out_channels"].required
    assert narrow.variadic
    loose = read_signature("sample_pkg.one.Loose")  # does not pass its keywords on
    assert loose.parameters.keys() == {"width"}
    assert loose.accepts_any


REFUSED = [
    *(
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "shutil.rmtree",
        "importlib.import_module",
        "pickle.loads",
        "functools.partial",
    ),
    *(
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.utils.cpp_extension.load",
        "lightning.os.system",
        "hydra.utils.get_method",
    ),
    *(
        "ldm.io.download.fetch",
        "ldm.io.atomic.remove_stale_temporaries",
        "ldm.launch.process.run_in_subprocess",
        "ldm.tensors.torch.load",
        "open",
        "os",
        3,
        None,
        "a..b",
        "a b.c",
    ),
    *("no_such_package.thing", "ldm.net.unet.os.system"),
]


@pytest.mark.parametrize("target", REFUSED)
def test_validate_refuses_dangerous_targets(target):
    with pytest.raises(UserError, match="_target_"):
        validate({"node": {"_target_": target, "_partial_": True}})


def test_check_target_allowed_accepts_model_parts():
    for target in (
        "ldm.net.unet.UNet",
        "torch.optim.AdamW",
        "torch.nn.Linear",
        "sample_pkg.one.Net",
        "lightning.pytorch.callbacks.EarlyStopping",
    ):
        check_target_allowed(target)


KINDS = {
    "seed": 0,
    "lr": 1e-3,
    "name": "x",
    "on": True,
    "sizes": [1, 2],
    "free": None,
    "devices": "auto",
    "same": "${seed}",
    "node": {"a": 1},
    "made": {"_target_": "torch.nn.Identity", "_partial_": True},
    "again": {"made": "${made}"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"lr": 1},
        {"sizes": []},
        {"sizes": [5]},
        {"free": "any"},
        {"devices": 2},
        {"same": 0},
        {"again": {"made": None}},
    ],
)
def test_validate_accepts_values_of_default_type(change):
    validate({**KINDS, "same": 0, "again": {"made": KINDS["made"]}, **change}, KINDS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1.5}, "seed=1.5: expected a whole number, as in seed=0"),
        ({"seed": None}, "seed=null: expected a whole number"),
        ({"seed": True}, "expected a whole number"),
        ({"lr": "fast"}, "lr=fast: expected a number, as in lr=0.001"),
        ({"name": 3}, "name=3: expected text"),
        ({"on": 1}, "on=1: expected true or false"),
        ({"sizes": 3}, "sizes=3: expected a list"),
        ({"sizes": ["a"]}, "sizes=[a]: expected a list"),
        ({"node": 3}, "node=3: expected a node"),
        ({"node": {"a": "x"}}, "node.a=x: expected a whole number"),
        ({"again": {"made": -0.5}}, "again.made=-0.5: expected a node"),
        ({"made": {"_partial_": True}}, "made: a node needs its _target_, as in made._target_=torch.nn.Identity"),
        ({"made": {**KINDS["made"], "_partial_": 3}}, "made._partial_=3: expected true or false"),
        ({"made": {**KINDS["made"], "_args_": "x"}}, "made._args_=x: expected a list"),
        ({"node": None}, "node=null: the command needs this node"),
    ],
)
def test_validate_rejects_values_of_other_type(change, said):
    with pytest.raises(UserError) as caught:
        validate({**KINDS, "same": 0, "again": {"made": KINDS["made"]}, **change}, KINDS)
    assert said in str(caught.value)


def test_validate_requires_keys_of_command():
    with pytest.raises(UserError, match="~seed: the command needs this key"):
        validate({key: 0 if key == "same" else value for key, value in KINDS.items() if key != "seed"}, KINDS)


def test_validate_uses_signature_beyond_default():
    base = node("solve", partial=True, note=None, eta=0.0)
    validate(node("solve", partial=True, note="x", eta=0.5), base)
    base = {"o": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}}
    with pytest.raises(UserError, match=r"o\.lr=abc: expected a number"):
        validate({"o": {**base["o"], "lr": "abc"}}, base)


def test_read_signature_matches_inspect():
    import inspect

    from ldm.checkpoint.step import save_checkpoint
    from ldm.net.unet import UNet

    for target, there in (("ldm.net.unet.UNet", UNet), ("ldm.checkpoint.step.save_checkpoint", save_checkpoint)):
        ours = read_signature(target).parameters
        theirs = inspect.signature(there).parameters
        assert {name: one.required for name, one in ours.items()} == {
            name: one.default is one.empty for name, one in theirs.items()
        }


def test_missing_package_says_where_to_look():
    with pytest.raises(
        UserError, match="'nobodys' is not installed; if it is your own, PYTHONPATH must name the folder"
    ):
        check_target_allowed("nobodys.net.Net", "net")

"""The protocol of a score: what is said of it, that a train run and sample.py say it alike, and that what differs is
named.
"""

import json

import pytest
from smoke import command, here

from ldm.evaluation import protocol
from ldm.report.collect import infer_protocol


def test_describe_node_is_short():
    ddim = {"_target_": "ldm.diffusion.sampler.ddim", "_partial_": True, "eta": 0.0}
    assert protocol.describe_node(ddim) == "ddim(eta=0)"
    inner = {
        "_target_": "a.b.guided",
        "guidance": {"_target_": "a.cfg", "scale": 3.0, "interval": [0, 1.0]},
        "weak": "/runs/a-1-s0",
        "size": None,
    }
    assert protocol.describe_node(inner) == "guided(guidance=cfg(interval=[0, 1]), weak=a-1-s0)"
    assert protocol.describe_node({"interval": [0.0, 1]}) == protocol.describe_node({"interval": [0, 1.0]})


def test_protocol_hash_and_difference():
    one, other = (
        protocol.with_protocol_hash({"n": 5000, "grid": "leading"}),
        protocol.with_protocol_hash({"n": 5000, "grid": "trailing"}),
    )
    assert one["protocol"] != other["protocol"]
    assert protocol.with_protocol_hash({"grid": "leading", "n": 5000}) == one
    assert protocol.protocol_differences(one, other) == ["score/grid"]
    assert protocol.protocol_differences(one, one | {"fd_fashion": 3.0}) == []
    assert protocol.protocol_differences(one, {"score/n": 5000}) == ["score/grid"]


def test_protocol_of_training_equals_protocol_of_sampling(smoke, tmp_path):
    told = smoke.metrics
    assert {"score/identity", "score/autoencoder", "score/data"} <= told.keys()
    with here(tmp_path, LDM_CACHE=str(smoke.kept)):
        how = ("sampler=dpmpp_2m", "steps=2", "num=20", "seed=1000000", "metrics=full", "save=none", "output_dir=drawn")
        as_then = (f"guidance.scale={told['guidance']}", f"precision={told['score/arithmetic']}", "batch_size=10")
        assert command("sample.py", f"run={smoke.run}", *how, *as_then) == 0
        drawn = json.loads((tmp_path / "drawn" / "metrics.json").read_text())
    assert protocol.protocol_differences(told, drawn) == ["score/scale"]  # training chose among several
    assert told["score/scale"] == "best of 1, 2 on 10"
    assert drawn["fd_fashion"] == pytest.approx(told["fd_fashion"], rel=1e-7)  # the judge looked at other batches


def test_infer_protocol_of_older_run(smoke, tmp_path):
    told = smoke.metrics
    bare = {name: value for name, value in told.items() if name != "protocol" and not name.startswith("score/")}
    with here(tmp_path, LDM_CACHE=str(smoke.kept)):
        again = infer_protocol(smoke.run, bare)
    assert protocol.protocol_differences(told, again) == []
    assert again["protocol"] == told["protocol"]
    with here(tmp_path):  # without the judge
        assert infer_protocol(smoke.run, bare) == {}


@pytest.mark.parametrize(
    ("kind", "ema", "expected"),
    [
        ("raw", {"_target_": "ldm.ema.PowerEMA", "sigma_rel": 0.06}, "raw"),
        ("ema", {"_target_": "ldm.ema.PowerEMA", "_partial_": True, "sigma_rel": 0.06}, "ema(0.06)"),
        ("ema", {"_target_": "a.B", "decay": 0.9999, "warmup": False}, "ema(decay=0.9999, warmup=False)"),
        ("ema:0.10", {"_target_": "ldm.ema.ConstantEMA", "decay": 0.9999}, "ema(0.1)"),
        ("ema", None, "ema"),
    ],
)
def test_weights_are_described_with_options_of_their_average(kind, ema, expected):
    assert protocol.describe_weights(kind, {} if ema is None else {"ema": ema}) == expected

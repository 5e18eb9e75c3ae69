"""The plan of a training: presets, differences to them, and mistakes in one line; nothing is computed or written."""

import json
import os
import subprocess
import sys

import pytest
from smoke import ROOT, process

from ldm.errors import UserError
from ldm.plan.__main__ import plan
from ldm.plan.config import composed, differences
from ldm.plan.table import counts_match, table


def test_plan_of_preset_needs_no_data_and_lists_differences():
    typed = ["preset=dit_s2", "net.depth=2", "training.batch_size=2", "batches=2"]
    found = plan(typed)
    assert found.data.images == 1281167
    assert found.images == 2 * 400000
    assert sorted(found.differences) == ["net.depth: 12 -> 2", "training.batch_size: 256 -> 2"]
    assert "DiT tab. 4, S/2 (network + conditioner): 32,963,360, ours has" in table(found)


def test_plan_differences_to_paper():
    cfg, said = composed(["preset=dit_s2"])
    assert said["images"] == 1281167
    assert differences(cfg, "dit_s2") == []
    assert differences(cfg, "dit_b2") == [
        "conditioner.dim: 768 -> 384",
        "net.channels: 768 -> 384",
        "net.num_heads: 12 -> 6",
    ]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["net=tinny"], "net=tinny: no such option; did you mean 'tiny'"),
        (["net.width=3"], "no key 'net.width'"),
        (["net.channels=many"], "net.channels=many: ldm.net.unet.UNet expects int"),
        (["preset=sd9"], "paper=sd9: no such preset (one of"),
        (["paper=sd9"], "paper=sd9: no such preset (one of"),
        (["throughput=0"], "throughput=0: expected a number above 0"),
        (["throughput=fast"], "throughput=fast: expected a number above 0"),
        (["batches=1,none"], "batches=none: expected a number above 0"),
        (["data=folder"], "data.path=... must be given"),
        (["data=synthetic", "training=evaluator"], "only training=diffusion can be planned"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_plan_error_is_one_line(typed, expected):
    with pytest.raises(UserError) as error:
        plan(typed)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("count", "printed", "same"),
    [(5, 5, True), (5, 6, False), (390_888_578, "390.89M", True), (390_884_999, "390.89M", False)],
)
def test_counts_match_rounds_like_printed(count, printed, same):
    assert counts_match(count, printed) == same


@pytest.mark.slow
def test_plan_of_stable_diffusion_needs_little_memory(tmp_path):
    """As a process of its own, of whose memory torch itself is most."""
    code = (  # not ru_maxrss, which a process inherits from the one that started it
        "import sys; from ldm.plan.__main__ import main; code = main(['preset=sd1', 'json=sd1.json']);"
        "(peak,) = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')];"
        "assert int(peak) < 1.5e6, peak; sys.exit(code)"
    )
    (tmp_path / "code.py").write_text(code)
    done = process(tmp_path / "code.py", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sd1.json").read_text())
    assert found["parts"]["network"]["parameters"] == 859_520_964
    assert found["memory"]["network in bf16"] == 2 * 859_520_964
    assert found["flops"]["network, an image"] == pytest.approx(803.3e9, rel=1e-3)
    assert "Stable Diffusion 1 (network): 859,520,964, the same" in done.stdout
    stored = json.loads((ROOT / "experiments" / "scale" / "plan.json").read_text())  # the same on a thousand GPUs
    assert stored["parts"] == found["parts"]
    assert stored["images"] == found["images"]
    assert stored["disk"] == found["disk"]
    for name in ("training, an image", "first stage encodes an image"):
        assert stored["flops"][name] == found["flops"][name]
    for name in ("weights", "gradients", "optimizer", "average"):
        assert stored["memory"][name] == found["memory"][name]


def test_plan_command_error_has_exit_code_2(tmp_path):
    env = {**os.environ, "LDM_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "ldm.plan", "net=tinny"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.startswith("error: net=tinny: no such option")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

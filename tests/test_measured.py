"""Comparisons that are commands of their own, experiments/*/measure.py, begin: every part of them once, on the shared
tiny run.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from smoke import ROOT, here

from ldm.report import rows

ARMS = {  # what is typed, and the rows it leaves
    "augmentation": (("drawn=4", "steps=2"), 6),
    "families": (("seeds=0", "steps=2,2", "num=20", "budget=smoke"), 3),
    "peers": (("minutes=0.01", "pixels=0.01", "seeds=0", "rates=1e-3", "num=20", "budget=smoke"), 5),
}


@pytest.fixture
def measure(request, monkeypatch, smoke, tmp_path):
    """The module of a comparison, whose tables go to a folder of this test."""
    folder = ROOT / "experiments" / request.param
    monkeypatch.syspath_prepend(str(folder))
    spec = spec_from_file_location(f"{request.param}_measure", folder / "measure.py")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    for name in ("TABLE", "TRIED"):
        if hasattr(made, name):
            monkeypatch.setattr(made, name, tmp_path / f"{name}.csv".lower())
    monkeypatch.setattr(made, "HERE", tmp_path)
    (tmp_path / "README.md").write_text((folder / "README.md").read_text())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with here(smoke.folder):
        yield made
    for name in ("told", "recipes"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*biased")
@pytest.mark.parametrize("measure", sorted(ARMS), indirect=True)
def test_measure_command_runs_and_skips_done_rows(measure, smoke, request, capsys):
    typed, wanted = ARMS[request.node.callspec.params["measure"]]
    if hasattr(measure, "REAL"):
        measure.REAL = (10, 20, 40)
    if hasattr(measure, "DEV"):
        measure.DEV = 10
    measure.main(str(smoke.run), *typed)
    found = rows.read(measure.TABLE)
    assert len(found) == wanted
    capsys.readouterr()
    measure.main(str(smoke.run), *typed)
    assert rows.read(measure.TABLE) == found


def test_peers_table_lists_rows_above_reconstruction(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "peers"))
    import told

    rest = {"minutes": "2", "guided_fd_fashion": "3"}
    found = [{"who": who, "fd_fashion": fd, **rest} for who, fd in (("ours", "4"), ("ours", "6"), ("diffusers", "9"))]
    found.append({"who": "another", "fd_fashion": "17", "minutes": "2", "guided_fd_fashion": ""})
    _, _, another, alone, guided = told.lines(found, 1.0)
    assert alone == "| alone | 2 | diffusers | 4.00, 6.00 | 9.00 | **0.50** |"
    assert another == "| alone | 2 | another | 4.00, 6.00 | 17.00 | **0.25** |"
    assert guided.endswith("**1.00** |")
    sys.modules.pop("told")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["Diffusers", "DenoisingDiffusion"])
def test_peer_average_follows_network(peer, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "peers"))
    import recipes

    net = torch.nn.Linear(1, 1, bias=False)
    net.requires_grad_(False).weight.zero_()
    follow, averaged = getattr(recipes, peer).average(None, net)
    for _ in range(300):
        net.weight.lerp_(torch.ones(1, 1), 0.05)
        follow()
    assert 0.7 < averaged()["weight"].item() < 1
    sys.modules.pop("recipes")

"""Records where k-diffusion's samplers end: PYTHONPATH=FOLDER:tests/diffusion python tests/tools/record_k_diffusion.py

FOLDER is what `pip install --no-deps --target FOLDER k-diffusion==0.1.1.post1` filled. Not a test and not needed by
one: k_diffusion.json,
which it writes into tests/diffusion, is committed. Start, noise and network are those of cases.py.
"""

import importlib
import json
import sys
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

import torch
from cases import F64, Net, draw

from ldm.diffusion import schedule

CHURN = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
RUNS = {  # name -> (function, options)
    "euler": ("sample_euler", {}),
    "heun": ("sample_heun", {}),
    "ancestral": ("sample_euler_ancestral", {}),
    "ancestral_eta": ("sample_euler_ancestral", {"eta": 0.6}),
    "dpmpp_2m": ("sample_dpmpp_2m", {}),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_eta": ("sample_dpmpp_2m_sde", {"eta": 0.6}),
    "euler_churn": ("sample_euler", CHURN),
    "heun_churn": ("sample_heun", CHURN),
}


def package(name: str) -> ModuleType:
    """A module of k-diffusion without its __init__, which imports what training needs; its ODE and SDE libraries are
    not called here.
    """
    for absent in ("torchdiffeq", "torchsde"):
        sys.modules.setdefault(absent, MagicMock())
    if "k_diffusion" not in sys.modules:
        bare = ModuleType("k_diffusion")
        bare.__path__ = [next(f"{p}/k_diffusion" for p in sys.path if Path(p, "k_diffusion/sampling.py").is_file())]
        sys.modules["k_diffusion"] = bare
    return importlib.import_module(f"k_diffusion.{name}")


def vp(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser of the eps network on Song's continuous VP process: sigma^2 = exp(0.1 t + 9.95 t^2) - 1, and the
    network sees 999 t.
    """
    beta = torch.log1p(sigma**2)
    t = (-0.1 + (0.01 + 4 * 9.95 * beta).sqrt()) / (2 * 9.95)
    sigma = sigma[:, None]
    return x - sigma * Net()(x / (1 + sigma**2).sqrt(), 999 * t)


def end(run: str, model, sigmas: torch.Tensor) -> list:
    """Where a sampler ends that starts at sigmas[0] times the first draw; the later draws are its noise, in their
    order.
    """
    sampling = package("sampling")
    name, options = RUNS[run]
    k = count(1)
    if "ancestral" in name or "sde" in name:
        options = {**options, "noise_sampler": lambda *sigmas: draw(next(k))}
    with patch("torch.randn_like", lambda x: draw(next(k))):
        return getattr(sampling, name)(model, sigmas[0] * draw(0), sigmas, disable=True, **options).tolist()


if __name__ == "__main__":
    found = {"version": version("k-diffusion"), "table": {}, "vp": {}}
    table = package("external").DiscreteEpsDDPMDenoiser(Net(), schedule.scaled_linear().alpha_bar, quantize=False)
    for n in (10, 28):  # n - 1 divides 999: its grid is on the table's entries
        found["table"][n] = {run: end(run, table, table.get_sigmas(n).to(F64)) for run in RUNS if "churn" not in run}
    for n in (6, 25):
        sigmas = package("sampling").get_sigmas_karras(n, 0.03, 14.0).to(F64)
        found["vp"][n] = {"sigmas": sigmas.tolist(), **{run: end(run, vp, sigmas) for run in RUNS}}
    path = Path(__file__).parents[1] / "diffusion" / "k_diffusion.json"
    path.write_text(json.dumps(found, indent=1).replace("\n     ", " ").replace("\n    ]", "]") + "\n")

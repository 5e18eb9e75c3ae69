"""Write a trained model in another project's layout: python -m ldm.cli.export run=RUN to=diffusers out=PLACE [weights=ema] [config=FILE.yaml]

run: a run folder, a step or weights file in it, a diffusers folder, or a checkpoint.  config: CompVis' yaml of a checkpoint.
to=diffusers     a folder that diffusers' StableDiffusionPipeline (CLIP), StableDiffusionInpaintPipeline (with a masked image)
                 or LDMTextToImagePipeline (WordPiece) opens
to=compvis       one .ckpt or .safetensors with CompVis' and Stability's names
to=safetensors   one file of ours with the composed config inside; sample.py takes it as run=
to=peft          of adapter=lora: one .safetensors that diffusers' load_lora_weights reads; the rest writes such a run merged, as one model
to=controlnet    of adapter=controlnet: the weights of diffusers' ControlNetModel, one .safetensors
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.adapter import lora
from ldm.checkpoint.external import open_pipeline, text_tower
from ldm.cli.errors import run_guarded
from ldm.config import build
from ldm.errors import UserError
from ldm.interop.pipeline import Pipeline
from ldm.interop.text import NOT_TEXT
from ldm.runs.folder import is_external

REQUIRED_KEYS, KEYS = ("run", "to", "out"), ("run", "to", "out", "weights", "config")


def export_diffusers(pipeline: "Pipeline", out: Path) -> None:
    """A pipeline folder of diffusers. Raises UserError for a model that has no counterpart there."""
    from hydra.utils import instantiate

    from ldm.interop import folder

    schedule = instantiate(pipeline.config["schedule"])
    if not hasattr(schedule, "alpha_bar"):
        raise UserError(
            f"schedule={pipeline.config['schedule']['_target_']}: to=diffusers expects one that is a table of betas"
        )
    bar = schedule.alpha_bar.double()
    betas = (1 - bar / bar.roll(1)).tolist()
    folder.save(pipeline, out, [float(1 - bar[0]), *betas[1:]])


def export_compvis(pipeline: "Pipeline", out: Path) -> None:
    """One file in CompVis' layout: .safetensors, or a .ckpt with its state_dict. Raises UserError for another ending."""
    import torch

    from ldm.interop import checkpoint
    from ldm.io import atomic

    if out.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"out={out}: expected a name that ends in .safetensors or .ckpt")
    state = checkpoint.save(pipeline)
    if out.suffix == ".safetensors":
        atomic.write_tensors(out, state, {"format": "pt"})
        return
    import io

    buffer = io.BytesIO()
    torch.save({"state_dict": {name: value.contiguous().clone() for name, value in state.items()}}, buffer)
    atomic.write_bytes(out, buffer.getvalue())


def export_safetensors(pipeline: "Pipeline", out: Path) -> None:
    """One file of ours. Raises UserError for another ending."""
    from ldm.interop import single_file

    if out.suffix != ".safetensors":
        raise UserError(f"out={out}: expected a name that ends in .safetensors")
    single_file.save(pipeline, out)


def export_peft(run: str, weights: str, out: Path) -> None:
    """The factors of a LoRA run, in float32, with their alpha in them. Raises UserError for another kind of run."""
    from ldm.adapter import lora
    from ldm.interop.adapters import export_lora

    config, net, found = load_adapter_state(run, weights, "lora.LoRA")
    strength = lora.LoRA(**{name: value for name, value in config.items() if not name.startswith("_")}).scaling
    factors = {name: strength * value if name.endswith(".up") else value for name, value in found.items()}
    write_safetensors(out, export_lora(factors, lora.base_state_dict(net)))


def export_controlnet(run: str, weights: str, out: Path) -> None:
    """The weights of a ControlNet run. Raises UserError for another kind of run."""
    from ldm.interop.adapters import export_controlnet

    write_safetensors(out, export_controlnet(load_adapter_state(run, weights, "controlnet.ControlNet")[2]))


def load_adapter_state(run: str, weights: str, kind: str) -> tuple[dict, Any, dict]:
    """The config of an adapter run, its network and what was trained, by the adapter's names. Raises UserError for another kind."""
    from ldm.checkpoint import adapters, load
    from ldm.checkpoint.weights import load_weights_dict
    from ldm.config.build import to_container

    config = to_container(load.open_adapter(run).config.adapter)
    if config["_target_"] != f"ldm.adapter.{kind}":
        raise UserError(f"run={run} is of {config['_target_']}: expected one of ldm.adapter.{kind}")
    found = {adapters.local_parameter_name(name): value for name, value in load_weights_dict(run, weights).items()}
    return config, load.load_model(run, weights).cpu().denoiser.net, found


def write_safetensors(out: Path, state: Mapping[str, Any]) -> None:
    """One .safetensors. Raises UserError for another ending."""
    from ldm.io import atomic

    if out.suffix != ".safetensors":
        raise UserError(f"out={out}: expected a name that ends in .safetensors")
    atomic.write_tensors(out, state, {"format": "pt"})


ADAPTER_FORMATS: Mapping[str, Callable[[str, str, Path], None]] = {"peft": export_peft, "controlnet": export_controlnet}


PIPELINE_FORMATS: Mapping[str, Callable[["Pipeline", Path], None]] = {
    "diffusers": export_diffusers,
    "compvis": export_compvis,
    "safetensors": export_safetensors,
}


def parse_args(argv: Sequence[str]) -> dict[str, str]:
    """What was typed, checked. Raises UserError."""
    given = {}
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals or name not in KEYS:
            raise UserError(f"{word}: expected {', '.join(f'{key}=...' for key in KEYS)}")
        given[name] = value
    if missing := [name for name in REQUIRED_KEYS if not given.get(name)]:
        raise UserError(f"{missing[0]}=... must be given (see --help)")
    if given["to"] not in {*PIPELINE_FORMATS, *ADAPTER_FORMATS}:
        raise UserError(f"to={given['to']}: expected one of {', '.join([*PIPELINE_FORMATS, *ADAPTER_FORMATS])}")
    if Path(given["out"]).exists():
        raise UserError(f"out={given['out']} exists; name another place, or remove it")
    return given


def export(argv: Sequence[str]) -> None:
    """Write what a command line asks for. Raises UserError."""
    given = parse_args(argv)
    out, weights = Path(given["out"]), given.get("weights", "ema")

    if given["to"] in ADAPTER_FORMATS:
        ADAPTER_FORMATS[given["to"]](given["run"], weights, out)
    else:
        PIPELINE_FORMATS[given["to"]](run_to_pipeline(given["run"], weights, given.get("config")), out)
    print(f"{given['run']} as {given['to']} in {given['out']}")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    return run_guarded(lambda: export(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))


def run_to_pipeline(run: str | Path, kind: str = "ema", yaml: str | Path | None = None) -> Pipeline:
    """The pipeline that `run` names: a run folder of train.py, or anything that `opened` takes."""
    if is_external(run):
        return open_pipeline(run, kind, yaml)
    from ldm.checkpoint import load
    from ldm.runs import folder

    model = load.load_model(run, kind).cpu()
    if hasattr(model.denoiser.net, "controls"):
        raise UserError(f"run={run} has a ControlNet, which no pipeline holds: expected to=controlnet, or its base")
    net = lora.merge(model.denoiser.net)
    given = build.to_container(load.load_run_config(folder.find_run(run)))
    chosen = {name: given[name] for name in ("net", "autoencoder", "conditioner", "schedule", "prediction", "seed")}
    chosen |= {"learned_variance": True} if given.get("learned_variance") else {}
    tower = text_tower(model)
    text = {} if tower is None else {name: value for name, value in tower.state_dict().items() if name not in NOT_TEXT}
    state = model.autoencoder.state_dict()
    data = asdict(load.load_data_card(folder.find_run(run)))
    return Pipeline(chosen, net.state_dict(), state, data, text, model.conditioner.state_dict())

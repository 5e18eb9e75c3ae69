"""Write a trained model in another project's format.

python -m ldm.cli.export run=RUN to=FORMAT out=PATH [weights=ema] [config=FILE.yaml]

run: a run folder, a checkpoint or weights file in it, a diffusers folder, or another project's checkpoint.
config: CompVis' YAML of a checkpoint.
to=diffusers     a folder for diffusers' StableDiffusionPipeline (CLIP), StableDiffusionInpaintPipeline (with a masked
                 image) or LDMTextToImagePipeline (WordPiece)
to=compvis       one .ckpt or .safetensors with CompVis' and Stability's parameter names
to=safetensors   one file in this project's format with the composed config inside; sample.py reads it as run=
to=peft          for adapter=lora: one .safetensors for diffusers' load_lora_weights; the other formats write such a run
                 merged, as one model
to=controlnet    for adapter=controlnet: the weights of diffusers' ControlNetModel, one .safetensors
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
from ldm.config.tree import flatten
from ldm.errors import UserError
from ldm.interop.pipeline import Pipeline
from ldm.interop.text import NOT_TEXT
from ldm.runs.folder import is_external

REQUIRED_KEYS, KEYS = ("run", "to", "out"), ("run", "to", "out", "weights", "config")


# to=diffusers and compvis: what their networks of images have no counterpart for -> the value that they have
PLAIN = {
    "net.concat_vector": False,
    "net.block.twice": False,
    "net.downsample.stride": 2,
    "net.padding_mode": "zeros",
    "autoencoder.encoder.padding_mode": "zeros",
    "autoencoder.decoder.padding_mode": "zeros",
}


def require_image_model(pipeline: "Pipeline", to: str) -> None:
    """Raise UserError for a model of samples other than images, and for options that other projects do not have."""
    shape, factor = pipeline.data["shape"], pipeline.config["autoencoder"].get("factor", 1)
    if len(shape) != 3:
        raise UserError(f"to={to} writes models of images, this one is of samples {tuple(shape)}; use to=safetensors")
    if not isinstance(factor, int):
        raise UserError(f"autoencoder.factor={list(factor)}: to={to} expects one number for both sides of an image")
    options = flatten(pipeline.config)
    for path, expected in PLAIN.items():
        if options.get(path, expected) != expected:
            raise UserError(f"{path}={options[path]}: to={to} expects {expected}; use to=safetensors")


def export_diffusers(pipeline: "Pipeline", out: Path) -> None:
    """Write a pipeline folder of diffusers.  Raises UserError for a model without a counterpart there."""
    from hydra.utils import instantiate

    from ldm.interop import folder

    schedule = instantiate(pipeline.config["schedule"])
    if not hasattr(schedule, "alpha_bar"):
        raise UserError(
            f"schedule={pipeline.config['schedule']['_target_']}: to=diffusers expects a schedule with a table of betas"
        )
    bar = schedule.alpha_bar.double()
    betas = (1 - bar / bar.roll(1)).tolist()
    folder.save(pipeline, out, [float(1 - bar[0]), *betas[1:]])


def export_compvis(pipeline: "Pipeline", out: Path) -> None:
    """Write one file in CompVis' format: .safetensors, or .ckpt with a state_dict.

    Raises UserError for another file name extension.
    """
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
    """Write one file in this project's format.  Raises UserError for another file name extension."""
    from ldm.interop import single_file

    if out.suffix != ".safetensors":
        raise UserError(f"out={out}: expected a name that ends in .safetensors")
    single_file.save(pipeline, out)


def export_peft(run: str, weights: str, out: Path) -> None:
    """Write the factors of a LoRA run, in float32 and scaled by alpha.  Raises UserError for another kind of run."""
    from ldm.adapter import lora
    from ldm.interop.adapters import export_lora

    config, net, trained = load_adapter_state(run, weights, "lora.LoRA")
    if strange := [name for name, value in trained.items() if name.endswith(".down") and value.ndim not in (2, 4)]:
        raise UserError(
            f"run={run} corrects {strange[0]}, which is no layer of a network of images; to=peft expects one"
        )
    scaling = lora.LoRA(**{name: value for name, value in config.items() if not name.startswith("_")}).scaling
    factors = {name: scaling * value if name.endswith(".up") else value for name, value in trained.items()}
    write_safetensors(out, export_lora(factors, lora.base_state_dict(net)))


def export_controlnet(run: str, weights: str, out: Path) -> None:
    """Write the weights of a ControlNet run.  Raises UserError for another kind of run."""
    from ldm.interop.adapters import export_controlnet

    write_safetensors(out, export_controlnet(load_adapter_state(run, weights, "controlnet.ControlNet")[2]))


def load_adapter_state(run: str, weights: str, kind: str) -> tuple[dict, Any, dict]:
    """Return an adapter run's config, its network, and the trained parameters by the adapter's names.

    kind: class name of the adapter within ldm.adapter.  Raises UserError for another kind of run.
    """
    from ldm.checkpoint import adapters, load
    from ldm.checkpoint.weights import load_weights_dict
    from ldm.config.build import to_container

    config = to_container(load.open_adapter(run).config.adapter)
    if config["_target_"] != f"ldm.adapter.{kind}":
        raise UserError(f"run={run} is a {config['_target_']}: expected a run of ldm.adapter.{kind}")
    trained = {adapters.local_parameter_name(name): value for name, value in load_weights_dict(run, weights).items()}
    return config, load.load_model(run, weights).cpu().denoiser.net, trained


def write_safetensors(out: Path, state: Mapping[str, Any]) -> None:
    """Write one .safetensors file.  Raises UserError for another file name extension."""
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
    """Parse and check the command line.  Raises UserError."""
    arguments = {}
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals or name not in KEYS:
            raise UserError(f"{word}: expected {', '.join(f'{key}=...' for key in KEYS)}")
        arguments[name] = value
    if missing := [name for name in REQUIRED_KEYS if not arguments.get(name)]:
        raise UserError(f"{missing[0]}=... must be given (see --help)")
    if arguments["to"] not in {*PIPELINE_FORMATS, *ADAPTER_FORMATS}:
        raise UserError(f"to={arguments['to']}: expected one of {', '.join([*PIPELINE_FORMATS, *ADAPTER_FORMATS])}")
    if Path(arguments["out"]).exists():
        raise UserError(f"out={arguments['out']} exists; choose another path, or remove it")
    return arguments


def run_to_pipeline(run: str | Path, kind: str = "ema", yaml: str | Path | None = None) -> Pipeline:
    """Load the pipeline at `run`: a run folder, or anything that `open_pipeline` reads.

    kind: weights of a run, "ema" or "raw".  yaml: CompVis' YAML of a checkpoint.
    """
    if is_external(run):
        return open_pipeline(run, kind, yaml)
    from ldm.checkpoint import load
    from ldm.runs import folder

    model = load.load_model(run, kind).cpu()
    if hasattr(model.denoiser.net, "controls"):
        raise UserError(f"run={run} has a ControlNet, which pipelines do not include: use to=controlnet, or its base")
    net = lora.merge(model.denoiser.net)
    full = build.to_container(load.load_run_config(folder.find_run(run)))
    config = {name: full[name] for name in ("net", "autoencoder", "conditioner", "schedule", "prediction", "seed")}
    config |= {"learned_variance": True} if full.get("learned_variance") else {}
    tower = text_tower(model)
    text = {} if tower is None else {name: value for name, value in tower.state_dict().items() if name not in NOT_TEXT}
    state = model.autoencoder.state_dict()
    data = asdict(load.load_data_card(folder.find_run(run)))
    return Pipeline(config, net.state_dict(), state, data, text, model.conditioner.state_dict())


def export(argv: Sequence[str]) -> None:
    """Write what a command line requests.  Raises UserError."""
    arguments = parse_args(argv)
    out, weights = Path(arguments["out"]), arguments.get("weights", "ema")

    if arguments["to"] in ADAPTER_FORMATS:
        ADAPTER_FORMATS[arguments["to"]](arguments["run"], weights, out)
    else:
        pipeline = run_to_pipeline(arguments["run"], weights, arguments.get("config"))
        if arguments["to"] != "safetensors":
            require_image_model(pipeline, arguments["to"])
        PIPELINE_FORMATS[arguments["to"]](pipeline, out)
    print(f"{arguments['run']} as {arguments['to']} in {arguments['out']}")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    return run_guarded(lambda: export(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Write a trained model in another project's layout: python -m ldm.export run=RUN to=diffusers out=PLACE [weights=ema] [config=FILE.yaml]

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.command import guarded
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.interop.pipeline import Pipeline

NEEDED, KEYS = ("run", "to", "out"), ("run", "to", "out", "weights", "config")


def diffusers(pipeline: "Pipeline", out: Path) -> None:
    """A pipeline folder of diffusers. Raises UserError for a model that has no counterpart there."""
    from hydra.utils import instantiate

    from ldm.interop import folder

    schedule = instantiate(pipeline.config["schedule"])
    if not hasattr(schedule, "alpha_bar"):
        raise UserError(f"schedule={pipeline.config['schedule']['_target_']}: to=diffusers expects one that is a table of betas")
    bar = schedule.alpha_bar.double()
    betas = (1 - bar / bar.roll(1)).tolist()
    folder.save(pipeline, out, [float(1 - bar[0]), *betas[1:]])


def compvis(pipeline: "Pipeline", out: Path) -> None:
    """One file in CompVis' layout: .safetensors, or a .ckpt with its state_dict. Raises UserError for another ending."""
    import torch

    from ldm import durable
    from ldm.interop import checkpoint

    if out.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"out={out}: expected a name that ends in .safetensors or .ckpt")
    state = checkpoint.save(pipeline)
    if out.suffix == ".safetensors":
        durable.write_tensors(out, state, {"format": "pt"})
        return
    import io

    buffer = io.BytesIO()
    torch.save({"state_dict": {name: value.contiguous().clone() for name, value in state.items()}}, buffer)
    durable.write_bytes(out, buffer.getvalue())


def safetensors(pipeline: "Pipeline", out: Path) -> None:
    """One file of ours. Raises UserError for another ending."""
    from ldm.interop import single

    if out.suffix != ".safetensors":
        raise UserError(f"out={out}: expected a name that ends in .safetensors")
    single.save(pipeline, out)


def peft(run: str, weights: str, out: Path) -> None:
    """The factors of a LoRA run, in float32, with their alpha in them. Raises UserError for another kind of run."""
    from ldm.adapter import lora
    from ldm.interop.adapters import export_lora

    config, net, found = adapter_of(run, weights, "lora.LoRA")
    strength = lora.LoRA(**{name: value for name, value in config.items() if not name.startswith("_")}).strength
    factors = {name: strength * value if name.endswith(".up") else value for name, value in found.items()}
    write(out, export_lora(factors, lora.plain(net)))


def controlnet(run: str, weights: str, out: Path) -> None:
    """The weights of a ControlNet run. Raises UserError for another kind of run."""
    from ldm.interop.adapters import export_controlnet

    write(out, export_controlnet(adapter_of(run, weights, "controlnet.ControlNet")[2]))


def adapter_of(run: str, weights: str, kind: str) -> tuple[dict, Any, dict]:
    """The config of an adapter run, its network and what was trained, by the adapter's names. Raises UserError for another kind."""
    from ldm import adapted, load
    from ldm.build import plain

    config = plain(load.config_of(adapted.adapter_folder(run)).adapter)
    if config["_target_"] != f"ldm.adapter.{kind}":
        raise UserError(f"run={run} is of {config['_target_']}: expected one of ldm.adapter.{kind}")
    found = {adapted.own(name): value for name, value in load.weights_of(run, weights).items()}
    return config, load.load(run, weights).cpu().denoiser.net, found


def write(out: Path, state: Mapping[str, Any]) -> None:
    """One .safetensors. Raises UserError for another ending."""
    from ldm import durable

    if out.suffix != ".safetensors":
        raise UserError(f"out={out}: expected a name that ends in .safetensors")
    durable.write_tensors(out, state, {"format": "pt"})


OF_ADAPTERS: Mapping[str, Callable[[str, str, Path], None]] = {"peft": peft, "controlnet": controlnet}
TO: Mapping[str, Callable[["Pipeline", Path], None]] = {"diffusers": diffusers, "compvis": compvis, "safetensors": safetensors}


def asked(argv: Sequence[str]) -> dict[str, str]:
    """What was typed, checked. Raises UserError."""
    given = {}
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals or name not in KEYS:
            raise UserError(f"{word}: expected {', '.join(f'{key}=...' for key in KEYS)}")
        given[name] = value
    if missing := [name for name in NEEDED if not given.get(name)]:
        raise UserError(f"{missing[0]}=... must be given (see --help)")
    if given["to"] not in {*TO, *OF_ADAPTERS}:
        raise UserError(f"to={given['to']}: expected one of {', '.join([*TO, *OF_ADAPTERS])}")
    if Path(given["out"]).exists():
        raise UserError(f"out={given['out']} exists; name another place, or remove it")
    return given


def export(argv: Sequence[str]) -> None:
    """Write what a command line asks for. Raises UserError."""
    given = asked(argv)
    out, weights = Path(given["out"]), given.get("weights", "ema")
    from ldm.foreign import pipeline_of  # heavy, and not needed to see a mistake

    if given["to"] in OF_ADAPTERS:
        OF_ADAPTERS[given["to"]](given["run"], weights, out)
    else:
        TO[given["to"]](pipeline_of(given["run"], weights, given.get("config")), out)
    print(f"{given['run']} as {given['to']} in {given['out']}")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    return guarded(lambda: export(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Stage one that others trained: an autoencoder in diffusers' layout, measured on the data at hand and kept as our own are."""

from pathlib import Path
from typing import Any

from ldm import build, durable
from ldm.errors import UserError
from ldm.interop import diffusers, read
from ldm.interop.keymap import fit, require_floating
from ldm.interop.pipeline import with_scale
from ldm.interop.told import config_in
from ldm.space import Space
from ldm.stage import cache
from ldm.stage.autoencoder import reconstruct
from ldm.stage.resume import finished
from ldm.stage.run import opened

MEASURED = 64  # images: one takes a wide encoder and decoder a second on a CPU


def train(cfg: Any, *, path: str, content: str) -> float:
    """Read the weights, measure them, write weights.safetensors; returns the PSNR of test images in dB.

    path: a folder with config.json and weights, as diffusers saves an AutoencoderKL; its own scale and shift stay.
    content: digest of the weights that are expected.  Raises UserError, DamagedError naming the file.
    """
    folder = place(cfg)
    if done := finished(cfg, folder):
        return done["psnr"]
    if (found := digest(Path(path))) != content:
        raise UserError(f"{path}: its weights are not those that were there ({content}, now {found}); put them back, or begin anew")
    with opened(cfg, folder, cache.FIRST_STAGE) as run:
        if not run.chief:
            return 0.0
        data, given = build.dataset(cfg, "test"), config_in(Path(path))
        autoencoder = build.autoencoder(cfg.autoencoder, data.channels).eval().requires_grad_(False)
        published = diffusers.import_autoencoder(read.weights(path))
        require_floating(published, str(path))
        weights = {name: value.float() for name, value in published.items()}
        scaled = with_scale(weights, given.get("scaling_factor", 0.18215), autoencoder.z_channels, given.get("shift_factor") or 0.0)
        fit(autoencoder, scaled, str(path))
        space = Space.of(autoencoder, build.plain(cfg.autoencoder))
        metrics: dict[str, Any] = {**reconstruct(autoencoder, data, None, MEASURED), "identity": space.identity}
        durable.write_tensors(folder / "weights.safetensors", autoencoder.state_dict(), space.metadata)
        run.finish(metrics)
        run.say("first stage " + "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if isinstance(value, float)))
        return metrics["psnr"]


def place(cfg: Any) -> Path:
    """Where the first stage is kept."""
    return cache.first_stage_folder(cfg)


def needs(cfg: Any) -> list[cache.Kept]:
    """Nothing must be there before it."""
    return []


def node(path: Path) -> dict[str, Any]:
    """The plain config of this stage for a folder of diffusers. Raises UserError for one without weights."""
    target = f"{train.__module__}.{train.__name__}"
    return {"_target_": target, "_partial_": True, "path": str(path.absolute()), "content": digest(path)}


def digest(path: Path) -> str:
    """16 hex digits that depend on every byte of the weights in a folder, and on its config. Raises UserError for one without any."""
    files = [file for ending in read.ENDINGS for name in read.NAMES if (file := path / f"{name}{ending}").is_file()]
    if not files:
        raise UserError(f"{path}: no weights in it; expected {read.NAMES[0]}{read.ENDINGS[0]}")
    return durable.digest(path / "config.json", files[0])[:16]

"""Stage one that others trained: an autoencoder in diffusers' layout, measured on the data at hand and kept as our own are."""

from pathlib import Path
from typing import Any

from ldm.checkpoint.latent_space import LatentSpace
from ldm.config import build
from ldm.errors import UserError
from ldm.interop import diffusers, weights_file
from ldm.interop.keymap import load_strict, require_floating
from ldm.interop.pipeline import with_scale
from ldm.interop.text_tower import read_config
from ldm.io import atomic
from ldm.recipes.autoencoder import evaluate_reconstruction
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache

EVAL_IMAGES = 64  # images: one takes a wide encoder and decoder a second on a CPU


def train(cfg: Any, *, path: str, content: str) -> float:
    """Read the weights, measure them, write weights.safetensors; returns the PSNR of test images in dB.

    path: a folder with config.json and weights, as diffusers saves an AutoencoderKL; its own scale and shift stay.
    content: digest of the weights that are expected.  Raises UserError, CorruptFileError naming the file.
    """
    folder = run_dir(cfg)
    if done := final_metrics(cfg, folder):
        return done["psnr"]
    if (found := weights_digest(Path(path))) != content:
        raise UserError(
            f"{path}: its weights are not those that were there ({content}, now {found}); put them back, or begin anew"
        )
    with open_run(cfg, folder, cache.FIRST_STAGE) as run:
        if not run.is_main_process:
            return 0.0
        data, given = build.build_dataset(cfg, "test"), read_config(Path(path))
        autoencoder = build.build_autoencoder(cfg.autoencoder, data.channels).eval().requires_grad_(False)
        published = diffusers.import_autoencoder(weights_file.read_weights(path))
        require_floating(published, str(path))
        weights = {name: value.float() for name, value in published.items()}
        scaled = with_scale(
            weights, given.get("scaling_factor", 0.18215), autoencoder.z_channels, given.get("shift_factor") or 0.0
        )
        load_strict(autoencoder, scaled, str(path))
        space = LatentSpace.from_autoencoder(autoencoder, build.to_container(cfg.autoencoder))
        metrics: dict[str, Any] = {
            **evaluate_reconstruction(autoencoder, data, None, EVAL_IMAGES),
            "identity": space.identity,
        }
        atomic.write_tensors(folder / "weights.safetensors", autoencoder.state_dict(), space.metadata)
        run.finish(metrics)
        run.print(
            "first stage "
            + "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if isinstance(value, float))
        )
        return metrics["psnr"]


def run_dir(cfg: Any) -> Path:
    """Where the first stage is kept."""
    return cache.first_stage_dir(cfg)


def dependencies(cfg: Any) -> list[cache.CacheEntry]:
    """Nothing must be there before it."""
    return []


def config_node(path: Path) -> dict[str, Any]:
    """The plain config of this stage for a folder of diffusers. Raises UserError for one without weights."""
    target = f"{train.__module__}.{train.__name__}"
    return {"_target_": target, "_partial_": True, "path": str(path.absolute()), "content": weights_digest(path)}


def weights_digest(path: Path) -> str:
    """16 hex digits that depend on every byte of the weights in a folder, and on its config. Raises UserError for one without any."""
    files = [
        file
        for ending in weights_file.ENDINGS
        for name in weights_file.NAMES
        if (file := path / f"{name}{ending}").is_file()
    ]
    if not files:
        raise UserError(f"{path}: no weights in it; expected {weights_file.NAMES[0]}{weights_file.ENDINGS[0]}")
    return atomic.file_sha256(path / "config.json", files[0])[:16]

"""A published first stage: an autoencoder in diffusers' layout, measured on the data, stored like one trained here."""

from dataclasses import dataclass
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
from ldm.recipes.autoencoder import evaluate_reconstruction, format_numbers
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache

EVAL_IMAGES = 64  # few, because a wide encoder and decoder take about a second an image on a CPU


@dataclass(frozen=True, kw_only=True)
class PretrainedAutoencoderRecipe:
    """A first stage that is read instead of trained.

    path: folder with config.json and weights, as diffusers saves an AutoencoderKL; its own scale and shift stay.
    content: expected digest of its files (weights_digest).
    """

    path: str
    content: str

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder in the cache for the first stage."""
        return cache.first_stage_dir(cfg)

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return nothing: its metrics need no evaluator."""
        return []

    def train(self, cfg: Any) -> float:
        """Read the weights, measure them, write weights.safetensors; return the PSNR of test images in dB.

        Raises UserError if the files are not those of `content`, CorruptFileError naming the file.
        """
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            return done["psnr"]
        if (digest := weights_digest(Path(self.path))) != self.content:
            raise UserError(
                f"{self.path}: its weights have changed (digest {self.content} expected, now {digest}); "
                "put the former ones back, or start a new run"
            )
        with open_run(cfg, folder, cache.FIRST_STAGE) as run:
            if not run.is_main_process:
                return 0.0
            data, config = build.build_dataset(cfg, "test"), read_config(Path(self.path))
            autoencoder = build.build_autoencoder(cfg.autoencoder, data.shape[0]).eval().requires_grad_(False)
            published = diffusers.import_autoencoder(weights_file.read_weights(self.path))
            require_floating(published, self.path)
            weights = {name: value.float() for name, value in published.items()}
            scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
            load_strict(autoencoder, with_scale(weights, scale, autoencoder.z_channels, shift), self.path)
            space = LatentSpace.from_autoencoder(autoencoder, build.to_container(cfg.autoencoder))
            metrics: dict[str, Any] = {
                **evaluate_reconstruction(autoencoder, data, None, EVAL_IMAGES),
                "identity": space.identity,
            }
            atomic.write_tensors(folder / "weights.safetensors", autoencoder.state_dict(), space.metadata)
            run.finish(metrics)
            run.print("first stage " + format_numbers(metrics))
            return metrics["psnr"]


def config_node(path: Path) -> dict[str, Any]:
    """Return the plain `first_stage` node for a folder of diffusers. Raises UserError for one without weights."""
    target = f"{PretrainedAutoencoderRecipe.__module__}.{PretrainedAutoencoderRecipe.__qualname__}"
    return {"_target_": target, "path": str(path.absolute()), "content": weights_digest(path)}


def weights_digest(path: Path) -> str:
    """Return 16 hex digits of the SHA-256 of config.json and weights in a folder. Raises UserError without weights."""
    files = [
        file
        for ending in weights_file.ENDINGS
        for name in weights_file.NAMES
        if (file := path / f"{name}{ending}").is_file()
    ]
    if not files:
        raise UserError(f"{path}: no weights in it; expected {weights_file.NAMES[0]}{weights_file.ENDINGS[0]}")
    return atomic.file_sha256(path / "config.json", files[0])[:16]

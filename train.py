"""Train a latent diffusion model: python train.py [choice=option ...] [key=value ...] [experiment=study] [-m]"""

from ldm.cli.main import run_command
from ldm.config.build import RUNTIME_PARAMETERS


def train(cfg):
    """Stage one and the judge are found by their recipes or trained first; then the chosen stage is trained, drawn from and scored."""
    from hydra.utils import instantiate

    from ldm.config.build import resolve_dataset_config

    return instantiate(cfg.training)(resolve_dataset_config(cfg))


def ahead(cfg):
    """Whether a config's run is done, what it needs, how long it may take; nothing is trained."""
    from ldm.config.build import resolve_dataset_config
    from ldm.recipes.status import job_status

    return job_status(resolve_dataset_config(cfg))


if __name__ == "__main__":
    run_command(
        train,
        "train",
        paths=("runs", "init", "resume", "data.path", "data.captions", "auto.pretrained"),
        supplied=RUNTIME_PARAMETERS,
        ahead=ahead,
    )

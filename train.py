"""Train a latent diffusion model: python train.py [choice=option ...] [key=value ...] [experiment=study] [-m]"""

from ldm.build import SUPPLIED
from ldm.command import command


def train(cfg):
    """Stage one and the judge are found by their recipes or trained first; then the chosen stage is trained, drawn from and scored."""
    from hydra.utils import instantiate

    from ldm.build import settled

    return instantiate(cfg.training)(settled(cfg))


def ahead(cfg):
    """Whether a config's run is done, what it needs, how long it may take; nothing is trained."""
    from ldm.build import settled
    from ldm.stage.ahead import known

    return known(settled(cfg))


if __name__ == "__main__":
    command(
        train, "train", paths=("runs", "init", "resume", "data.path", "data.captions", "choose.pretrained"), supplied=SUPPLIED, ahead=ahead
    )

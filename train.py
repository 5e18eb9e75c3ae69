"""Train a latent diffusion model: python train.py [choice=option ...] [key=value ...] [experiment=study] [-m]"""

from ldm.cli.main import run_command


def train(cfg):
    """Run the recipe that cfg.training names; return the number that a sweep optimizes.

    The first stage and the evaluator are read from the cache, or trained first if they are not there.
    """
    from ldm.config.build import resolve_dataset_config, to_container
    from ldm.recipes.callbacks import check_callbacks
    from ldm.recipes.recipe import build_recipe

    check_callbacks(to_container(cfg))
    recipe = build_recipe(cfg.training)
    return recipe.train(resolve_dataset_config(cfg))


def status(cfg):
    """Return the status of a config's run: what is done, which dependencies are missing, how long it may take."""
    from ldm.config.build import resolve_dataset_config
    from ldm.recipes.status import job_status

    return job_status(resolve_dataset_config(cfg))


if __name__ == "__main__":
    run_command(
        train,
        "train",
        paths=("runs", "init", "resume", "data.path", "data.captions", "auto.pretrained"),
        ahead=status,
    )

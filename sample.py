"""Draw from a trained model: python sample.py run=FOLDER prompt="a photo of a sneaker" num=16 [key=value ...]"""

from ldm.command import command


def sample(cfg):
    """Load the model, draw one image a seed, save them with a grid, score them if asked, and write down how to do it again."""
    from ldm import drawing
    from ldm.load import load

    request = drawing.Request.of(cfg)
    with drawing.world():
        model = load(cfg.run, cfg.weights)
        images = drawing.draw(model, request)
        return drawing.keep(request, images, score=drawing.score(request, images))


if __name__ == "__main__":
    command(sample, "sample", text=("prompt",), paths=("run", "prompts", "out", "label"))

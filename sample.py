"""Draw from a trained model: python sample.py run=FOLDER prompt="a photo of a sneaker" num=16 [task=...] [key=value ...]"""

from ldm.command import command


def sample(cfg):
    """Load the model, draw one image a seed, save them with a grid, score them if asked, and write down how to do it again."""
    from ldm import adapted, drawing
    from ldm.load import load
    from ldm.request import Request

    request = Request.of(cfg)
    with drawing.world():
        model = adapted.worn(load(request.cfg.run, request.cfg.weights), request.cfg)
        images = drawing.draw(model, request)
        return drawing.keep(request, images, score=drawing.score(request, images))


if __name__ == "__main__":
    files = ("run", "prompts", "out", "label", "again", "image", "mask", "low_res", "map", "boxes", "guidance.classifier")
    command(sample, "sample", text=("prompt", "negative", "source", "precision"), paths=files)

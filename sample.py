"""Draw from a trained model: python sample.py run=FOLDER prompt="a photo of a sneaker" num=16 [task=...] [key=value ...]"""

from ldm.cli.main import run_command


def sample(cfg):
    """Load the model, draw one image a seed, save them with a grid, score them if asked, and write down how to do it again."""
    from ldm import devices
    from ldm.checkpoint.load import load_model
    from ldm.evaluation import samples
    from ldm.sampling import adapters, run
    from ldm.sampling.request import SampleRequest

    request = SampleRequest.from_config(cfg)
    with devices.process_group():
        model = adapters.apply_adapters(load_model(request.cfg.run, request.cfg.weights), request.cfg)
        images = run.generate_images(model, request)
        return run.save_results(request, images, score=samples.evaluate_samples(request, images))


if __name__ == "__main__":
    files = (
        "run",
        "prompts",
        "output_dir",
        "label",
        "reproduce",
        "image",
        "mask",
        "low_res",
        "map",
        "boxes",
        "guidance.classifier",
    )
    run_command(sample, "sample", text=("prompt", "negative", "source_prompt", "precision"), paths=files)

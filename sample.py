"""Sample images: python sample.py run=FOLDER prompt="a photo of a sneaker" num=16 [task=...] [key=value ...]"""

from ldm.cli.main import run_command


def sample(cfg):
    """Load the model, sample one image per seed, save the images with the record to reproduce them, and score them."""
    from ldm import devices
    from ldm.evaluation import samples
    from ldm.sampling import adapters, run
    from ldm.sampling.request import SampleRequest

    request = SampleRequest.from_config(cfg)
    with devices.process_group():
        model = adapters.apply_adapters(request.source.load(request.weights), request.adapters, request.weights)
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

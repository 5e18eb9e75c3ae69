"""python train.py data.size=[24,40]: images that are not square, through both stages, a classifier and the tasks."""

import json

import pytest
import torch
from PIL import Image
from smoke import command, here, train

from ldm.checkpoint.load import load_model
from ldm.sampling.classifier_guidance import load_classifier

PARTS = ("data.size=[24,40]", "metrics=none", "net.channel_mult=[1,2]")
TINY = (
    *("~training.score", "~training.sample_every"),
    *("training.net.channels=16", "training.net.num_head_channels=16", "training.net.channel_mult=[1,2]"),
)


@pytest.mark.slow
@pytest.mark.parametrize("data", [("data.num=20",), ("data=folder", "data.path=images", "data.channels=1")], ids=len)
def test_rectangles_train_and_sample(data, tmp_path):
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((50, 40), 60).save(path)
    with here(tmp_path):
        run = train(*PARTS, *data)
        assert json.loads((run / "data.json").read_text())["shape"] == [1, 24, 40]
        assert load_model(run).latent_shape(3)[2:] == (6, 10)
        classes = len(json.loads((run / "data.json").read_text())["classes"])
        assert Image.open(run / "samples.png").size == (10 * (2 * 40 + 2) + 2, classes * (2 * 24 + 2) + 2)
        small = (f"run={run}", "num=1", "steps=2")
        for more, size in (
            ((), (40, 24)),
            (("size=[32,16]",), (16, 32)),
            (("task=img2img", "held_out=true"), (40, 24)),
        ):
            assert command("sample.py", *small, *more, f"output_dir={size[0]}-{len(more)}") == 0
            assert Image.open(f"{size[0]}-{len(more)}/000000.png").size == size
        if data == ("data.num=20",):
            classifier = train(*PARTS, *data, "training=classifier", *TINY)
            net, _ = load_classifier(str(classifier))
            assert net(torch.zeros(2, 8, 6, 10), torch.ones(2)).shape == (2, 10)
            guided = ("guidance=classifier", f"guidance.classifier={classifier}", "output_dir=guided")
            assert command("sample.py", *small, *guided) == 0
            assert Image.open("guided/000000.png").size == (40, 24)

"""Every task as a person types it, on one run that is told all a network can be told; and each image made again from
its file.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line_error, read_image, read_pngs, run_sample, write_image
from PIL import Image, PngImagePlugin
from smoke import ROOT, command, enliven, here, processes, train

TASKS = sorted(file.stem for file in (ROOT / "conf" / "task").glob("*.yaml"))
TASKS.remove("complete_clip")  # of models of clips: test_complete_clip.py, test_clip_inputs.py
PARTS = "label,low_res,masked_image,semantic_map,layout,relief"
GIVEN = {  # what each task is given beside seeds, and the size of what comes of it
    "generate": (("size=[24,40]",), (40, 24)),
    "unconditional": ((), (32, 32)),
    "img2img": (("image=in.png", "strength=0.7"), (32, 32)),
    "edit": (("image=in.png",), (32, 32)),
    "inpaint": (("image=in.png", "mask=mask.png"), (32, 32)),
    "outpaint": (("image=in.png", "pad_right=8", "pad_top=16"), (40, 48)),
    "super_resolution": (("low_res=small.png",), (40, 24)),
    "semantic": (("map=map.png",), (32, 32)),
    "layout": (("boxes=boxes.json",), (32, 32)),
    "interpolate": (("seed_a=3", "seed_b=9"), (32, 32)),
    "variations": (("source_seed=4", "variation_strength=0.3"), (32, 32)),
}
QUICK = ("generate", "img2img", "inpaint", "super_resolution")  # the others go the same way
DEAF = ("unconditional",)  # to what this run can be told
OTHERS = {  # for models told of an image: in conditioner/test_conditioner_commands.py; for sounds: in recipes/
    *("image_variations", "instruct", "fill_sound", "restyle_sound"),
}


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("tasks"), LDM_CACHE=str(smoke.folder / "cache")):
        write_image("in.png", (32, 32), 0)
        write_image("other.png", (32, 32), 1)
        write_image("small.png", (10, 6), 0)
        hole("mask.png", (32, 32), (8, 4, 20, 12))
        Image.new("L", (32, 32), 1).save("map.png")
        Path("boxes.json").write_text('[["ring", 0.1, 0.1, 0.5, 0.9], [2, 0.5, 0, 1, 1]]')
        yield Path.cwd()


def hole(name: str, size: tuple[int, int], box: tuple[int, ...]) -> None:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    mask.save(name)


@pytest.fixture(scope="module")
def run(place):
    """A model with every kind of condition, after two steps on degraded images, its weights then drawn at random."""
    small = ("conditioner.layout.dim=16", "conditioner.layout.layers=1", "conditioner.low_res.noise_augmentation=0.4")
    drop = "conditioner.drop={low_res: 0.5, masked_image: 0.5}"
    made = train(
        f"conditioner=[{PARTS}]",
        *small,
        drop,
        "degradation=low_res_and_mask",
        "data._target_=boxed.Boxed",
        "metrics=none",
        "training.sample_every=500",
    )
    enliven(made)
    return made


def draw(run: Path, *overrides: str, out: str = "drawn") -> Path:
    return run_sample(f"run={run}", "steps=3", *overrides, output_dir=out)


def test_every_task_is_covered():
    assert set(GIVEN) | OTHERS == set(TASKS)


def some_slow(values, quick) -> list:
    """The values, those that are not quick for the slow suite."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("task", some_slow(sorted(GIVEN), QUICK))
def test_task_image_is_reproduced_from_file(task, run, place, capfd):
    given, size = GIVEN[task]
    folder = draw(run, f"task={task}", *given, "num=3", "seed=3", "label=ring", out=task)
    assert read_pngs(folder).shape == (3, size[1], size[0])
    assert read_pngs(folder).float().std((1, 2)).min() > 1
    file = folder / "000004.png"
    assert command("sample.py", f"reproduce={file}") == 0
    assert "made again, bit for bit the same" in capfd.readouterr().out
    (again,) = (place / task / "000004-again").glob("0*.png")
    assert again.name == file.name
    assert torch.equal(read_image(again), read_image(file))


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in GIVEN if task not in DEAF])
def test_task_guidance_changes_image(task, run):
    given, _ = GIVEN[task]
    typed = (f"task={task}", *given, "num=1", "label=ring", "guidance=cfg")
    one, three = (read_pngs(draw(run, *typed, f"guidance.scale={scale}")) for scale in (1, 3))
    assert not torch.equal(one, three)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("super_resolution", "noise_level=0.5"),
        ("img2img", "image=other.png"),
        ("edit", "image=other.png"),
        ("img2img", "strength=0.3"),
        ("variations", "variation_strength=0.9"),
        ("interpolate", "seed_b=8"),
        ("inpaint", "image=other.png"),
        ("generate", "keep_conditions=[label]"),
    ],
)
def test_task_uses_every_input(task, change, run):
    given, _ = GIVEN[task]
    typed = (f"task={task}", "num=2", "label=ring")
    asked = {word.split("=")[0]: word for word in given}
    one = read_pngs(draw(run, *typed, *asked.values()))
    other = read_pngs(draw(run, *typed, *(asked | {change.split("=")[0]: change}).values()))
    assert not torch.equal(one, other)


def test_inpaint_preserves_known_pixels(run):
    image, drawn = read_image("in.png"), read_pngs(draw(run, "task=inpaint", *GIVEN["inpaint"][0], "num=2"))
    known = read_image("mask.png") == 0
    assert (drawn - image)[:, known].abs().max() <= 1
    assert (drawn - image)[:, ~known].abs().float().mean() > 5


@pytest.mark.parametrize("side", some_slow(["left", "right", "top", "bottom"], ["top"]))
def test_outpaint_preserves_original(side, run):
    drawn = read_pngs(draw(run, "task=outpaint", "image=in.png", f"pad_{side}=8", "num=1"))[0]
    top, left = (8 if side == name else 0 for name in ("top", "left"))
    assert (drawn[top : top + 32, left : left + 32] - read_image("in.png")).abs().max() <= 1


def test_held_out_images_replace_files(run):
    folder = draw(run, "task=inpaint", "held_out=true", "num=4", "metrics=full")
    record = json.loads((folder / "metrics.json").read_text())
    assert record["psnr"] > 5
    assert record["n"] == 4
    assert command("sample.py", f"reproduce={folder / '000002.png'}") == 0
    low = draw(run, "task=super_resolution", "held_out=true", "num=2", out="low")
    assert read_pngs(low).shape == (2, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["inpaint", "super_resolution"])
def test_task_is_independent_of_batch_size_and_processes(task, run, place, smoke):
    typed = (f"task={task}", *GIVEN[task][0], "num=16")
    whole = read_pngs(draw(run, *typed, "batch_size=16", out="whole"))
    assert (read_pngs(draw(run, *typed, "batch_size=1", out="single")) - whole).abs().max() <= 1
    if task == "inpaint":
        job = ("sample.py", f"run={run}", f"output_dir={place / 'two'}", "steps=3", *typed)
        done = processes(job, job, cwd=place, LDM_CACHE=str(smoke.folder / "cache"))
        assert not any(one.returncode for one in done), done
        assert (read_pngs(place / "two") - whole).abs().max() <= 1


def test_png_contains_provenance(run):
    text = Image.open(draw(run, "num=1", "label=ring") / "000000.png").text
    carried = json.loads(text["reproduce"])
    assert {"prompt", "seed", "run", "config", "reproduce"} <= text.keys()
    assert len(text["config"]) == 16
    assert carried["request"]["label"] == "ring"
    assert Path(carried["request"]["run"]).is_absolute()


@pytest.mark.slow
def test_reproduce_works_with_moved_run(run, place):
    file = draw(run, "num=2", "task=img2img", "image=in.png") / "000001.png"
    shutil.copytree(run, place / "moved")
    try:
        kept = run.rename(run.with_name("away"))
        assert command("sample.py", f"reproduce={file}", "run=moved", "output_dir=moved-again") == 0
    finally:
        kept.rename(run)
    assert torch.equal(read_image(place / "moved-again" / "000001.png"), read_image(file))


def test_reproduce_works_with_older_record(run, place):
    file = draw(run, "num=2", "label=ring") / "000001.png"
    with Image.open(file) as image:
        said = json.loads(image.text["reproduce"])
        for name in ("labels", "reconstruction_metrics"):
            del said["request"][name]
        carried = PngImagePlugin.PngInfo()
        carried.add_text("reproduce", json.dumps(said))
        image.save("older.png", pnginfo=carried)
    assert command("sample.py", "reproduce=older.png", "output_dir=older-again") == 0
    assert torch.equal(read_image(place / "older-again" / "000001.png"), read_image(file))


def wrong_weights(run: Path) -> None:
    from ldm.io import atomic

    file = run / "weights.safetensors"
    state, metadata = atomic.read_tensors(file), atomic.read_metadata(file)
    atomic.write_tensors(file, {name: value + 0.01 for name, value in state.items()}, metadata)


def test_reproduce_reports_why_it_cannot(run, place, capfd):
    write_image("fleeting.png", (32, 32), 5)
    file = draw(run, "num=2", "task=img2img", "image=fleeting.png") / "000001.png"
    shutil.copytree(run, place / "changed")
    wrong_weights(place / "changed")
    one_line(capfd, "was sampled with other weights than run=changed has now", f"reproduce={file}", "run=changed")
    write_image("fleeting.png", (32, 32), 6)
    one_line(capfd, "fleeting.png has changed since", f"reproduce={file}")
    Path("fleeting.png").unlink()
    one_line(capfd, "fleeting.png: no such file", f"reproduce={file}")
    one_line(capfd, "reproduce=in.png: 'reproduce'; expected an image that sample.py made", "reproduce=in.png")
    one_line(capfd, "reproduce=nowhere.png: no such file", "reproduce=nowhere.png")
    file.write_bytes(file.read_bytes()[:200])
    one_line(capfd, "expected an image that sample.py made, whole and unedited", f"reproduce={file}")


def one_line(capfd, expected: str, *overrides: str) -> None:
    assert_one_line_error(capfd, expected, "sample.py", "output_dir=nothing", *overrides)
    assert not Path("nothing").exists()


MISTAKES = {
    ("task=img2img",): "image=FILE must be given for this task, or held_out=true",
    ("task=img2img", "image=nowhere.png"): "image=nowhere.png: no such file or folder",
    ("task=img2img", "image=empty"): "image=empty: a folder without files of the kinds",
    ("task=img2img", "image=text.png"): "image=text.png cannot be read as an image",
    ("task=img2img", "image=cut.png"): "image=cut.png cannot be read as an image",
    ("task=img2img", "image=in.png", "strength=0"): "strength 0",
    ("task=img2img", "image=in.png", "strength=1.5"): "strength 1.5",
    ("task=img2img", "image=in.png", "strenght=1"): "no key 'strenght'; did you mean 'strength'?",
    ("task=inpaint", "image=in.png"): "mask=FILE must be given",
    (
        "task=inpaint",
        "image=in.png",
        "mask=wide.png",
    ): "mask=wide.png is 30x32 (width x height), image=in.png is 32x32: expected one size",
    ("task=inpaint", "image=in.png", "mask=black.png"): "mask=black.png has no white in it",
    ("task=outpaint", "image=in.png"): "expected pixels to add",
    ("task=outpaint", "image=in.png", "pad_right=3"): "multiples of 4",
    ("task=generate", "size=[30,32]"): "size=[30,32]: all sides must be multiples of 4",
    ("task=generate", "size=[32]"): "size=[32]: expected [height,width]",
    ("task=semantic", "map=colour.png"): "map=colour.png is of mode RGB: expected a grey or palette image",
    ("task=semantic", "map=mask.png"): "map with classes 0 to 255: expected 0 to 1",
    ("task=layout", "boxes=text.png"): "boxes=text.png: expected [[class, left, top, right, bottom], ...] in json",
    ("task=layout", "boxes=far.json"): "corner (1.5, 1) of a box",
    (
        "task=super_resolution",
        "low_res=small.png",
        "scale=2",
    ): "the condition is for latents of 6x10, those to be sampled are 3x5",
    ("task=instruct", "source=in.png"): "source: this model has no such condition",
    ("task=variations", "variation_strength=2"): "variation_strength=2: expected 0",
    ("crop=[1]",): "crop=[1]: expected [top,left] in pixels, 0 or more",
    ("original_size=[0,32]",): "original_size=[0, 32]: expected [height,width] in pixels, 1 or more",
    ("original_size=[64,32]",): "original_size=[64, 32]: this model has no size condition; leave it out",
    ("negative=a ring",): "negative=a ring: this model has no text condition",
    ("keep_conditions=[caption]",): "keep_conditions=caption: this model's conditions are label, low_res",
    ("held_out=true", "num=5000"): "num=5000: expected at most 512",
    ("prompts=binary.txt",): "prompts=binary.txt is not text in UTF-8",
    ("prompts=short.csv",): "prompts=short.csv, line 2: expected a label and a prompt",
    ("guidance=classifier",): "guidance=classifier needs a classifier: guidance.classifier=RUN",
    ("guidance=autoguidance",): "guidance=autoguidance needs a weaker model: guidance.weak=RUN",
}


@pytest.fixture(scope="module")
def broken(place):
    Path("empty").mkdir()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:300])
    Path("far.json").write_text("[[0, 0, 0, 1.5, 1]]")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("short.csv").write_text("label,prompt\nring\n")
    hole("wide.png", (30, 32), (0, 0, 4, 4))
    Image.new("L", (32, 32), 0).save("black.png")
    Image.new("RGB", (32, 32)).save("colour.png")


EARLY = [
    typed
    for typed in MISTAKES
    if len(typed) > 1 and typed[0] in ("task=img2img", "task=inpaint") and "strength" not in typed[-1]
]


@pytest.mark.parametrize("typed", some_slow(MISTAKES, EARLY), ids=" ".join)
def test_task_reports_error_in_one_line(typed, run, broken, capfd):
    one_line(capfd, MISTAKES[typed], f"run={run}", *typed)


def as_saved(name: str) -> torch.Tensor:
    from ldm.sampling.inputs import InputSpec, image_input

    return image_input(InputSpec((32, 32), 1), name)([0])[0, 0]


def test_load_image_accepts_every_mode(place):
    plain = Image.open("in.png")
    grey = as_saved("in.png")
    colour = plain.convert("RGB")
    colour.convert("CMYK").save("cmyk.tif")
    plain.convert("P").save("palette.png")
    Image.frombytes("I;16", (32, 32), b"".join(bytes([v, v]) for v in plain.tobytes())).save("deep.png")
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    plain.rotate(90).save("turned.png", exif=exif)
    wide = Image.new("L", (96, 32), 0)
    wide.paste(plain, (32, 0))
    wide.save("wide_picture.png")
    for name in ("cmyk.tif", "palette.png", "deep.png", "turned.png", "wide_picture.png"):
        assert (as_saved(name) - grey).abs().max() <= 2 / 127.5, name
    glass = colour.convert("RGBA")
    glass.putalpha(0)
    glass.save("glass.png")
    assert as_saved("glass.png").eq(1).all()


def test_image_folder_is_cycled(run, place):
    Path("many").mkdir()
    for seed in (0, 1):
        write_image(f"many/{seed}.png", (32, 32), seed)
    several = read_pngs(draw(run, "task=inpaint", "image=many", "mask=mask.png", "num=3"))
    known = read_image("mask.png") == 0
    for drawn, name in zip(several, ("many/0.png", "many/1.png", "many/0.png"), strict=True):
        assert (drawn - read_image(name))[known].abs().max() <= 1

"""The ControlNets and adapters of a request: their names, their files, and mistakes in one line."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import write_image
from omegaconf import OmegaConf
from PIL import Image

from ldm.errors import UserError
from ldm.sampling import adapters, control
from ldm.sampling.adapters import AdapterSpec, parse_adapter_specs
from ldm.sampling.inputs import InputSpec

SPEC = InputSpec((4, 6), 3)


class Reader:
    """A hint extractor of images: their mean over the channels, three times."""

    reads = "image"

    def __call__(self, image):
        return image.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def adapter(*nodes) -> list[SimpleNamespace]:
    return [SimpleNamespace(config=OmegaConf.create({"adapter": node})) for node in nodes]


def test_hints_are_numbered_from_the_models_own_on():
    hint = {"hint": {"extractor": {"_target_": "builtins.dict", "a": 1}}}
    other = {"hint": {"extractor": {"_target_": "builtins.dict", "a": 2}}}
    base = SimpleNamespace(adapters=adapter(hint, {}))
    specs = [SimpleNamespace(source=None), SimpleNamespace(source=SimpleNamespace(adapters=adapter(other, hint)))]
    assert control.hint_extractors(base, specs) == {"hint": {"a": 1}, "hint2": {"a": 2}, "hint3": {"a": 1}}


def test_hints_are_read_from_a_file_for_each(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (6, 4), (51, 0, 204)).save(path)
    assert [control.hint_files(hints) for hints in (None, path, [path, None])] == [[], [path], [path, None]]
    sources = partial(control.hint_sources, spec=SPEC, preprocess=False, available=None)
    two = {"hint": Reader(), "hint2": Reader()}
    assert sources(two, None) == {}
    found = sources(two, [None, path])
    assert found.keys() == {"hint2"}
    assert torch.equal(found["hint2"]([0])[0, :, 1, 2], torch.tensor([0.2, 0.0, 0.8]))
    extracted = sources(two, [path, path], preprocess=True)["hint"]([0])
    torch.testing.assert_close(extracted, torch.full((1, 3, 4, 6), (51 + 0 + 204) / 3 / 127.5 - 1))
    with pytest.raises(UserError, match="expected 2 files"):
        sources(two, [path])
    assert sources(two, None, available=["image"]) == {}
    with pytest.raises(UserError, match="hints=FILE must be given for the ControlNet of reader"):
        sources(two, None, available=["map"])
    assert sources({"hint": Reader()}, path, available=[]).keys() == {"hint"}
    other = write_image(tmp_path / "b.png", (4, 6))
    with pytest.raises(UserError, match=r"b\.png is 4x6 \(width x height\): expected 6x4"):
        sources({"hint": Reader()}, str(other))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("some", "expected {run: RUN, scale: 1.0}"),
        ({"scale": 1.0}, "expected {run: RUN, scale: 1.0}"),
        ({"run": 3}, "expected {run: RUN, scale: 1.0}"),
        ({"run": "a", "weight": 1.0}, "expected {run: RUN, scale: 1.0}"),
        ({"run": "a", "scale": "1"}, "scale=1 of a: expected a number"),
        ({"run": "a", "scale": True}, "scale=True of a: expected a number"),
    ],
    ids=str,
)
def test_adapters_of_a_request_are_checked(entry, said):
    with pytest.raises(UserError) as raised:
        parse_adapter_specs([entry], "run", None)
    assert said in str(raised.value)


def test_adapters_of_a_request_are_files_or_runs_of_the_models_latents(tmp_path, monkeypatch):
    file = tmp_path / "lora.safetensors"
    file.touch()
    source, base = SimpleNamespace(latent_space="f8c4-a"), SimpleNamespace(latent_space="f8c4-a")
    monkeypatch.setattr(adapters, "open_adapter", lambda run: source)
    found = parse_adapter_specs([{"run": str(file)}, {"run": "a", "scale": 2}], "run", base)
    assert found == [AdapterSpec(str(file), 1.0), AdapterSpec("a", 2.0, source)]
    base.latent_space = "f8c4-b"
    with pytest.raises(UserError, match="choose one of its latents"):
        parse_adapter_specs([{"run": "a"}], "run", base)

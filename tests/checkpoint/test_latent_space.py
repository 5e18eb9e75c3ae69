"""Nothing that was made in one autoencoder's latent space passes into another's: each way in is one line that names
both.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line_error
from smoke import command, composed, here, train

from ldm.checkpoint.latent_space import LatentSpace, require_same_latent_space
from ldm.config import build
from ldm.errors import UserError
from ldm.io import atomic

SMOKE = "budget=smoke"


def tiny(**other) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    node = composed(SMOKE, *(f"autoencoder.{name}={value}" for name, value in other.items())).autoencoder
    return build.build_autoencoder(node, 1), build.to_container(node)


def test_latent_space_identity_depends_on_config_weights_shift_and_scale():
    autoencoder, node = tiny()
    space = LatentSpace.from_autoencoder(autoencoder, node, "toy-1")
    assert space == LatentSpace.from_autoencoder(*tiny(), "toy-1")
    assert (
        space.identity == LatentSpace.from_autoencoder(autoencoder, node, "toy-2").identity
    )  # what it was calibrated on is told, and no part of the name
    assert re.fullmatch(r"f4c8-[0-9a-f]{12}", space.name)
    other, node2 = tiny(**{"encoder.num_groups": 2})
    other.load_state_dict(autoencoder.state_dict())
    seen = {
        space.identity,
        LatentSpace.from_autoencoder(other, node2).identity,
    }  # the same weights under another config are another encoder
    for name in ("shift", "scale", "encoder.stem.weight"):
        before = autoencoder.state_dict()[name].clone()
        with torch.no_grad():
            autoencoder.state_dict()[name].flatten()[0].add_(1e-3)
        seen.add(LatentSpace.from_autoencoder(autoencoder, node).identity)
        with torch.no_grad():
            autoencoder.state_dict()[name].copy_(before)
    assert len(seen) == 5
    assert LatentSpace.from_autoencoder(autoencoder, node, "toy-1") == space


def test_require_same_latent_space_names_both_and_remedy():
    require_same_latent_space(("a", "f4c8-1"), ("b", "f4c8-1"), "-")
    with pytest.raises(UserError, match=r"^weak=a belongs to autoencoder f4c8-1, this model to f8c4-2: do this$"):
        require_same_latent_space(("weak=a", "f4c8-1"), ("this model", "f8c4-2"), "do this")


def test_latent_space_metadata_round_trip(tmp_path):
    space, other = LatentSpace("a" * 64, "f4c8", "toy-1", 7), LatentSpace("b" * 64, "f8c4")
    file = tmp_path / "some.safetensors"
    atomic.write_tensors(file, {"x": torch.ones(1)}, space.metadata)
    assert LatentSpace.from_metadata(atomic.read_metadata(file), file) == space
    space.require_same_file(file, "-")
    with pytest.raises(
        UserError, match=r"some.safetensors belongs to autoencoder f4c8-a{12}, the one here is f8c4-b{12}; do this$"
    ):
        other.require_same_file(file, "do this")
    atomic.write_tensors(file, {"x": torch.ones(1)})
    with pytest.raises(UserError, match="does not say which autoencoder"):
        space.require_same_file(file, "-")
    file.write_bytes(b"nothing")
    with pytest.raises(atomic.CorruptFileError, match=r"7 bytes"):
        space.require_same_file(file, "-")


@pytest.fixture(scope="module")
def place(smoke, tmp_path_factory):
    """A cache with two first stages of one architecture, and a run of each; tests change copies."""
    folder = tmp_path_factory.mktemp("spaces")
    shutil.copytree(smoke.kept, folder / "cache")
    with here(folder):
        train("metrics=none", "name=one")
        train("metrics=none", "name=two", "first_stage.seed=1")
    return folder


@pytest.fixture
def copy(place, tmp_path):
    """(the copy's folder, the run of first stage one, the run of first stage two), as the working directory."""
    shutil.copytree(place, tmp_path / "copy")
    with here(tmp_path / "copy"):
        (one,), (two,) = (list(Path("runs").glob(f"*{name}*")) for name in ("one", "two"))
        yield tmp_path / "copy", one.absolute(), two.absolute()


def named(file: Path) -> str:
    return LatentSpace.from_metadata(atomic.read_metadata(file), file).name


def name_of(run: Path) -> str:
    return named(run / "first_stage.safetensors")


@contextmanager
def replaced(file: Path, other: Path) -> Iterator[None]:
    """Within the block the file is a copy of the other."""
    before = file.read_bytes()
    file.write_bytes(other.read_bytes())
    yield
    file.write_bytes(before)


def refused(capfd, *overrides: str, names: tuple[str, str], script: str = "train.py") -> str:
    """Check that a command ends with one line that has both names, and return the line."""
    error = assert_one_line_error(capfd, names[0], script, *overrides)
    assert names[0] != names[1]
    assert names[1] in error, error
    return error


@pytest.mark.slow
def test_run_files_contain_latent_space(copy):
    folder, one, two = copy
    assert name_of(one) != name_of(two)
    kept = [
        one / "weights.safetensors",
        one / "first_stage.safetensors",
        *(one / "checkpoints").glob("step-*/*.safetensors"),
    ]
    assert len(kept) == 4
    spaces = {LatentSpace.from_metadata(atomic.read_metadata(file), file) for file in kept}
    assert len(spaces) == 1
    (space,) = spaces
    assert space.images == 512
    assert space.data == json.loads((one / "data.json").read_text())["fingerprint"]
    assert {named(file) for file in (folder / "cache" / "latents").glob("*.safetensors")} >= {
        name_of(one),
        name_of(two),
    }


@pytest.mark.slow
def test_resume_in_other_latent_space_is_refused(copy, capfd):
    """Stopped after its last checkpoint; then its first stage was replaced: in the cache, all of it, or the run's own
    copy alone.
    """
    folder, one, two = copy
    names, typed = (name_of(one), name_of(two)), (SMOKE, "metrics=none", "name=one")
    (one / "metrics.json").unlink()
    kept = {
        name: file.parent
        for file in (folder / "cache/first_stage").glob("*/weights.safetensors")
        for name in [named(file)]
    }
    mine, theirs = kept[names[0]], kept[names[1]]

    with replaced(mine / "weights.safetensors", theirs / "weights.safetensors"):
        assert "put it back" in refused(
            capfd, *typed, names=names
        )  # the weights are not those that were measured there
        with replaced(mine / "metrics.json", theirs / "metrics.json"):
            assert "checkpoints/step-00000002" in refused(capfd, *typed, names=names)
            assert name_of(one) == names[0]  # nothing was overwritten
    with replaced(one / "first_stage.safetensors", two / "first_stage.safetensors"):
        assert f"{one.name}/first_stage.safetensors" in refused(capfd, *typed, names=names)
    assert command("train.py", *typed) == 0
    assert (one / "metrics.json").is_file()


@pytest.mark.slow
def test_latents_of_other_autoencoder_are_refused(copy, capfd):
    folder, one, two = copy
    files = {named(file): file for file in (folder / "cache" / "latents").glob("*.safetensors")}
    mine, theirs = files[name_of(one)], files[name_of(two)]
    mine.write_bytes(theirs.read_bytes())
    error = refused(capfd, SMOKE, "metrics=none", "seed=7", names=(name_of(one), name_of(two)))
    assert str(mine) in error


@pytest.mark.slow
def test_latents_of_other_data_are_refused(copy, capfd):
    folder, one, _ = copy
    (mine,) = [file for file in (folder / "cache" / "latents").glob("*.safetensors") if named(file) == name_of(one)]
    metadata = atomic.read_metadata(mine)
    atomic.write_tensors(mine, atomic.read_tensors(mine), {**metadata, "data": "toys-0123"})
    refused(capfd, SMOKE, "metrics=none", "seed=8", names=("toys-0123", metadata["data"]))


@pytest.mark.parametrize("what", ["weights", "first_stage"])
@pytest.mark.slow
def test_weights_with_other_first_stage_are_refused(what, copy, capfd):
    """Either of the two was taken from the other run, and the weights are named as a run, as a file, or as a step."""
    _, one, two = copy
    names = (name_of(one), name_of(two))
    shutil.copy(two / f"{what}.safetensors", one / f"{what}.safetensors")
    for run in (one, one / "weights.safetensors"):
        refused(capfd, f"run={run}", "num=1", "output_dir=nothing", names=names, script="sample.py")
    assert not Path("nothing").exists()


@pytest.mark.parametrize("kind", ["ema", "raw"])
@pytest.mark.slow
def test_checkpoint_of_other_run_is_refused(kind, copy, capfd):
    _, one, two = copy
    shutil.rmtree(one / "checkpoints")
    shutil.copytree(two / "checkpoints", one / "checkpoints")
    step = one / "checkpoints" / "step-00000002"
    refused(
        capfd,
        f"run={step}",
        f"weights={kind}",
        "num=1",
        "output_dir=nothing",
        names=(name_of(one), name_of(two)),
        script="sample.py",
    )
    if kind == "raw":
        refused(
            capfd,
            f"run={one}",
            "weights=raw",
            "num=1",
            "output_dir=nothing",
            names=(name_of(one), name_of(two)),
            script="sample.py",
        )


@pytest.mark.slow
def test_weak_model_of_other_latent_space_is_refused(copy, capfd):
    _, one, two = copy
    typed = (f"run={one}", "num=1", "output_dir=nothing", "guidance=autoguidance")
    refused(capfd, *typed, f"guidance.weak={two}", names=(name_of(one), name_of(two)), script="sample.py")


@pytest.mark.slow
def test_changed_first_stage_is_refused(copy, capfd):
    """Nobody replaced the file: a value in it was changed, or the config beside it that says how to read it."""
    _, one, _ = copy
    file = one / "first_stage.safetensors"
    state, metadata, whole = atomic.read_tensors(file), atomic.read_metadata(file), file.read_bytes()
    state["scale"] = state["scale"] * 1.1
    atomic.write_tensors(file, state, metadata)
    said = ("first_stage.safetensors", "was changed since")
    refused(capfd, f"run={one}", "num=1", "output_dir=nothing", names=said, script="sample.py")
    file.write_bytes(whole)
    config = (one / "config.yaml").read_text()
    (one / "config.yaml").write_text(config.replace("groups: 4", "groups: 2"))
    assert (one / "config.yaml").read_text() != config
    refused(capfd, f"run={one}", "num=1", "output_dir=nothing", names=said, script="sample.py")
    (one / "config.yaml").write_text(config.replace("z_channels: 8", "z_channels: 4"))
    refused(
        capfd, f"run={one}", "num=1", "output_dir=nothing", names=(name_of(one), "architecture"), script="sample.py"
    )


@pytest.mark.slow
def test_file_without_latent_space_is_refused(copy, capfd):
    _, one, _ = copy
    atomic.write_tensors(one / "weights.safetensors", atomic.read_tensors(one / "weights.safetensors"))
    refused(
        capfd,
        f"run={one}",
        "num=1",
        "output_dir=nothing",
        names=("weights.safetensors", "does not say which"),
        script="sample.py",
    )


@pytest.mark.slow
def test_samples_record_latent_space(copy):
    _, one, _ = copy
    assert command("sample.py", f"run={one}", "num=1", "steps=1", "output_dir=drawn") == 0
    assert json.loads(Path("drawn/metrics.json").read_text())["autoencoder"] == name_of(one)

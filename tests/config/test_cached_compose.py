"""Configs composed from cached parts equal those that Hydra composes from the files."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.config import cached_compose
from ldm.config.cached_compose import compose_config

FILES = {
    "main.yaml": "defaults: [net: small, _self_]\nseed: 0\nrun: ???\nname: null\n"
    "tag: null\nnode: {a: 1, b: '${seed}'}\n",
    "net/small.yaml": "width: 8\nlayers: [1, 2]\nextra: null\n",
    "net/large.yaml": "defaults: [small]\nwidth: 64\n",
    "tag/named.yaml": "word: x\n",
    "experiments/wide.yaml": "# @package _global_\ndefaults: [override /net: large]\nseed: 5\n",
}
OVERRIDES = [
    (),
    ("net=large",),
    ("seed=1", "net=large", "net.width=3"),
    ("net.width=3", "net.width=4", "run='a b=c'"),
    ("net.layers=[3]", "node={a: 2}"),
    ("node.a=${net.width}", "net.extra={k: [1, null]}"),
    ("seed=4", "+node.c=3", "node.c=4"),
    ("net.width=3", "~node.b", "node.a=2"),
    ("++node.d=1", "seed=2"),
    ("name=text", "seed=2"),
    ("+experiments=wide", "net.width=5", "seed=6"),
    ("net={width: 1}", "net.width=2"),
    ("net.width=9", "net={width: 1}"),
    ("hydra.job.name=other", "seed=3", "hydra.job.config.override_dirname.exclude_keys=[seed]", "net.width=2"),
]
REFUSED = [
    ("tag=text", "seed=2"),
    ("tag=named", "seed=2"),
    ("seed=1", "net.wide=2"),
    ("seed=1", "net=huge"),
    ("seed=1,2",),
    ("net.width.deep=3",),
    ("seed=1", "x=2"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def of_hydra(folder: Path, *overrides: str):
    """What Hydra composes."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("main", list(overrides), return_hydra_config=True)


def same(one, other) -> bool:
    """Whether two configs are equal with their `hydra` node, interpolations unresolved."""
    return OmegaConf.to_container(one) == OmegaConf.to_container(other) and OmegaConf.is_struct(one.node)


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_composed_config_equals_that_of_hydra(overrides, folder):
    expected = of_hydra(folder, *overrides)
    for _ in range(2):  # composed, then from the cache
        config = compose_config(folder, "main", overrides)
        assert same(config, expected)
        config.node.a = -1  # a copy: the next one does not see it
    for name in ("net", "node"):
        assert config[name]._metadata == expected[name]._metadata


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_refused_override_has_error_of_hydra(overrides, folder):
    errors = []
    for composing in (of_hydra, lambda folder, *words: compose_config(folder, "main", words)):
        with pytest.raises(Exception, match=r".+") as error:
            composing(folder, *overrides)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


def test_values_do_not_compose_again(folder, monkeypatch, tmp_path):
    cached_compose._compose.cache_clear()
    for width in range(5):
        assert compose_config(folder, "main", ("net=large", f"net.width={width}")).net.width == width
    assert compose_config(folder, "main", ("seed=3", "net=large")).seed == 3
    monkeypatch.chdir(tmp_path)
    assert same(compose_config(folder, "main", ("net=large", "seed=1")), of_hydra(folder, "net=large", "seed=1"))
    assert cached_compose._compose.cache_info().misses == 1


@pytest.mark.parametrize("name", ["net/small.yaml", "main.yaml", "experiments/wide.yaml"])
def test_changed_file_is_read_again(name, folder):
    words = ("+experiments=wide", "node.a=3")
    compose_config(folder, "main", words)
    (folder / name).write_text((folder / name).read_text() + "more: 1\n")
    changed = compose_config(folder, "main", words)
    assert same(changed, of_hydra(folder, *words))
    assert "more" in (changed.net if name.startswith("net") else changed)


def test_folder_of_another_source_is_watched(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "net").mkdir()
    search = [f"hydra.searchpath=['file://{other}']"]
    for width in (7, 11):
        (other / "net" / "user.yaml").write_text(f"width: {width}\n")
        assert compose_config(folder, "main", ("net=user", "seed=1"), search, (other,)).net.width == width

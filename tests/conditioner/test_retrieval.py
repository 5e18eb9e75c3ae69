"""Nearest neighbours against brute force, their embeddings as context, databases that are cached and belong to runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from towers import CLIP

from ldm.conditioner.retrieval import GRID, Retrieval, nearest_rows
from ldm.data.memory import InMemoryDataset
from ldm.data.subset import Subset
from ldm.data.wrapper import WrappedDataset
from ldm.errors import ConfigError, UserError
from ldm.io import atomic
from ldm.recipes import retrieval as recipe
from ldm.tensors import KeyedNoise

CPU = torch.device("cpu")


def brute_force(queries, database, k, exclude=None):
    """Sort all rows by decreasing product, then by their number."""
    found = []
    for i, query in enumerate(queries.tolist()):
        others = [row for row in range(len(database)) if exclude is None or row != exclude[i]]
        product = {row: sum(a * b for a, b in zip(query, database[row].tolist(), strict=True)) for row in others}
        found.append(sorted(others, key=lambda row: (-product[row], row))[:k])
    return torch.tensor(found)


def whole_numbers(rows, seed):
    """Vectors with few different products, so that many are equal."""
    return torch.randint(-2, 3, (rows, 3), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("size", [(1024, 8192), (4, 5), (3, 1)])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_nearest_rows_are_those_of_brute_force_with_equal_ones_in_order(k, size):
    database, queries = whole_numbers(17, 0), whole_numbers(9, 1)
    assert torch.equal(nearest_rows(queries, database, k, size=size), brute_force(queries, database, k))
    exclude = torch.arange(17)
    expected = brute_force(database, database, k, exclude.tolist())
    assert torch.equal(nearest_rows(database, database, k, exclude, size), expected)
    assert not (expected == exclude[:, None]).any()


def test_nearest_rows_do_not_depend_on_rounding_of_equal_rows():
    """Equal rows at different places of a product differ in their last digits."""
    one = torch.nn.functional.normalize(torch.randn(1, 67, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = nearest_rows(one.repeat(3, 1), one.repeat(41, 1), 41, size=(2, 13))
    assert torch.equal(rows, torch.arange(41).expand(3, -1))
    assert GRID < 2**53


@pytest.mark.parametrize(("k", "exclude", "most"), [(5, None, 4), (4, torch.arange(4), 3)])
def test_more_neighbours_than_rows_are_one_line(k, exclude, most):
    other = "" if exclude is None else " other"
    with pytest.raises(ConfigError, match=f"^conditioner.k={k}: expected at most {most}, the{other} rows of the"):
        nearest_rows(torch.ones(4, 2), torch.ones(4, 2), k, exclude)


def test_database_is_moved_to_the_device_of_the_model():
    anchor = torch.empty(0, device="meta")
    part = SimpleNamespace(embeddings=torch.ones(4, 3), device_anchor=anchor, rows_key="rows", context_dim=3)
    cond = Retrieval.forward(part, {"rows": torch.zeros(2, 1, dtype=torch.int64)})
    assert (cond.context.device.type, cond.context.shape) == ("meta", (2, 1, 3))
    assert part.embeddings.device.type == "meta"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("clip") / "clip.json"
    file.write_text(json.dumps(CLIP))
    return str(file)


@pytest.fixture
def part(model):
    return build(model)


def build(model, **options):
    with torch.random.fork_rng():
        return Retrieval(k=3, model=model, random=True, **options)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def some_images(seed=0, num=7):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[5:6] = images[2:3]  # two equal ones
    captions = {"a": ["a disc", "one disc", "a photo of a disc"], "b": ["a ring", ""]}
    return InMemoryDataset(f"some{seed}", images, torch.arange(num) % 2, captions, flip=True)


def test_context_is_embeddings_of_nearest_other_images(part):
    data = some_images()
    assert not part({"image": data.pixels([0, 1])}).context.any()  # no database yet
    recipe.load_databases(part, data, None)
    near = recipe.add_neighbours(part, WrappedDataset(data))
    embedded = part.embed_images(data.pixels(range(7)), CPU)
    torch.testing.assert_close(part.embeddings, embedded, atol=1e-6, rtol=0)
    rows = brute_force(embedded, embedded, 3, range(7))
    for batch in (near.batch([(0, 5), (3, 2)]), near.batch_metadata([(0, 5), (3, 2)])):
        assert torch.equal(batch["nearest_images"], rows[[5, 2]])
        assert batch["nearest_images"][:, 0].tolist() == [2, 5]  # the equal one, not itself
        context = part(batch).context
        assert context.shape == (2, 3, 16)
        torch.testing.assert_close(context, 4 * embedded[rows[[5, 2]]], atol=1e-5, rtol=0)
    torch.testing.assert_close(part(batch).context.norm(dim=2), torch.full((2, 3), 4.0))
    null = part.null({"noise": KeyedNoise(0, [0, 1])})
    assert not null.context.any()
    assert null.context.shape == context.shape
    assert torch.equal(part({"noise": KeyedNoise(0, [0, 1])}).context, null.context)
    assert not [*part.parameters(), *part.state_dict()]


def test_query_is_the_image_or_else_the_caption(part):
    data = some_images()
    recipe.load_databases(part, data, None)
    image = some_images(1).pixels([0, 4])
    by_image = brute_force(part.embed_images(image, CPU), part.embeddings, 3)
    by_text = brute_force(part.embed_texts(["a ring", "a disc"], CPU), part.embeddings, 3)
    asked = {"caption": ["a ring", "a disc"], "image": image}
    assert torch.equal(part(asked).context, 4 * part.embeddings[by_image])
    assert torch.equal(part({"caption": asked["caption"]}).context, 4 * part.embeddings[by_text])
    assert not torch.equal(by_image, by_text)


def test_nearest_captions_are_those_of_the_data(model):
    part, data = build(model, database="captions"), some_images()
    recipe.load_databases(part, data, None)
    captions = ["a disc", "one disc", "a photo of a disc", "a ring"]
    texts = part.embed_texts(captions, CPU)
    torch.testing.assert_close(part.embeddings, texts, atol=1e-6, rtol=0)
    rows = recipe.add_neighbours(part, data).batch_metadata([(0, 1)])["nearest_captions"]
    assert torch.equal(rows, brute_force(part.embed_images(data.pixels([1]), CPU), texts, 3))


def test_neighbours_of_held_out_images_are_among_the_training_images(part):
    data, held_out = some_images(), Subset(some_images(1), [6, 0])
    recipe.load_databases(part, data, None)
    batch = recipe.add_neighbours(part, held_out).batch([(0, 0), (0, 1)])
    expected = brute_force(part.embed_images(some_images(1).pixels([6, 0]), CPU), part.embeddings, 3)
    assert torch.equal(batch["nearest_images"], expected)
    again = recipe.add_neighbours(part, Subset(data, [2])).batch([(0, 0)])["nearest_images"]
    assert again[0, 0] in (2, 5)  # another data set by its fingerprint: an image may be its own neighbour there


def test_embeddings_and_neighbours_are_computed_once(part, model, folder, monkeypatch):
    def near(part):
        recipe.load_databases(part, some_images(), None)
        return recipe.add_neighbours(part, some_images()).tables["nearest_images"]

    first, second = near(part), build(model)
    monkeypatch.setattr(recipe, "nearest_rows", None)
    monkeypatch.setattr(second, "embed_images", None)
    assert torch.equal(near(second), first)
    monkeypatch.undo()
    monkeypatch.setenv("LDM_CACHE", str(folder / "cache"))
    for file in (folder / "cache" / "retrieval").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])  # damaged: computed again
    assert torch.equal(near(build(model)), first)


def test_database_belongs_to_the_run(part, model, folder):
    recipe.load_databases(part, some_images(), folder)
    loaded = build(model)
    loaded.load_files(folder)
    asked = {"caption": ["a ring", "a disc"]}
    assert torch.equal(loaded(asked).context, part(asked).context)
    assert loaded.source == some_images().fingerprint
    atomic.write_tensors(folder / part.file, {"embeddings": part.embeddings[:2]}, {"data": "x"})
    with pytest.raises(ConfigError, match=r"^conditioner.k=3: expected at most 2, the rows of the database"):
        build(model).load_files(folder)
    (folder / part.file).unlink()
    with pytest.raises(UserError, match=f"{part.file} is missing: the database of conditioner=retrieval"):
        build(model).load_files(folder)


class Endless:
    fingerprint = "endless"


def config(*parts):
    nodes = [{"_target_": "ldm.conditioner.retrieval.Retrieval", **part} for part in parts]
    compose = {"_target_": "ldm.conditioner.compose.Compose", "a": nodes[0], "b": nodes[-1]}
    return OmegaConf.create({"conditioner": nodes[0] if len(nodes) == 1 else compose})


@pytest.mark.parametrize(
    ("parts", "data", "expected"),
    [
        ([{}], Endless(), "conditioner: these data have no length, and all images are embedded"),
        ([{"k": 7}], some_images(), "conditioner.k=7: expected at most 6, the images"),
        ([{"k": 5, "database": "captions"}], some_images(), "conditioner.k=5: expected at most 4, the captions"),
        ([{}, {"k": 2}], some_images(), "conditioner.b.database=images: another retrieval has this database"),
    ],
)
def test_data_that_cannot_be_a_database_are_one_line(parts, data, expected):
    with pytest.raises(UserError) as error:
        recipe.check_retrieval(config(*parts), data)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
    recipe.check_retrieval(config({"k": 6}, {"k": 4, "database": "captions"}), some_images())

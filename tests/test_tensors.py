from hashlib import sha256

import pytest
import torch

from ldm.tensors import KeyedNoise, choose, derive_seed, expand, hash_state_dict, mean_per_sample


def test_expand_broadcasts_over_all_but_batch():
    assert expand(torch.arange(3.0), torch.zeros(3, 2, 4, 4)).shape == (3, 1, 1, 1)
    assert expand(torch.tensor(2.0), torch.zeros(3, 2)).shape == ()


def test_mean_per_sample():
    assert mean_per_sample(torch.arange(12.0).reshape(2, 3, 2)).tolist() == [2.5, 8.5]


def test_derive_seed_depends_on_every_part():
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert 0 <= derive_seed(1, "a", 2) < 2**63
    assert (
        len(
            {
                derive_seed(1, "a", 2),
                derive_seed(2, "a", 1),
                derive_seed(1, "b", 2),
                derive_seed(1, "a", (2, 3)),
                derive_seed(1, "a", 2, 3),
                derive_seed("1", "a", 2),
            }
        )
        == 6
    )
    assert derive_seed(0, "weights") == 2934036865011653446  # kept for ever: a run's random numbers are a promise


def test_choose_follows_key_and_reaches_every_option():
    assert [choose("abc", 0, "told", i) for i in range(30)] == ["abc"[derive_seed(0, "told", i) % 3] for i in range(30)]
    assert {choose("abc", 0, "told", i) for i in range(30)} == set("abc")


def test_hash_state_dict_is_stable():
    state = {"b.weight": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(7), "a": torch.tensor([True, False])}
    old = sha256()
    for name, value in sorted(state.items()):
        old.update(name.encode() + value.contiguous().numpy().tobytes())
    assert (
        hash_state_dict(state) == old.hexdigest() == "e1eb0c4598ebd5ed9be86c76d66e98d5389b7a3fd8a247e58c0ad18317352a32"
    )
    assert hash_state_dict(dict(reversed(state.items()))) == old.hexdigest()
    assert len(hash_state_dict({"a": torch.zeros(2, dtype=torch.bfloat16)})) == 64  # a dtype that numpy lacks


def test_keyed_noise_is_independent_of_batch():
    x = torch.empty(4, 2, 3)
    whole = KeyedNoise(7, [10, 11, (3, 12), 13]).normal("eps", x)
    assert torch.equal(KeyedNoise(7, [(3, 12), 10]).normal("eps", x[:2]), whole[[2, 0]])
    parts = [KeyedNoise(7, [i]).normal("eps", x[:1]) for i in (10, 11, (3, 12), 13)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("change", ["seed", "purpose", "index", "epoch"])
def test_keyed_noise_changes_with_every_key(change):
    x = torch.empty(1, 50)
    base = KeyedNoise(0, [(0, 5)]).normal("a", x)
    other = {
        "seed": lambda: KeyedNoise(1, [(0, 5)]).normal("a", x),
        "purpose": lambda: KeyedNoise(0, [(0, 5)]).normal("b", x),
        "index": lambda: KeyedNoise(0, [(0, 6)]).normal("a", x),
        "epoch": lambda: KeyedNoise(0, [(1, 5)]).normal("a", x),
    }[change]()
    assert (base != other).all()
    assert abs(torch.corrcoef(torch.stack([base[0], other[0]]))[0, 1]) < 0.5


def test_keyed_noise_has_its_distribution():
    noise, x = KeyedNoise(0, list(range(100))), torch.empty(100, 200)
    normal, uniform = noise.normal("n", x), noise.uniform("u", x)
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(normal[:, :50].T).fill_diagonal_(0)).max() < 0.5


def test_keyed_noise_has_dtype_of_tensor():
    x = torch.empty(2, 3, dtype=torch.float64)
    assert KeyedNoise(0, [0, 1]).normal("a", x).dtype == torch.float64
    assert torch.equal(KeyedNoise(0, [0, 1]).normal("a", x).float(), KeyedNoise(0, [0, 1]).normal("a", x.float()))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_keyed_noise_is_the_same_in_float64(kind):
    """Also where float64 is the default type, as within a training step with trainer.precision=64."""
    x, noise = torch.zeros(3, 5), KeyedNoise(0, range(3))
    expected = getattr(noise, kind)("t", x).double()
    assert torch.equal(getattr(noise, kind)("t", x.double()), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(getattr(noise, kind)("t", x.double()), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_keyed_uniform_is_below_one_in_every_dtype(dtype):
    single = KeyedNoise(0, list(range(100))).uniform("u", torch.empty(100, 1000))
    drawn = KeyedNoise(0, list(range(100))).uniform("u", torch.empty(100, 1000, dtype=dtype))
    assert drawn.dtype == dtype
    assert single.to(torch.bfloat16).max() == 1  # what rounding alone makes of these numbers
    assert 0 <= drawn.min() <= drawn.max() < 1
    assert (drawn.double() - single.double()).abs().max() <= torch.finfo(dtype).eps / 2
    assert torch.equal(drawn, single.to(dtype)) or dtype in (torch.float16, torch.bfloat16)


def test_sampler_noise_advances_and_restarts():
    x = torch.empty(2, 3)
    first, again = KeyedNoise(0, [0, 1]).sampler_noise("s"), KeyedNoise(0, [0, 1]).sampler_noise("s")
    a, b = first(x), first(x)
    assert not torch.equal(a, b)
    assert torch.equal(a, again(x))
    assert torch.equal(b, again(x))


def test_keyed_noise_preserves_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    KeyedNoise(0, [0]).normal("a", torch.empty(1, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_keyed_noise_requires_one_key_per_row():
    with pytest.raises(ValueError, match="2 rows, the tensor has 3"):
        KeyedNoise(0, [0, 1]).normal("a", torch.empty(3, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniform_numbers_reach_the_largest_below_one(dtype):
    """Of 100,000 numbers some are nearer to 1 than to any other number of the type: they are the largest below it."""
    x = KeyedNoise(0, [0]).uniform("u", torch.empty(1, 100_000, dtype=dtype))
    assert x.max().item() == 1 - torch.finfo(dtype).eps / 2
    assert x.min().item() >= 0

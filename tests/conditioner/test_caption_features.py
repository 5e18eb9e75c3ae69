"""The three places of captions' features give the same numbers; files are shared, resumed after a kill, and mended."""

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_text import Letters
from torch import nn

from ldm.conditioner import features as features_module
from ldm.conditioner.compose import Compose
from ldm.conditioner.features import (
    FeatureCache,
    OnlineFeatures,
    StoredFeatures,
    hash_texts,
    most_bytes,
    replace_caches,
    text_caches,
)
from ldm.conditioner.label import Label
from ldm.conditioner.minilm import Bert
from ldm.conditioner.text import Text, TextTokensOnly
from ldm.conditioner.tokens import TextFeatures, Truncation
from ldm.errors import ConfigError, UserError
from ldm.io.atomic import CorruptFileError
from ldm.training.text_features import TextFeatures as TextFeaturesCallback

CPU = torch.device("cpu")
CAPTIONS = ["", *(chr(97 + i % 26) * (1 + i % 11) for i in range(40)), "unlike the others"]
BATCH = ["c" * 3, "unlike the others", "c" * 3, "", "not known before"]


class StoredLetters(Letters):
    """Letters that tell all that decides their features."""

    fingerprint = "letters of three numbers"


class Words(nn.Module):
    """A transformer with random weights in float64: rounding that depends on the batch is seen, and little."""

    context_dim, vector_dim, length, identity, fingerprint = 8, 8, 64, "words", "words"

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.bert = Bert(128, 64, 8, 2, 16, 2).double()
        self.truncation = Truncation()

    def forward(self, texts, length=None):
        ids = [torch.tensor([1, *(ord(c) for c in text[: (length or 64) - 2]), 2]) for text in texts]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True)
        context = self.bert(nn.utils.rnn.pad_sequence(ids, batch_first=True), mask)
        real = mask[..., None]
        return TextFeatures(context, mask, (context * real).sum(1) / real.sum(1))


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(features_module, "CAPTIONS_PER_FILE", 16)  # three files


def stored(encoder, folder, captions=CAPTIONS, length=24):
    features = StoredFeatures(encoder, length, captions, folder)
    features.write_missing(CPU)
    return features


def ahead(encoder):
    features = FeatureCache(encoder, 24)
    features.encode_all(CAPTIONS, CPU)
    return features


def assert_equal(one, other, tolerance=0.0):
    assert one.context.shape == other.context.shape
    assert torch.equal(one.mask, other.mask)
    for a, b in ((one.context, other.context), (one.vector, other.vector)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_features_are_equal_wherever_they_are(tmp_path):
    encoder = Words()
    torch.set_default_dtype(torch.float64)
    try:
        lazy, known, disk = FeatureCache(encoder, 24), ahead(encoder), stored(encoder, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    online = OnlineFeatures(encoder, 24)
    for batch in (BATCH, CAPTIONS, [""] * 3, ["x" * 30], []):
        expected = lazy.condition(batch, CPU)
        assert_equal(known.condition(batch, CPU), expected)
        assert_equal(disk.condition(batch, CPU), expected)
        assert_equal(online.condition(batch, CPU), expected, 1e-12)
    assert expected.vector.shape == (0, 8)


def test_features_encode_each_known_caption_once(tmp_path):
    for features in (ahead(StoredLetters()), stored(StoredLetters(), tmp_path)):
        assert sorted(features.encoder.seen) == sorted(set(CAPTIONS))
        for _ in range(2):
            features.condition(CAPTIONS[::-1], CPU)
            features.condition(["new"], CPU)
        assert sorted(features.encoder.seen) == sorted({*CAPTIONS, "new"})
    assert stored(encoder := StoredLetters(), tmp_path).condition(BATCH[:4], CPU).context.shape == (4, 24, 3)
    assert encoder.seen == []  # another run reads the files
    assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_captions_encoded_ahead_stay_when_others_are_dropped(monkeypatch):
    monkeypatch.setattr(features_module, "MAX_CACHE_VALUES", 30)
    features = ahead(Letters())
    for text in ("abcdefghij", "bcd", "cdefghi", "bc"):
        cond = features.condition([text, "c" * 3], CPU)
        assert cond.context[0, cond.mask[0], 0].tolist() == [1, *map(ord, text), 2]
    assert features.encoder.seen[len(set(CAPTIONS)) :] == ["abcdefghij", "bcd", "cdefghi", "bc"]
    assert len(features.row) < len(set(CAPTIONS)) + 4
    features.condition(CAPTIONS, CPU)
    assert len(features.encoder.seen) == len(set(CAPTIONS)) + 4


def test_captions_encoded_ahead_are_not_counted_as_others(monkeypatch):
    monkeypatch.setattr(features_module, "MAX_CACHE_VALUES", 30)
    features = ahead(Letters())
    for _ in range(2):
        features.condition(["bc"], CPU)  # four tokens of three values
    assert features.encoder.seen.count("bc") == 1


def test_tables_are_moved_to_the_device_of_the_batch():
    features = ahead(Letters())
    features.move(torch.device("meta"))
    assert {table.device.type for table in (features.context, features.token_rows, features.vector)} == {"meta"}


def test_texts_are_hashed_with_their_lengths():
    assert len({hash_texts(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4


def test_features_of_captions_take_at_most_their_length():
    cache = FeatureCache(SimpleNamespace(context_dim=8, vector_dim=3), 77)
    assert most_bytes(cache, 10) == 4 * 10 * (77 * 8 + 3)


def test_each_process_begins_at_its_own_share(tmp_path, monkeypatch):
    written, counts = [], (0, 1, 2)
    monkeypatch.setattr(StoredFeatures, "write", lambda self, number, device: written.append(number))
    for rank in counts:
        StoredFeatures(StoredLetters(), 24, CAPTIONS, tmp_path).write_missing(CPU, rank, 3)
    # twice over: nothing was written, so the second time finds them missing again
    assert [written[6 * rank : 6 * rank + 3] for rank in counts] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_online_features_are_computed_in_each_batch():
    features = OnlineFeatures(Letters(), 24)
    for _ in range(2):
        features.condition(["ab", "c", "ab"], CPU)
    assert features.encoder.seen == ["ab", "c", "ab", "c"]
    assert vars(features).keys() == {"encoder", "length"}


def test_stored_features_are_named_by_encoder_length_and_captions(tmp_path):
    other = StoredLetters()
    other.fingerprint = "letters with another tokenizer"
    folders = {
        stored(StoredLetters(), tmp_path).folder,
        stored(other, tmp_path).folder,
        stored(StoredLetters(), tmp_path, length=16).folder,
        stored(StoredLetters(), tmp_path, captions=[*CAPTIONS, "one more"]).folder,
    }
    assert len(folders) == 4
    assert stored(StoredLetters(), tmp_path, captions=CAPTIONS[::-1] * 2).folder in folders
    with pytest.raises(ConfigError, match="Letters has no `fingerprint`, by which features are stored; choose memory"):
        StoredFeatures(Letters(), 24, CAPTIONS, tmp_path)


def write_and_die(folder):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    features, replace, written = StoredFeatures(StoredLetters(), 24, CAPTIONS, folder), os.replace, []

    def replace_one(source, target):
        kill() if written else replace(source, target)
        written.append(target)

    os.replace = replace_one
    features.write_missing(CPU)


def write_and_tell(folder, rank, barrier, texts):
    features = StoredFeatures(StoredLetters(), 24, CAPTIONS, folder)
    barrier.wait()
    features.write_missing(CPU, rank, 2)
    texts.put((rank, features.encoder.seen, features.condition(CAPTIONS, CPU).context.sum().item()))


def encode_ahead(folder, rank, texts):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features = ahead(Letters())
    texts.put((rank, features.encoder.seen, features.condition(CAPTIONS, CPU).context.sum().item()))
    torch.distributed.destroy_process_group()


def run_two(target, folder, *args):
    """Call target(folder, rank, *args, queue) in two processes; return what each put into the queue."""
    context = multiprocessing.get_context("fork")
    texts = context.Queue()
    children = [context.Process(target=target, args=(folder, rank, *args, texts)) for rank in range(2)]
    for child in children:
        child.start()
    results = sorted(texts.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    return results


def test_features_killed_while_written_are_completed(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    features = stored(StoredLetters(), tmp_path)
    assert features.encoder.seen == [*features.texts[1], *features.texts[2]]  # the first file was complete
    assert_equal(features.condition(CAPTIONS, CPU), ahead(Letters()).condition(CAPTIONS, CPU))
    assert {path.suffix for path in features.folder.iterdir()} <= {".safetensors", ".lock"}


def test_two_processes_share_the_work_and_the_files(tmp_path):
    total = ahead(Letters()).condition(CAPTIONS, CPU).context.sum().item()
    barrier = multiprocessing.get_context("fork").Barrier(2)
    for target, args in ((write_and_tell, [barrier]), (encode_ahead, [])):
        (_, first, one), (_, second, other) = run_two(target, tmp_path, *args)
        assert sorted(first + second) == sorted(set(CAPTIONS))
        assert min(len(first), len(second)) > 0
        assert one == other == total


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_written_again(tmp_path, keep):
    features = stored(StoredLetters(), tmp_path)
    path = features.path(1)
    path.write_bytes(path.read_bytes()[:keep])
    again = stored(StoredLetters(), tmp_path)
    assert again.encoder.seen == again.texts[1]
    assert_equal(again.condition(CAPTIONS, CPU), ahead(Letters()).condition(CAPTIONS, CPU))


def test_changed_bytes_of_a_file_are_one_line(tmp_path):
    path = stored(StoredLetters(), tmp_path).path(0)
    data = bytearray(path.read_bytes())
    at = data.index(torch.tensor([float(ord("a"))]).numpy().tobytes())
    data[at + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError) as error:
        stored(StoredLetters(), tmp_path).condition(CAPTIONS, CPU)
    assert str(error.value).startswith(f"{path} is damaged: caption ")
    assert "\n" not in str(error.value)
    assert issubclass(CorruptFileError, UserError)


def test_caches_of_all_text_encoders_are_replaced():
    tokens, text = TextTokensOnly(Letters(), 16), Text(Letters(), 8)
    conditioner = Compose(label=Label(3, 4), tokens=tokens, text=text)
    caches = text_caches(conditioner)
    assert caches == [tokens.cache, text.cache]
    replace_caches(conditioner, lambda cache: OnlineFeatures(cache.encoder, cache.length))
    assert [type(tokens.cache), text.cache.length, text.cache.encoder] == [OnlineFeatures, 8, caches[1].encoder]


@pytest.mark.parametrize("mode", ["memory", "disk", "online"])
def test_callback_prepares_features_before_the_first_step(tmp_path, mode):
    text = Text(StoredLetters(), 24)
    lit = SimpleNamespace(model=SimpleNamespace(conditioner=text), device=CPU)
    TextFeaturesCallback(mode, CAPTIONS, tmp_path).on_train_start(SimpleNamespace(global_rank=0, world_size=1), lit)
    kind = {"memory": FeatureCache, "disk": StoredFeatures, "online": OnlineFeatures}[mode]
    assert type(text.cache) is kind
    assert sorted(text.cache.encoder.seen) == ([] if mode == "online" else sorted(set(CAPTIONS)))
    assert_equal(text({"caption": BATCH[:4]}), FeatureCache(Letters(), 24).condition(BATCH[:4], CPU), 1e-6)
    assert len(text.cache.encoder.seen) == (3 if mode == "online" else len(set(CAPTIONS)))

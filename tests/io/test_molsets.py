import io
import pickle
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.io import molsets
from ldm.io.molsets import filter_patterns, read_object_array, reference_statistics


def object_array(value: object) -> bytes:
    """A .npy file of one object as MOSES's has it: pickled under numpy 1, whose modules had other names."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue() + pickle.dumps(np.array(value, object), protocol=2).replace(b"numpy._core.", b"numpy.core.")


STATISTICS = {
    "FCD": {"mu": np.arange(3, dtype=np.float32), "sigma": np.eye(3)},
    "SNN": {"fps": np.array([[1, 0] * 8, [0] * 15 + [1]], np.uint8)},
    "Frag": {"frag": Counter("aab")},
}


def test_statistics_are_read_and_stored_as_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(molsets, "moses", lambda root: tmp_path)
    with zipfile.ZipFile(tmp_path / "test_stats.npz", "w") as archive:
        archive.writestr("stats.npy", object_array(STATISTICS))
    first = reference_statistics("test")
    assert first["mu"].tolist() == [0, 1, 2]
    assert first["mu"].dtype == first["sigma"].dtype == torch.float64
    assert torch.equal(first["sigma"], torch.eye(3, dtype=torch.float64))
    assert first["fingerprints"].tolist() == [[0b10101010] * 2, [0, 1]]
    (tmp_path / "test_stats.npz").unlink()  # it is not read again
    assert torch.equal(reference_statistics("test")["fingerprints"], first["fingerprints"])


class Malicious:
    def __reduce__(self):
        return eval, ("open('executed', 'w').close()",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (object_array({"FCD": Malicious()}), r"it names (builtins|__builtin__)\.eval"),
        (object_array(STATISTICS)[:-300], "not a pickle of arrays"),
        (object_array([1, 2]), "expected a dictionary"),
        (b"\x93NUMPY\x02\x00v\x00", "expected a .npy file of version 1"),
    ],
    ids=["executes", "truncated", "list", "version"],
)
def test_other_pickles_are_refused_unexecuted(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read_object_array(content)
    assert not (tmp_path / "executed").exists()


def test_filter_patterns_of_both_files(tmp_path, monkeypatch):
    monkeypatch.setattr(molsets, "moses", lambda root: tmp_path)
    (tmp_path / "mcf.csv").write_text('names,smarts\nMCF1,C=N\nMCF4,"[H]C[F,Cl]"\n')
    (tmp_path / "wehi_pains.csv").write_text('"c:1-[#6,$(N)]"   ,"<regId=a(1)>"\n')
    assert filter_patterns() == ["C=N", "[H]C[F,Cl]", "c:1-[#6,$(N)]"]

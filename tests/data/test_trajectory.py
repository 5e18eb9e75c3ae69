"""Trajectories of one's own: pairs, what is left out, and what is refused."""

import pytest
import torch

from ldm.data.trajectory import OwnTrajectories, TrajectoryDataset
from ldm.errors import UserError
from ldm.io import atomic


def some_states(num: int = 3, times: int = 4, shape: tuple[int, ...] = (2, 5)) -> torch.Tensor:
    return torch.randn(num, times, *shape, generator=torch.Generator().manual_seed(0))


def test_pairs_that_are_not_finite_are_left_out_and_counted():
    states = some_states()
    states[1, 2, 0, 3], states[2, 0, 1, 1] = torch.nan, torch.inf  # in two pairs and in one
    data = TrajectoryDataset("some", states, 10.0, torch.arange(3.0)[:, None])
    assert (len(data), data.skipped) == (6, 3)
    assert data.summary == "some: 6 pairs of successive states, 3 that are not finite left out"
    batch = data.batch([(0, i) for i in range(6)])
    assert batch["vector"].flatten().tolist() == [0, 0, 0, 1, 2, 2]
    assert torch.equal(batch["before"][3], states[1, 0])
    torch.testing.assert_close(10 * batch["image"][3], states[1, 1] - states[1, 0])
    assert batch["image"].isfinite().all()


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_files_are_split_by_trajectory(tmp_path, suffix):
    import numpy as np

    states, path = some_states(5, 3, (1, 4, 4)), tmp_path / f"flow.{suffix}"
    if suffix == "npy":
        np.save(path, states.double().numpy())
    else:
        atomic.write_tensors(path, {"states": states})
    train, test = (OwnTrajectories(path, split, test_fraction=0.3) for split in ("train", "test"))
    assert torch.equal(torch.cat([train.states, test.states]), states)
    assert (len(train), len(test), train.shape, train.name) == (6, 4, (1, 4, 4), "flow-train")
    assert train.scale == test.scale == states.diff(dim=1).abs().max()
    assert OwnTrajectories(path, **train.resolved_config).scale == train.scale
    with pytest.raises(UserError, match=r"flow.*: its states are not those of this run \(digest [^\n]*$"):
        OwnTrajectories(path, content_hash="0")


def test_unusable_files_are_one_line(tmp_path):
    import numpy as np

    files = {
        "text.npy": "expected a .npy file",
        "none.npy": "No such file",
        "whole.npy": "int64 (2, 3, 1, 4)",
        "flat.npy": "float64 (2, 3)",
        "nan.npy": "no pair of successive states is finite",
        "objects.npy": "expected a .npy file",
        "other.safetensors": "expected a .npy file, or a .safetensors file with a tensor named states",
    }
    (tmp_path / "text.npy").write_text("states")
    np.save(tmp_path / "whole.npy", np.zeros((2, 3, 1, 4), np.int64))
    np.save(tmp_path / "flat.npy", np.zeros((2, 3)))
    np.save(tmp_path / "nan.npy", np.full((2, 3, 1, 4), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}] * 2, object), allow_pickle=True)
    atomic.write_tensors(tmp_path / "other.safetensors", {"state": torch.zeros(1)})
    for name, message in files.items():
        with pytest.raises(UserError) as error:
            OwnTrajectories(tmp_path / name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

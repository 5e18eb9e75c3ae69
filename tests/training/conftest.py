"""What tests of `fit` need of the process that they run in."""

import pytest

from ldm.training.parallel import destroy_process_group


@pytest.fixture
def alone(monkeypatch):
    """No process group before or after."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    yield
    destroy_process_group()

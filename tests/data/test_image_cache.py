import shutil
from types import SimpleNamespace

import pytest

from ldm.data.image_cache import cached_memmap
from ldm.errors import UserError


def test_cached_memmap_says_what_the_disk_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 30))
    with pytest.raises(UserError, match=r"^4,096 images of 1024x1024 take 4\.0 GiB, .* has 3\.0; lower size$"):
        cached_memmap("room", 0, (4096, 1, 1024, 1024), lambda images: None)

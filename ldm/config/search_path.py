"""Register how Hydra reads config files: each once in a process, and experiments/ as the config group `experiments`."""

import os
import pickle
from functools import lru_cache
from typing import Any

from ldm.compat import FileConfigSource, Plugins, SourcesRegistry


class CachedFileConfigSource(FileConfigSource):
    """Config source file:///root, of which a file that did not change is parsed once.

    Hydra parses every file again for every config, which takes a third of the time of composing it.
    """

    def load_config(self, config_path: str) -> Any:
        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        if not os.path.exists(path):
            return super().load_config(config_path)  # which raises
        stat = os.stat(path)
        return pickle.loads(_load(type(self), self.provider, self.path, config_path, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1024)
def _load(source: type[FileConfigSource], provider: str, root: str, config_path: str, *stamp: int) -> bytes:
    """Return a file as Hydra's own source returns it, pickled.  stamp: changes with the file."""
    return pickle.dumps(FileConfigSource.load_config(source(provider, root), config_path))


class ExperimentsConfigSource(CachedFileConfigSource):
    """Config source studies:///root, which contains experiments/ and nothing else.

    With file:///root every other folder there (runs/, data/) would be a group as well, and `runs=elsewhere` would
    choose an option of it.
    """

    @staticmethod
    def scheme() -> str:
        return "studies"

    def is_group(self, config_path: str) -> bool:
        return config_path.split("/")[0] in ("", "experiments") and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith("experiments/") and super().is_config(config_path)

    def list(self, config_path: str, results_filter: object = None) -> list[str]:
        if config_path:
            return super().list(config_path, results_filter)  # type: ignore[arg-type]
        return ["experiments"] if os.path.isdir(os.path.join(self.path, "experiments")) else []


Plugins.instance()  # registers Hydra's own sources
SourcesRegistry.instance().types["file"] = CachedFileConfigSource
SourcesRegistry.instance().register(ExperimentsConfigSource)

"""Register the repository's experiments/ as Hydra's config group `experiments`."""

import os

from ldm.compat import FileConfigSource, SourcesRegistry


class ExperimentsConfigSource(FileConfigSource):
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


SourcesRegistry.instance().register(ExperimentsConfigSource)

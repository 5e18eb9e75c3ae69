"""The strict check of a composed config (being built)."""


def validate(config, base=None, supplied=None):
    """Nothing yet."""

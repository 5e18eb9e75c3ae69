import pytest


@pytest.fixture(scope="session")
def minilm():
    from ldm.conditioner.minilm import MiniLM

    return MiniLM()

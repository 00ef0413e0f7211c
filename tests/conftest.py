"""Shared fixtures. Heavy libraries are imported inside them, so unit tests stay light."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other on busy cores are slower than one thread by far."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random Qwen3 with tied embeddings."""
    from posttrain.testing import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")

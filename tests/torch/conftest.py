import pytest
import torch

from posttrain.core.learner import Optimizer
from posttrain.engines.local.engine import LocalEngine

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine() -> LocalEngine:
    return LocalEngine(device=torch.device("cpu"))


@pytest.fixture
def learner(engine, tiny_folder):
    return engine.learner(str(tiny_folder), name="test", optimizer=Optimizer(lr=1e-3), lora=None)

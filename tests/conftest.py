import pytest
import torch

import model as models
from tasks import Countdown


@pytest.fixture(scope="session")
def task():
    return Countdown(tiny=True)


@pytest.fixture
def tiny(task):
    """An untrained tiny model, its weights drawn wide enough that its choices are not uniform."""
    model, tokenizer = models.tiny(task.words(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model, tokenizer

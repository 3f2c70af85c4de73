import pytest
import torch

from flashgrpo.models.load import load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.processes.flow.model import VideoModel
from tests.conftest import small_run
from tests.processes.flow.drawing import WORLD


@pytest.fixture(scope="session")
def loaded(tmp_path_factory) -> VideoModel:
    """The bundled model, loaded once."""
    config = small_run(tmp_path_factory.mktemp("flow") / "run")
    return load_model(config.model, WORLD, config.seed)


@pytest.fixture
def model(loaded):
    """The bundled model, whose adapters are put back afterwards."""
    parameters = trained_parameters(loaded.network)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    yield loaded
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
            parameter.grad = None

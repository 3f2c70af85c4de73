"""One process for each GPU, and a shortage of memory told as one."""

from types import SimpleNamespace

import pytest
import torch

from flashgrpo.distributed.gpus import refuse_shared_gpus
from flashgrpo.distributed.memory import explain_shortage
from flashgrpo.errors import SharedError, UserError
from flashgrpo.models.network import explain_attention


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    refuse_shared_gpus(gpu, lambda own: ["a", "b", "c", "d"])
    refuse_shared_gpus(torch.device("cpu"), lambda own: [None, None])
    with pytest.raises(SharedError, match="processes 1 and 3 have the same GPU"):
        refuse_shared_gpus(gpu, lambda own: ["a", "b", "c", "b"])


def test_out_of_memory_names_the_settings_and_not_the_attention():
    network = SimpleNamespace(set_attention_backend=lambda name: None)
    with (
        pytest.raises(UserError, match=r"out of memory: lower optim.micro_batch; CUDA out of memory. Tried"),
        explain_shortage("optim.micro_batch"),
        explain_attention(network, "flash"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

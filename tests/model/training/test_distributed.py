"""The processes of a run: how long one waits for another, and more of them than there are GPUs."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from smca_model.training import distributed


@pytest.mark.skipif(not dist.is_available(), reason="needs process groups")
def test_processes_wait_longer_than_ap_of_thousands_of_classes_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with distributed.process_group() as device:
        group = dist.distributed_c10d._get_default_group()
        assert group._get_backend(device).options._timeout >= timedelta(hours=1)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with (
        pytest.raises(ValueError, match="--nproc-per-node must be at most the 4 GPUs here, got a LOCAL_RANK of 4"),
        distributed.process_group(),
    ):
        pass

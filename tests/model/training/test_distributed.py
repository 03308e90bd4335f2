"""The processes of a run, when there are more of them than GPUs."""

from __future__ import annotations

import pytest
import torch

from smca_model.training import distributed


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with (
        pytest.raises(ValueError, match="--nproc-per-node must be at most the 4 GPUs here, got a LOCAL_RANK of 4"),
        distributed.process_group(),
    ):
        pass

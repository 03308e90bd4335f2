"""Detectors as folders and repositories of the hub, which is a stand-in here."""

from __future__ import annotations

import json
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detector import tiny_detector
from torch import nn

from smca_model import SMCA
from smca_model.hub import from_pretrained, push_to_hub, save_pretrained
from smca_model.presets import PRESETS, nearest_preset

CLASSES = ("cat", "N/A", 'dog: "big"', "a\n# b", "fünf")


@pytest.fixture
def model() -> SMCA:
    return tiny_detector()


def test_a_folder_gives_the_same_detector_without_the_hub_s_package(
    model: SMCA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model.image_size = (48, 96)
    save_pretrained(model, tmp_path / "new" / "folder", classes=CLASSES, license="mit")
    loaded = from_pretrained(tmp_path / "new" / "folder")
    assert (loaded.classes, loaded.image_size, loaded.config) == (CLASSES, (48, 96), model.config)
    images = [torch.randn(3, 40, 50)]
    assert torch.equal(loaded(images)["pred_logits"], model(images)["pred_logits"])
    save_pretrained(loaded, tmp_path / "again")  # with the names that it has
    assert from_pretrained(tmp_path / "again").classes == CLASSES


def test_the_card_says_what_it_is_of_and_how_to_load_it(model: SMCA, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    save_pretrained(model, tmp_path, classes=CLASSES, license="cc-by-4.0: no")
    _, about, text = (tmp_path / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(about)["license"] == "cc-by-4.0: no"
    assert "Preset: `smca-tiny`, but for\n  - `hidden_dim`: `32`" in text
    assert 'from_pretrained("THIS_REPOSITORY")' in text
    assert text.endswith('4, by label:\n\n    0 cat\n    2 dog: "big"\n    3 a # b\n    4 fünf\n')
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["config"]["hidden_dim"] == 32


def test_a_card_that_is_there_is_kept(model: SMCA, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(model, tmp_path, classes=CLASSES)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_nearest_one(name: str) -> None:
    assert nearest_preset(PRESETS[name]) == (name, {})


def test_names_are_asked_for_where_the_model_has_none(model: SMCA, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes must be 5 names, one a label; the model has no names of its own"):
        save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_module_as_backbone_is_passed_again(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels = {8: 16}
            self.convolution = nn.Conv2d(3, 16, 9, 8, padding=4)
            self.same = self.convolution  # its weights are in the file under both names

        def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
            return {8: self.convolution(images)}

    model = SMCA(tiny_detector().config, backbone=Own()).eval()
    save_pretrained(model, tmp_path, classes=CLASSES)
    with pytest.raises(ValueError, match="must be passed again: backbone="):
        from_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, backbone=Own())
    images = [torch.randn(3, 40, 50)]
    assert torch.equal(loaded(images)["pred_boxes"], model(images)["pred_boxes"])


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Repositories as folders of tmp_path/hub, and what was asked for, in place of the hub."""
    package = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, Any]] = []
    root = tmp_path / "hub"

    def create_repo(self: Any, repo_id: str, **arguments: Any) -> None:
        asked.append(("create_repo", (repo_id, arguments)))
        (root / repo_id).mkdir(parents=True, exist_ok=True)

    def file_exists(self: Any, repo_id: str, filename: str, **arguments: Any) -> bool:
        return (root / repo_id / filename).exists()

    def upload_folder(self: Any, *, repo_id: str, folder_path: str, **arguments: Any) -> Any:
        asked.append(("upload_folder", arguments))
        for file in Path(folder_path).iterdir():
            if file.name not in (arguments["ignore_patterns"] or ()):
                (root / repo_id / file.name).write_bytes(file.read_bytes())
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(repo_id: str, filename: str, **arguments: Any) -> str:
        if not (root / repo_id / filename).exists():
            raise package.errors.LocalEntryNotFoundError(f"no {repo_id}\nat all")
        asked.append(("download", arguments))
        return str(root / repo_id / filename)

    for method in (create_repo, file_exists, upload_folder):
        monkeypatch.setattr(package.HfApi, method.__name__, method)
    monkeypatch.setattr(package, "hf_hub_download", download)
    return types.SimpleNamespace(root=root, asked=asked)


def test_a_detector_that_is_pushed_comes_back(model: SMCA, hub: Any) -> None:
    assert push_to_hub(model, "me/street", classes=CLASSES, license="mit", private=True) == (
        "https://hub/me/street/commit/1"
    )
    assert {file.name for file in (hub.root / "me/street").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert hub.asked[0] == ("create_repo", ("me/street", {"private": True, "exist_ok": True}))
    loaded = from_pretrained("me/street", revision="v1")
    assert hub.asked[-1] == ("download", {"revision": "v1", "token": None})
    assert loaded.classes == CLASSES
    assert torch.equal(loaded.query_embed.weight, model.query_embed.weight)


def test_a_card_on_the_hub_is_kept(model: SMCA, hub: Any) -> None:
    push_to_hub(model, "me/street", classes=CLASSES)
    (hub.root / "me/street/README.md").write_text("mine")
    push_to_hub(model, "me/street", classes=CLASSES)
    assert (hub.root / "me/street/README.md").read_text() == "mine"


def test_what_the_hub_has_not_and_refuses_is_named(
    model: SMCA, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"source must be a folder, or a repository .*, got me/none \(no me/none\)"):
        from_pretrained("me/none")
    with pytest.raises(ValueError, match=r"path must be a file of weights, got .*model\.safetensors"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classes must be 5 names"):
        push_to_hub(model, "me/street")
    assert hub.asked == []

    def refuse(self: Any, repo_id: str, **arguments: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(sys.modules["huggingface_hub"].HfApi, "create_repo", refuse)
    with pytest.raises(
        ValueError, match=r"repository must be one that can be written, got me/street \(403 Forbidden\)"
    ):
        push_to_hub(model, "me/street", classes=CLASSES)


def test_a_hub_that_cant_be_reached_is_one_error(model: SMCA, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and it doesn't listen
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(ValueError, match=r"repository must be one that can be written, got me/street \(.*refused"):
            push_to_hub(model, "me/street", classes=CLASSES, token="hf_none")


@pytest.mark.parametrize("call", [lambda model: push_to_hub(model, "me/street"), lambda model: from_pretrained("me/x")])
def test_without_the_package_the_hub_is_refused(call: Any, model: SMCA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'smca_kernels\[hub\]'"):
        call(model)

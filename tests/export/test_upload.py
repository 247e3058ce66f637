"""What would go to the hub: nothing but a model's files, nothing secret, and only after it was listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest

from tests.small import small_model
from truetune.cli import run
from truetune.errors import UserError
from truetune.export.hub import prepare, push


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with files beside it that are nobody's business."""
    folder = small_model(tmp_path / "model")
    (folder / "README.md").write_text("# card\n")
    for name in (".env", "notes.txt", "training_args.bin", ".hidden.json"):
        (folder / name).write_text("mine")
    (folder / "more").mkdir()
    return folder


def test_only_a_models_files(folder: Path) -> None:
    upload = prepare(folder)
    names = [name for name, _ in upload.files]
    model = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert names == ["README.md", *model, "tokenizer.json", "tokenizer_config.json"]
    assert dict(upload.files)["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert upload.card == "# card\n"


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("README.md", "my key: hf_" + "a" * 34, "hub_secret"),
        ("x.json", json.dumps({"k": "-----BEGIN PRIVATE KEY-----"}), "hub_secret"),
        ("tokenizer_config.json", json.dumps({"vocab_file": "../../.ssh/id_rsa"}), "hub_outside"),
        ("tokenizer_config.json", json.dumps({"vocab_file": ".env"}), "hub_outside"),
        ("tokenizer_config.json", json.dumps({"a": [{"merges_file": "/etc/passwd"}]}), "hub_outside"),
    ],
)
def test_secrets_and_paths_are_refused(name: str, content: str, key: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError) as caught:
        prepare(folder)
    assert caught.value.key == key


def test_links_and_empty_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "extra.json").symlink_to(tmp_path / "model" / "config.json")
    with pytest.raises(UserError) as caught:
        prepare(folder)
    assert caught.value.key == "hub_link"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "none")
    assert caught.value.key == "hub_no_model"


class Hub:
    """Stands for HfApi; keeps what it was told."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append((repo, options))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload", options))
        return "https://hub/x"


def test_push_sends_what_was_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    upload = prepare(folder)
    assert push(upload, repo="me/x") == "https://hub/x"
    (repo, made), (_, sent) = Hub.calls
    assert (repo, made["private"]) == ("me/x", True)
    assert sent["allow_patterns"] == [name for name, _ in upload.files]
    assert sent["folder_path"] == str(folder)


def test_a_hub_that_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.HFValidationError("bad name\nmore")

    monkeypatch.setattr(Hub, "create_repo", fail)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(UserError) as caught:
        push(prepare(folder), repo="a b")
    assert (caught.value.key, caught.value.values["problem"]) == ("hub_refused", "bad name")


def test_dry_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Files and card are shown, nothing is sent; without --repo nothing is, either."""
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("sent"))
    assert run(["export", str(folder), "--to", "hub", "--repo", "me/x", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "model.safetensors" in told
    assert "# card" in told
    assert "notes.txt" not in told
    assert run(["export", str(folder), "--to", "hub"]) == 2

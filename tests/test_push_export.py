"""What goes to the hub, without a hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tests.training_helpers import call


@pytest.fixture(scope="module")
def exported(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "export"
    assert call("export", f"model={untrained}", f"out={out}")[0] == 0
    return out


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that a hub would have had."""
    calls: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append(("create", repo, options))

        def repo_info(self, repo: str, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(private=repo != "someone/public")

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options["repo_id"], options))

        def list_repo_files(self, repo: str) -> list[str]:
            found: list[str] = calls[-1][2]["allow_patterns"]
            return found

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return calls


def test_a_dry_run_names_every_file_and_sends_nothing(exported: Path, sent: list[Any]) -> None:
    code, output = call("push", f"model={exported}", "repo=someone/snac_48khz", "dry_run=true")
    assert code == 0
    for path in exported.iterdir():
        assert f"{path.stat().st_size:,} B" in output
        assert path.name in output
    assert "dry run: 7 files would go to https://huggingface.co/someone/snac_48khz (private" in output
    assert sent == []


def test_a_file_name_obeys_no_terminal(exported: Path, tmp_path: Path, sent: list[Any]) -> None:
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    (model / "a\x1b[2J").touch()
    code, output = call("push", f"model={model}", "repo=someone/x", "dry_run=true")
    assert (code, "\x1b" in output, "a\\x1b[2J" in output) == (0, False, True)


def test_a_push_makes_the_repository_and_one_commit(exported: Path, sent: list[Any]) -> None:
    code, _ = call("push", f"model={exported}", "repo=someone/snac_48khz", "private=false")
    assert code == 0
    create, upload = sent
    assert create == ("create", "someone/snac_48khz", {"repo_type": "model", "private": False, "exist_ok": True})
    assert upload[:2] == ("upload", "someone/snac_48khz")
    assert upload[2]["folder_path"] == exported
    assert sorted(upload[2]["allow_patterns"]) == sorted(path.name for path in exported.iterdir())


def test_what_the_hub_refuses_is_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise ValueError('Invalid metadata in README.md.\n- "license" must be one of [mit, other]')

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    code, output = call("push", f"model={exported}", "repo=someone/x")
    assert code == 1
    ways = "see that the hub can be reached and that you are signed in (`hf auth login`)"
    said = 'ValueError: Invalid metadata in README.md. - "license" must be one of [mit, other]'
    assert output.splitlines()[-1] == f"error: repo=someone/x: {said}; {ways}"


def test_a_public_repository_gets_nothing_private(exported: Path, sent: list[Any]) -> None:
    code, output = call("push", f"model={exported}", "repo=someone/public", "private=true")
    assert (code, [kind for kind, *_ in sent]) == (1, ["create"])
    assert "error: someone/public exists and is public: agree to that with private=false" in output


def test_a_link_publishes_nothing_of_elsewhere(exported: Path, tmp_path: Path, sent: list[Any]) -> None:
    """Exports may come from others."""
    (tmp_path / "secret").write_text("mine")
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    code, output = call("push", f"model={model}", "repo=someone/x")
    assert (code, sent) == (1, [])
    assert "notes.txt is a link to what lies elsewhere, which would be published" in output


def test_what_is_no_export_is_refused(tmp_path: Path, exported: Path, sent: list[Any]) -> None:
    code, output = call("push", f"model={tmp_path}", "repo=someone/x")
    assert (code, output.count("\n")) == (1, 1)
    assert "expected a directory made by `just export`" in output
    assert call("push", f"model={exported}", "repo=no-slash")[0] == 2
    assert sent == []

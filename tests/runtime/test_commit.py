"""The commit in a run's record is that of sftlab's own checkout, and of no repository that it happens to lie in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sftlab.runtime.run import _commit

OURS = '[project]\nname = "sftlab"\n'


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def checkout(folder: Path, project: str, package: str) -> Path:
    """A repository with a package, committed."""
    inside = folder / package
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("", "utf-8")
    (folder / "pyproject.toml").write_text(project, "utf-8")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    return inside


def test_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = checkout(tmp_path / "ours", OURS, "sftlab")
    head = git(tmp_path / "ours", "rev-parse", "HEAD")
    assert _commit(package) == head
    checkout(tmp_path / "theirs", '[project]\nname = "other"\n', "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))  # as in a hook
    assert _commit(package) == head
    (package / "new.py").write_text("", "utf-8")
    assert _commit(package) == head + "+"


@pytest.mark.parametrize(
    ("project", "package"),
    [
        ('[project]\nname = "other"\n', ".venv/lib/python3/site-packages/sftlab"),
        (OURS, ".venv/lib/python3/site-packages/sftlab"),  # ours, and a wheel installed in it
        ('[project]\nname = "other"\n', "sftlab"),
        ("no TOML", "sftlab"),
    ],
)
def test_a_foreign_repository(tmp_path: Path, project: str, package: str) -> None:
    assert _commit(checkout(tmp_path, project, package)) is None


def test_a_copy_that_is_not_tracked(tmp_path: Path) -> None:
    checkout(tmp_path, OURS, "other")
    (tmp_path / "sftlab").mkdir()
    (tmp_path / "sftlab" / "__init__.py").write_text("", "utf-8")
    assert _commit(tmp_path / "sftlab") is None
    assert _commit(tmp_path.parent / "nowhere") is None

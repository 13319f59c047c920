"""What a run says of how it was made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = "from edgead.training.run import git_commit; print(git_commit())"


def commit_of(folder: Path, *, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {CODE}"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_edgead_and_not_of_where_somebody_stands(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert commit_of(ROOT, cwd=tmp_path).removesuffix("+changes") == head.stdout.strip()
    # Installed into a folder that somebody's repository does not track, such as a .venv in it.
    shutil.copytree(ROOT / "edgead", tmp_path / "site" / "edgead")
    assert commit_of(tmp_path / "site", cwd=tmp_path) == "None"

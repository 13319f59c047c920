"""The Makefile explains its targets, and `.ci/run` reports what they gave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # `make test` runs this: its own variables would speak to the make that is started here.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)


def test_make_alone_lists_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    listed = re.findall(r"^  make (\w+) +\S", make().stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


def test_ci_runs_make_test_and_keeps_its_exit_status(tmp_path: Path) -> None:
    fake = tmp_path / "make"
    lines = (
        "#!/bin/sh",
        'echo "make $*"',
        '[ "$2" != test ] || sleep 60 &',  # as a crashed test leaves one: it must hold nothing up
        "echo '== 1 failed, 2 passed in 3.45s =='",
        "echo Error",
        "exit 2",
        "",
    )
    fake.write_text("\n".join(lines))
    fake.chmod(0o755)
    installer = tmp_path / "apt-get"
    installer.write_text("#!/bin/sh\nexit 1\n")  # nothing is installed by a test, and that fails nothing
    installer.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = [ROOT / ".ci/run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    printed = done.stdout.splitlines()
    assert done.returncode == 2, done.stderr
    made = [line for line in printed if line.startswith("make ")]
    assert made == [f"make PYTHON={sys.executable} {target}" for target in ("pycuda", "gige", "test")]
    assert "pycuda was not built" in done.stderr  # and that alone fails nothing
    assert printed[-1] == "== 1 failed, 2 passed in 3.45s =="

"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgead.files import try_lock, whole_file, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_new_file_and_a_replaced_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "första\n")
    assert path.read_bytes() == "första\n".encode()
    write_bytes(path, b"second")
    write_bytes(path, b"third", sync=False)
    assert path.read_bytes() == b"third"
    assert names(tmp_path) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half of the new")
        _ = 1 / 0
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_the_body_may_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.mkdir()  # as little to be replaced as a file that is mounted into a container
    with pytest.raises(OSError) as caught:
        write_text(path, "x")
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert names(tmp_path) == ["a.txt"]
    with pytest.raises(FileNotFoundError) as caught, whole_file(path):
        (tmp_path / "source").read_bytes()
    assert caught.value.filename == str(tmp_path / "source")  # an error of another file


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space left") as caught, whole_file(path) as temporary:
        temporary.write_text("x")
        Path("/dev/full").write_text("x")
    assert caught.value.filename == str(path) and names(tmp_path) == []


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")  # what CIFS says
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "a.txt", "x")


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom edgead.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_lock_is_held_until_its_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no locks on this system")
    with (tmp_path / "lock").open("ab") as first, (tmp_path / "lock").open("ab") as second:
        assert try_lock(first) is True and try_lock(second) is False
        first.close()
        assert try_lock(second.fileno()) is True

        def refuse(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", refuse)
        assert try_lock(second) is None
        monkeypatch.setitem(sys.modules, "fcntl", None)
        assert try_lock(second) is None

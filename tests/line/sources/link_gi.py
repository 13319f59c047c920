"""Makes the system's PyGObject visible in the virtual environment that runs this: a link to one folder.

PyGObject has no wheels, and to build it takes a compiler and header files. The system's own works in
every Python of the same version. Ends with 1, and says why, where there is none.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

SYSTEM = "/usr/bin/python3"
ASK = "import gi, sys; print(sys.version_info[:2], gi.__path__[0], sep='|')"


def main() -> None:
    """Links, unless it is there already."""
    if importlib.util.find_spec("gi") is not None:
        return
    try:
        asked = subprocess.run([SYSTEM, "-c", ASK], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{SYSTEM} has no PyGObject: apt install python3-gi gir1.2-aravis-0.8 aravis-tools")
    version, folder = asked.stdout.strip().split("|")
    if version != str(sys.version_info[:2]):
        sys.exit(f"the system's PyGObject is for Python {version}, this is {sys.version_info[:2]}")
    link = Path(sysconfig.get_path("platlib"), "gi")
    link.unlink(missing_ok=True)  # one that leads nowhere
    link.symlink_to(folder)
    print(f"{link} -> {folder}")


if __name__ == "__main__":
    main()

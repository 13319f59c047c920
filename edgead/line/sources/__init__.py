"""Where images come from. Each module has a `Config` and `open_source(config, *, camera)`."""

from __future__ import annotations

SOURCES = {  # kind in the recipe file -> module
    "folder": "folder",
    "video": "video",
    "opencv": "opencv",
    "gige": "gige",
}

"""One line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found.

    Attributes:
        check: What was looked at, in a word or two.
        state: OK; NOTE, which is worth knowing and keeps nothing from running; PROBLEM.
        found: What was found.
        remedy: What to do. Every problem has one; a note may have one.
    """

    check: str
    state: str
    found: str
    remedy: str = ""


def from_error(check: str, state: str, error: str, remedy: str) -> Finding:
    """A finding from the text of an error of edgead, which often ends with its own remedy.

    Args:
        check: As in `Finding`.
        state: As in `Finding`.
        error: The text.
        remedy: For a text without one.
    """
    found, _, own = error.partition("\nremedy: ")
    if own:
        found = " (".join(found.split("\ncause: ", 1)) + (")" if "\ncause: " in found else "")
    else:
        found, _, own = found.partition(". ")
    return Finding(check, state, " ".join(found.split()), own or remedy)

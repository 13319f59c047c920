from __future__ import annotations

from tests.line.reference import PAGE, page_with, reference


def test_the_reference_in_the_docs_is_what_the_code_reads() -> None:
    """Mend it with: python -m tests.line.reference"""
    page = PAGE.read_text()
    assert page == page_with(reference(), page)

"""Every small input that once failed gives the expected result."""

from __future__ import annotations

import pytest

from tests.cases.checks import CASES, all_checks, wrong_with


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not CASES.is_dir(), reason="the cases lie outside the repository: set FASTATTR_CASES to their folder")
@pytest.mark.parametrize("name", list(all_checks(CASES)))
def test_the_case_gives_what_is_expected(name: str):
    """A mistake that is mended once comes back where nothing watches it."""
    assert wrong_with(name, CASES) == ""

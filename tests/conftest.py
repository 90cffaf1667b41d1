"""Fixtures shared by the tests."""

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real benchmark files (gsm8k/, svamp/, arc_challenge/, math/), which are not in the repository."""
    folder = os.environ.get("IRPO_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            "no real data: set IRPO_TEST_DATA to a folder with gsm8k/, svamp/, arc_challenge/ and math/"
        )
    return Path(folder)


@pytest.fixture(autouse=True)
def _no_data_from_outside(monkeypatch):
    """A test reads the data it names and no other, whatever the shell has set."""
    monkeypatch.delenv("IRPO_DATA", raising=False)


@pytest.fixture(autouse=True)
def _threads_of_one_test_only():
    """Rounding depends on the number of threads: a test that changes it must not change the next."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)

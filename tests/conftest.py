"""What tests of several files use: the switch for the long comparisons, and threads that are put back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to make the long comparisons whole (KINML_FULL_TESTS=1) and not only a part of them."""
    return os.environ.get("KINML_FULL_TESTS", "0") not in ("", "0")


@pytest.fixture
def any_threads() -> Iterator[None]:
    """The test sets the number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

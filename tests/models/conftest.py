"""What the tests of the models room share."""

from __future__ import annotations

import pytest

from tests.models.tiny_model import Tiny
from tests.tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Every family in turn, in single precision."""
    return Tiny(request.param)

"""What all tests of the service share."""

from __future__ import annotations

import pytest
from webhook_api.auth import KeyStore


@pytest.fixture(autouse=True)
def patient_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits longer for a fetch than a busy machine takes for one, unless a test says how long."""
    assert KeyStore.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(KeyStore.__init__.__kwdefaults__, "wait", 30.0)

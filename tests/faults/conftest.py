"""What the fault tests share: backends that may be killed, and a stack that is made anew after a failure."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.faultsite import SOAK, FaultSite, fault_site
from tests.support.ledger import Ledger
from tests.support.stackproc import Stack, running_stack

SEED = int(os.environ.get("FAULTS_SEED", "20261123"))


def size(name: str, bounded: int, soak: int) -> int:
    """A size of a scenario: FAULTS_<NAME>, else what the soak or `make test` takes."""
    return int(os.environ.get(f"FAULTS_{name}", soak if SOAK else bounded))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)
            # The first test's time includes that of the backends that all of them use.
            item.add_marker(pytest.mark.timeout(7200 if SOAK else 1800))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    """Backends of the fault tests' own."""
    with fault_site(tmp_path_factory.mktemp("faults-site")) as made:
        yield made


@dataclass
class Kept:
    """The stack that the tests share, until one of them fails."""

    site: FaultSite
    directory: Path
    number: int = 0
    stack: Stack | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def get(self) -> Stack:
        if self.stack is None:
            self.number += 1
            self.site.heal()
            made = running_stack(self.site, self.directory / f"stack-{self.number}", seed=SEED)
            self.stack = self._open.enter_context(made)
        return self.stack

    def drop(self) -> None:
        self.stack = None
        self._open.close()
        self._open = ExitStack()


@pytest.fixture(scope="session")
def kept(site: FaultSite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    holder = Kept(site, tmp_path_factory.mktemp("faults"))
    try:
        yield holder
    finally:
        holder.drop()


@pytest.fixture
def stack(kept: Kept, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Two instances, two workers, good lines. What earlier tests sent stays, and must stay, what it was."""
    made = kept.get()
    made.heal()
    yield made
    if request.node.stash.get(FAILED, False) or SOAK:
        # In a soak each scenario is large, and is compared alone.
        kept.drop()
    else:
        made.heal()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Keep a scenario's numbers: FAULTS_RESULTS names a file of JSON lines."""
    started = time.monotonic()

    def write(ledger: Ledger, **more: Any) -> None:
        numbers = {
            "scenario": request.node.name,
            "seconds": round(time.monotonic() - started, 1),
            **ledger.summary(),
            **more,
        }
        print(json.dumps(numbers))
        if path := os.environ.get("FAULTS_RESULTS"):
            with open(path, "a") as out:
                out.write(json.dumps(numbers) + "\n")

    return write

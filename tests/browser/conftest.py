"""A console over a database of its own, and Debian's Chromium in front of it."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from minio import Minio
from playwright.sync_api import Browser, Page, sync_playwright

from tests.conftest import ObjectStore
from tests.support.databases import migrated_database
from tests.support.website import PASSWORD, Inbox, Website, instances, show_case, website

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@dataclass
class Shown:
    """A running console with a day's deliveries in it."""

    site: Website
    inbox: Inbox
    ids: dict[str, int]


LORA = bytes(range(256)) * 4096
"""What fal's portrait training has made, in the object store."""
BUCKET = "aisha-files"
LORA_KEY = "webhooks/fal/a87ff679-a2f3-471d-9181-a67b7542122c/payload.diffusers_lora_file/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def shown(database_url: str, s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    keys = {"access_key": s3.access_key, "secret_key": s3.secret_key}
    client = Minio(s3.endpoint, **keys, secure=False, region="us-east-1")
    # The name that pictures show; nothing but the file is made or taken away.
    if not client.bucket_exists(BUCKET):
        client.make_bucket(BUCKET)
    client.put_object(BUCKET, LORA_KEY, io.BytesIO(LORA), len(LORA))
    settings = {"MINIO_ENDPOINT": s3.endpoint, "MINIO_BUCKET_NAME": BUCKET,
                **{f"MINIO_{name.upper()}": value for name, value in keys.items()}}  # fmt: skip
    with migrated_database(database_url) as url:
        inbox = Inbox(url)
        ids = show_case(inbox)
        inbox.effect(ids["done"], "archive", artifacts=[
            {"place": "diffusers_lora_file", "key": LORA_KEY, "state": "stored", "size": len(LORA),
             "sha256": hashlib.sha256(LORA).hexdigest()}])  # fmt: skip
        log = tmp_path_factory.mktemp("console") / "log"
        with instances() as asked, website(url, log, CONSOLE_INSTANCES=asked, **settings) as site:
            yield Shown(site, inbox, ids)
        inbox.connection.close()
    client.remove_object(BUCKET, LORA_KEY)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One window: a size, a theme, a language. What the browser complained of is in ``faults``."""

    page: Page
    shown: Shown
    faults: list[str]

    def open(self, path: str) -> Page:
        """Go to a page of the console."""
        self.page.goto(self.shown.site.address + path)
        return self.page

    def log_in(self, name: str = "maria") -> Page:
        """Log in as a person does."""
        page = self.open("/login")
        page.locator("[name=name]").fill(name)
        page.locator("[name=password]").fill(PASSWORD)
        page.locator("form[action='/login'] button").click()
        page.wait_for_url(self.shown.site.address + "/")
        return page


def window(chromium: Browser, shown: Shown, width: int = 1440, theme: str = "light", language: str = "en",
           scripts: bool = True) -> Iterator[Visit]:  # fmt: skip
    """A window of a visitor's own; it ends with nothing to complain of."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, locale=language, java_script_enabled=scripts,  # type: ignore[arg-type]
    )  # fmt: skip
    page, faults = context.new_page(), []
    # Only what the policy or a script complains of: a refused page is no fault of it.
    page.on(
        "console",
        lambda said: faults.append(said.text) if "Failed to load resource" not in said.text else None,
    )
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
    yield Visit(page, shown, faults)
    context.close()
    assert faults == []


@pytest.fixture
def visit(chromium: Browser, shown: Shown) -> Iterator[Visit]:
    yield from window(chromium, shown)


@pytest.fixture
def plain(chromium: Browser, shown: Shown) -> Iterator[Visit]:
    """Without scripts."""
    yield from window(chromium, shown, scripts=False)


@pytest.fixture(params=[(1440, "light", "en"), (1440, "dark", "ru"), (360, "dark", "en"), (360, "light", "ru")],
                ids=lambda given: "-".join(map(str, given)))  # fmt: skip
def each(request: pytest.FixtureRequest, chromium: Browser, shown: Shown) -> Iterator[Visit]:
    """Both sizes, both themes, both languages."""
    yield from window(chromium, shown, *request.param)


@pytest.fixture(scope="session")
def pictures() -> Path | None:
    """Where screenshots go, when somebody asks for them: SCREENSHOTS=docs/screenshots."""
    given = os.environ.get("SCREENSHOTS")
    if not given:
        return None
    path = Path(__file__).resolve().parents[2] / given
    path.mkdir(parents=True, exist_ok=True)
    return path

"""The console in Chromium: every journey, with and without a mouse or scripts, in both sizes, themes and languages."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import LORA, Shown, Visit
from tests.support.website import EVIL, PASSWORD

pytestmark = pytest.mark.backends

AXE = Axe()
PAGES = {
    "overview": "/", "deliveries": "/deliveries", "delivery": "/deliveries/{done}", "dead-letters": "/dead-letters",
    "dead-letter": "/deliveries/{evil}", "parked": "/parked", "avatars": "/avatars", "deployments": "/deployments",
    "live": "/live",
}  # fmt: skip


def violations(page: Page) -> list[str]:
    found: list[dict[str, Any]] = AXE.run(page).response["violations"]
    return [
        f"{item['id']}: {node['html'][:120]} {node['any'][:1]}" for item in found for node in item["nodes"]
    ]


def looks_right(visit: Visit, name: str, pictures: Path | None) -> None:
    page = visit.page
    size = page.viewport_size
    assert size is not None
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], (
        f"{name} is wider than the window"
    )
    assert violations(page) == []
    if pictures is not None:
        theme = "dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
        language = page.evaluate("document.documentElement.lang")
        page.screenshot(path=pictures / f"{name}-{size['width']}-{theme}-{language}.png", full_page=True)


def test_each_page_fits_and_keeps_nobody_out(each: Visit, pictures: Path | None) -> None:
    each.open("/login")
    looks_right(each, "login", pictures)
    each.log_in()
    for name, path in PAGES.items():
        page = each.open(path.format(**each.shown.ids))
        for image in page.locator("img").all():
            expect(image).to_have_js_property("complete", True)
            assert image.evaluate("image => image.naturalWidth") > 0
        for part in page.locator("details").all():
            part.evaluate("part => { part.open = true }")
        looks_right(each, name, pictures)
    each.open("/dead-letters").locator("form[action$='replay/preview'] button").click()
    expect(each.page.locator(".count")).to_be_visible()
    looks_right(each, "preview", pictures)
    each.open("/deliveries?since=nonsense")
    looks_right(each, "fault", None)


def test_the_language_is_the_browsers(each: Visit) -> None:
    russian = each.open("/login").locator("html").get_attribute("lang") == "ru"
    expect(each.page.locator("h1")).to_have_text("Вход" if russian else "Log in")


def test_language_and_theme_are_kept(visit: Visit) -> None:
    page = visit.log_in()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("[name=language]").select_option("ru")
    page.locator("[name=theme]").select_option("dark")
    page.locator("form.look button").click()
    expect(page.locator("h1")).to_have_text("Обзор")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    expect(visit.open("/parked").locator("html")).to_have_attribute("data-theme", "dark")
    assert violations(page) == []


def test_a_wrong_password_says_so_and_tells_nothing_else(visit: Visit) -> None:
    page = visit.open("/login")
    page.locator("[name=name]").fill("nobody")
    page.locator("[name=password]").fill("something wrong")
    page.locator("form[action='/login'] button").click()
    expect(page.get_by_role("alert")).to_have_text("Account or password are wrong.")
    assert violations(page) == []


def test_a_login_leads_where_one_wanted_to_go(visit: Visit) -> None:
    page = visit.open("/deliveries?state=dead")
    expect(page).to_have_url(re.compile(r"/login\?next="))
    page.locator("[name=name]").fill("viktor")
    page.locator("[name=password]").fill("correct horse battery")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/deliveries\?state=dead$"))
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(re.compile(r"/login$"))
    expect(visit.open("/").locator("h1")).to_have_text("Log in")


def test_deliveries_are_found_by_a_filter(visit: Visit) -> None:
    visit.log_in()
    page = visit.open("/deliveries")
    page.get_by_label("State").select_option("parked")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.locator("tbody a").click()
    expect(page.locator("h1")).to_have_text(f"Delivery {visit.shown.ids['parked']}")


def test_pages_of_a_list_are_followed(visit: Visit) -> None:
    visit.log_in()
    page = visit.open("/deliveries")
    first = page.locator("tbody a").first.inner_text()
    page.get_by_role("link", name="Older").click()
    expect(page.locator("tbody tr")).to_have_count(50)
    page.get_by_role("link", name="Newer").first.click()
    expect(page.locator("tbody a").first).to_have_text(first)


def test_the_signature_is_proven_once_more(visit: Visit) -> None:
    visit.log_in()
    page = visit.open(f"/deliveries/{visit.shown.ids['done']}")
    expect(page.locator(".verdict-valid")).to_have_text("valid")
    expect(visit.open(f"/deliveries/{visit.shown.ids['evil']}").locator(".verdict-invalid")).to_be_visible()


def test_the_overview_says_how_the_instances_are(visit: Visit) -> None:
    page = visit.log_in()
    expect(page.locator("tbody .pill.healthy")).to_have_count(2)
    expect(page.get_by_text("1 h 10 min")).to_be_visible()


def test_text_of_attackers_neither_runs_nor_turns_around(visit: Visit) -> None:
    visit.log_in()
    page = visit.open(f"/deliveries/{visit.shown.ids['evil']}")
    assert "<script>alert(1)</script>\\u202egpj" in page.locator("main").inner_text()
    assert EVIL not in page.content()
    assert page.locator("main img, main script").count() == 0


def test_a_replay_by_keyboard_alone(visit: Visit) -> None:
    number = visit.shown.inbox.deliver("by-keyboard", state="dead", error="x")
    visit.log_in()
    page = visit.open(f"/deliveries/{number}")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.locator(":focus").inner_text() == "Replay…":
            break
    outline = page.locator(":focus").evaluate("part => getComputedStyle(part).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect(page.locator(".count")).to_contain_text("1 of 1")
    page.locator(".confirm button").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Changed: 1")
    page.reload()
    expect(page.get_by_role("status")).to_contain_text("Changed: 1")
    assert violations(page) == []
    deeds = "select count(*) from webhook.audit where delivery_ids = array[%s::bigint]"
    assert visit.shown.inbox.one(deeds, number) == 1
    assert visit.shown.inbox.one("select state from webhook.deliveries where id = %s", number) == "retry"


def tab_to(page: Page, what: str, most: int = 60) -> None:
    """Press Tab until the focus is on it."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.locator(":focus").evaluate("(part, what) => part.matches(what)", what):
            return
    raise AssertionError(f"the keyboard does not reach {what}")


def test_login_filter_paging_and_a_bulk_action_by_keyboard_alone(visit: Visit) -> None:
    for index in range(2):
        visit.shown.inbox.deliver(f"keys-{index}", "unknown", "dead", error="x")
    page = visit.open("/login")
    tab_to(page, "[name=name]")
    page.keyboard.type("maria")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Overview")
    tab_to(page, "nav a[href='/deliveries']")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Deliveries")
    tab_to(page, "a[rel=next]", 200)
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("after="))
    tab_to(page, "nav a[href='/dead-letters']")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Dead letters")
    tab_to(page, "select[name=status]")
    page.keyboard.type("unknown")
    tab_to(page, ".filters button")
    page.keyboard.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(2)
    tab_to(page, "form[action$='dead-letters.discard/preview'] button")
    page.keyboard.press("Enter")
    expect(page.locator(".count")).to_contain_text("2 of 2")
    tab_to(page, "[name=why]")
    page.keyboard.type("by keyboard")
    tab_to(page, ".confirm button")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Changed: 2")
    tab_to(page, "select[name=theme]")
    page.keyboard.type("Dark")
    tab_to(page, "form.look button")
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_times_are_in_the_readers_own_zone(chromium: Browser, shown: Shown) -> None:
    context = chromium.new_context(timezone_id="Asia/Tokyo", locale="en")
    visit = Visit(context.new_page(), shown, [])
    page = visit.log_in()
    expect(page.get_by_text("Times in Asia/Almaty")).to_be_visible()
    page.locator("[name=zone]").select_option("Asia/Tokyo")
    page.locator("form.look button").click()
    expect(page.get_by_text("Times in Asia/Tokyo (UTC+09:00)")).to_be_visible()
    visit.open(f"/deliveries/{shown.ids['done']}")
    shown_time = page.locator(".timeline time").first
    exact = datetime.fromisoformat(shown_time.get_attribute("datetime") or "")
    expect(shown_time).to_have_text(exact.astimezone(ZoneInfo("Asia/Tokyo")).strftime("%Y-%m-%d %H:%M:%S"))
    context.close()


def test_many_are_discarded_without_scripts(plain: Visit) -> None:
    for index in range(3):
        plain.shown.inbox.deliver(f"plain-{index}", "cancelled", "dead", error="x")
    plain.log_in()
    page = plain.open("/dead-letters")
    page.get_by_label("Status").select_option("cancelled")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_role("button", name="Discard…").click()
    expect(page.locator(".count")).to_contain_text("3 of 3")
    page.get_by_label("Why (for the record)").fill("a test")
    page.get_by_role("button", name="Do it (3)").click()
    expect(page.get_by_role("status")).to_contain_text("Changed: 3")
    assert page.url.startswith(plain.shown.site.address + "/done/dead-letters.discard/")
    page.reload()
    expect(page.get_by_role("status")).to_contain_text("Changed: 3")
    plain.open("/live")
    expect(page.locator("noscript, .alert").first).to_be_visible()


def test_a_viewer_is_offered_nothing(visit: Visit) -> None:
    visit.log_in("viktor")
    page = visit.open(f"/deliveries/{visit.shown.ids['done']}")
    expect(page.get_by_text("Headers, body and actions are for operators.")).to_be_visible()
    assert page.locator("pre, .actions, a[href*='/files/']").count() == 0
    expect(page.get_by_text("pytorch_lora_weights.safetensors")).to_be_visible()
    assert visit.open("/dead-letters").locator(".actions, [name=text]").count() == 0


def test_an_archived_file_is_downloaded_and_the_timeline_says_by_whom(visit: Visit) -> None:
    visit.log_in()
    page = visit.open(f"/deliveries/{visit.shown.ids['done']}")
    link = page.get_by_role("link", name="Download pytorch_lora_weights.safetensors")
    link.focus()
    with page.expect_download() as begun:
        page.keyboard.press("Enter")
    assert begun.value.suggested_filename == "pytorch_lora_weights.safetensors"
    assert Path(begun.value.path()).read_bytes() == LORA
    page.reload()
    expect(page.locator(".timeline .deed")).to_contain_text(["archive.download"])
    expect(page.locator(".timeline .deed")).to_contain_text(["maria"])
    assert violations(page) == []


def test_a_file_that_the_store_has_lost_is_said_on_a_page(visit: Visit) -> None:
    visit.log_in()
    page = visit.open(f"/deliveries/{visit.shown.ids['done']}")
    page.get_by_role("link", name=f"Download delivery-{visit.shown.ids['done']}.json").click()
    expect(page.locator("h1")).to_have_text("The object store does not have this file (any more).")
    assert violations(page) == []


def test_live_shows_what_arrives_and_goes_on_after_a_break(visit: Visit) -> None:
    visit.log_in()
    page = visit.open("/live")
    expect(page.locator("#connection")).to_have_text("Connected")
    one = visit.shown.inbox.deliver("live-" + EVIL, ago=0)
    expect(page.locator(f"#live a[href='/deliveries/{one}']")).to_be_visible()
    assert page.locator("main img").count() == 0
    page.context.set_offline(True)
    two = visit.shown.inbox.deliver("while-away", ago=0)
    page.wait_for_timeout(1500)
    page.context.set_offline(False)
    expect(page.locator(f"#live a[href='/deliveries/{two}']")).to_be_visible(timeout=15_000)
    page.get_by_role("button", name="Pause").click()
    three = visit.shown.inbox.deliver("paused", ago=0)
    page.wait_for_timeout(2500)
    assert page.locator(f"#live a[href='/deliveries/{three}']").count() == 0
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(f"#live a[href='/deliveries/{three}']")).to_be_visible()


def test_a_command_is_copied(visit: Visit) -> None:
    visit.log_in()
    page = visit.open(f"/deliveries/{visit.shown.ids['done']}")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_text("Copy as curl").click()
    page.locator("[data-copy=curl]").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith(
        "curl -sS -X POST http://localhost/api/v1/"
    )

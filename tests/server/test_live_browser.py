"""The live view as people use it, in real Chromium without a network: what it shows, by pointer, keys and ear."""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvwise.models.loaded import LoadedModel
from kvwise.server.live import feed as live_feed
from tests.server.conftest import Served, make_server, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
KEY, ADMIN_KEY = "sk-of-the-only-tenant", "the-key-of-the-administration-1234"
WIDTHS = (360, 1440)
expect = playwright.expect

# Text whose contrast with what lies behind it is too low: WCAG 2.2, 1.4.3, for text of any size.
LOW_CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = parse(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode());) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility()) continue;
    if (node.closest(".unseen, .skip, script, noscript, :disabled")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${text.data.trim()}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, width=1440, color_scheme="dark")`: the page; `.heard` are its errors and foreign requests."""
    contexts = []

    def open_one(url: str, width: int = 1440, **asked: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce", **asked)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.heard = []
        page.on("console", lambda m: page.heard.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(url) else page.heard.append(r.url))
        page.goto(url + "/")
        return page

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def open_server(tiny: LoadedModel) -> Iterator[Served]:
    patch = pytest.MonkeyPatch()
    patch.setattr(live_feed, "TICK_S", 0.1)
    with serving(make_server(tiny, strategies=("full+prefix", "h2o(budget=0.5)"))) as one:
        yield one
    patch.undo()


def send(page: Any, text: str) -> str:
    """Send a prompt and wait for its end: what the page says of it."""
    page.fill("#text", text)
    page.fill("#most", "6")
    page.click("#send")
    expect(page.locator("#verdict")).to_contain_text("prompt tokens were cached")
    return str(page.inner_text("#verdict"))


def link(page: Any, state: str) -> None:
    expect(page.locator("#link")).to_have_attribute("data-state", state)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_loads_fits_and_can_be_read(open_server: Served, open_page: Any, width: int, scheme: str) -> None:
    page = open_page(open_server.url, width, color_scheme=scheme)
    link(page, "live")
    send(page, f"to be read at {width} and {scheme}, " * 4)
    expect(page.locator("#recent tbody tr").first).to_be_visible()
    expect(page.locator("#maps canvas")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.heard == []


def test_a_prompt_sent_twice_hits(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)
    prompt = "the second time its blocks are there, all but the last token. " * 3
    assert send(page, prompt).startswith("0 of ")
    page.wait_for_selector(".strip[data-row=now] .piece.device")
    served = page.locator(".strip[data-row=served]")
    blocks = len(prompt) // 16
    expect(served).to_contain_text(f"{blocks} computed")
    second = send(page, prompt)
    expect(served).to_contain_text(f"{blocks} hit")
    expect(page.locator(".strip[data-row=before]")).to_contain_text(f"{blocks} on the device")
    assert second.startswith(f"{16 * blocks} of ")
    mine = page.locator("#recent tr.mine")
    expect(mine).to_have_count(2)
    expect(mine.first).to_contain_text(f"{100 * 16 * blocks // len(prompt)}")
    expect(mine.first).to_contain_text("all kept")
    expect(page.locator("#legend li", has_text="cached").locator("b")).not_to_have_text("0")
    assert page.heard == []


def test_a_request_is_known_as_ones_own_though_the_feed_tells_of_it_first(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)

    def late(route: Any) -> None:
        whole = route.fetch()
        time.sleep(1.5)  # meanwhile the page has a picture in which the request has ended
        route.fulfill(response=whole)

    page.route("**/v1/completions", late)
    send(page, "known as soon as its first chunk is here")
    expect(page.locator("#recent tr.mine")).to_have_count(1)


def test_what_is_refused_is_said(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)
    link(page, "live")
    page.fill("#text", "too long " * 40_000)
    page.click("#send")
    expect(page.locator("#verdict")).to_contain_text("tokens")
    expect(page.locator("#send")).to_be_enabled()


def test_every_control_is_reached_by_keys(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)
    link(page, "live")
    expect(page.locator("#maps canvas")).to_have_count(2)
    wanted = page.evaluate(
        """() => [...document.querySelectorAll('a[href], button, input, select, textarea, [tabindex="0"]')]
        .filter((e) => e.checkVisibility() && !e.disabled)
        .map((e) => e.id || e.getAttribute('aria-label') || e.textContent.trim())"""
    )
    assert {"pause", "theme", "text", "most", "which", "send"} <= set(wanted)
    reached = []
    for _ in range(len(wanted)):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(e => e.id || e.getAttribute('aria-label') || e.textContent.trim())(document.activeElement)")
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
    assert reached == wanted


def test_the_map_is_walked_by_keys_and_told_in_words(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)
    expect(page.locator("#maps canvas")).to_have_count(2)
    canvas = page.locator("#maps canvas").first
    canvas.focus()
    for key, block in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0)):
        canvas.press(key)
        expect(canvas).to_have_attribute("aria-valuenow", str(block))
    canvas.press("End")
    last = int(canvas.get_attribute("aria-valuemax"))
    expect(canvas).to_have_attribute("aria-valuenow", str(last))
    assert canvas.get_attribute("aria-valuetext").startswith(f"Block {last}: ")
    canvas.press("ArrowUp")
    assert int(canvas.get_attribute("aria-valuenow")) < last - 1
    canvas.hover(position={"x": 3, "y": 3})
    expect(page.locator("#readout")).to_contain_text("Block 0: ")
    words = page.locator("#legend").inner_text()
    total = sum(int(word.replace(",", "")) for word in words.split() if word[0].isdigit())
    assert total == sum(one.stats.blocks_total for one in open_server.service.snapshots)
    roles = {
        role: page.get_by_role(role).count() for role in ("banner", "main", "status", "table", "slider", "heading")
    }
    assert roles["banner"] == roles["main"] == 1
    assert all(roles.values()), roles


def test_the_theme_can_be_chosen(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    toggle = page.locator("#theme")
    expect(toggle).to_have_text("Theme: auto")
    toggle.click()
    assert page.evaluate(paper) == light
    toggle.click()
    expect(toggle).to_have_text("Theme: dark")
    assert page.evaluate(paper) != light
    page.reload()
    expect(toggle).to_have_text("Theme: dark")
    assert page.evaluate(paper) != light


def test_pausing_leaves_the_server_alone(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)
    link(page, "live")
    page.click("#pause")
    link(page, "paused")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    page.click("#pause")
    link(page, "live")


def test_a_connection_that_is_lost_is_said_and_found_again(open_server: Served, open_page: Any) -> None:
    page = open_page(open_server.url)
    link(page, "live")
    page.route("**/live/events", lambda route: route.abort())
    page.click("#pause")
    page.click("#pause")
    link(page, "lost")
    expect(page.locator("#lost")).to_contain_text("Disconnected.")
    expect(page.locator("#say")).to_contain_text("Disconnected.")
    page.unroute("**/live/events")
    page.click("#again")
    link(page, "live")
    expect(page.locator("#lost")).to_be_hidden()
    expect(page.locator("#say")).to_have_text("Connected again.")


def test_a_server_that_ends_is_said(tiny: LoadedModel, open_page: Any) -> None:
    with serving(make_server(tiny)) as served:
        page = open_page(served.url)
        link(page, "live")
        served.on_loop(served.service.close)
        link(page, "lost")
        expect(page.locator("#lost")).to_contain_text("shutting down")


def test_keys_are_asked_for_and_kept_for_the_tab_only(tiny: LoadedModel, open_page: Any, tmp_path: Any) -> None:
    admin = tmp_path / "admin"
    admin.write_text(ADMIN_KEY)
    admin.chmod(0o600)
    with serving(make_server(tiny, settings={"admin_key_file": admin}, api_keys=[KEY])) as served:
        page = open_page(served.url)
        link(page, "locked")
        expect(page.locator("#unlock-why")).to_contain_text("key of the administration")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#unlock-why")).to_contain_text("does not fit")
        page.fill("#key", ADMIN_KEY)
        page.keyboard.press("Enter")
        link(page, "live")
        page.click("#send")
        expect(page.locator("#verdict")).to_contain_text("API key")
        page.fill("#api-key", KEY)
        send(page, "with a key of my own, " * 3)
        kept = page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href].join(' ')")
        assert KEY not in kept
        assert ADMIN_KEY not in kept
        page.click("#forget")
        link(page, "locked")
        assert page.evaluate("sessionStorage.length") == 0

"""The page and a report in headless Chromium. Skipped where there is no browser."""

import re
import shutil
import time

import pytest

pytest.importorskip("fastapi", reason='the extra "serve" is not installed')
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from fade_fast.saved import telemetry  # noqa: E402
from fade_fast.serve import report  # noqa: E402
from fade_ref.config import FadeConfig  # noqa: E402

from ..models import EVICTING, generate, new_cache, prompt, tiny_llama  # noqa: E402
from .engines import engine  # noqa: E402
from .test_http import served  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RECALL = FadeConfig(recent_window=16, block_size=16, select=16, cold="host", resident=24)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, url, **options):
    """A page at an address, and the errors and the requests that it has had."""
    page, errors, requests = browser.new_page(**options), [], []
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    return page, errors, requests


def focus(page) -> str:
    """The id of what has the focus."""
    return page.evaluate("document.activeElement.id")


def tab_to(page, wanted: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(8):
        page.keyboard.press("Tab")
        if focus(page) == wanted:
            return
    raise AssertionError(f"Tab does not lead to {wanted}")


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def colors(page, canvas: str) -> int:
    """Number of colors in a canvas."""
    return page.evaluate(
        """(id) => {
        const c = document.getElementById(id), copy = document.createElement("canvas");
        [copy.width, copy.height] = [c.width, c.height];
        const pen = copy.getContext("2d", { willReadFrequently: true });
        pen.drawImage(c, 0, 0);
        const data = pen.getImageData(0, 0, c.width, c.height).data;
        const seen = new Set();
        for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 4).join());
        return seen.size;
    }""",
        canvas,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat_by_keyboard(browser, scheme, tmp_path):
    running = engine(tiny_llama(heads=1, head_dim=32), EVICTING)
    with served(running) as address:
        page, errors, requests = opened(browser, address, color_scheme=scheme)
        until(lambda: page.text_content("#link") == "connected")
        until(lambda: page.text_content("#model") == "tiny")
        assert running.view.watched
        page.keyboard.type("hello there, " * 4)  # the message box has the focus
        page.keyboard.press("Enter")
        until(lambda: len(page.text_content(".message.assistant span") or "") > 3)
        before = page.text_content(".message.assistant span")
        until(lambda: len(page.text_content(".message.assistant span")) > len(before))
        until(lambda: "INT4" in page.get_attribute("#tokens", "aria-label"))
        until(lambda: "by 2 layers" in page.get_attribute("#map", "aria-label"))
        until(lambda: colors(page, "map") >= 3)
        assert colors(page, "tokens") >= 3
        page.keyboard.press("Escape")
        until(lambda: page.is_enabled("#send"))
        until(lambda: running.idle)
        assert "INT4" in page.inner_text("#legend") and "Prefix hits" in page.inner_text("#numbers")
        # A second turn, by the mouse.
        page.fill("#prompt", "and then?")
        page.click("#send")
        until(lambda: page.locator(".message").count() == 4)
        page.click("#stop")
        until(lambda: page.is_enabled("#send"))
        assert focus(page) == "prompt"
        # A third one without a mouse: buttons by Tab, and a new chat.
        page.keyboard.type("more")
        page.keyboard.press("Tab")
        assert focus(page) == "send"
        page.keyboard.press("Space")
        until(lambda: page.locator(".message").count() >= 5 and page.is_enabled("#stop"))
        page.focus("#prompt")
        tab_to(page, "stop")
        page.keyboard.press("Enter")
        until(lambda: page.is_enabled("#send"))
        assert focus(page) == "prompt"
        tab_to(page, "new")
        page.keyboard.press("Enter")
        assert page.locator(".message").count() == 0 and focus(page) == "prompt"
        order = []
        for _ in range(6):
            order.append(focus(page))
            page.keyboard.press("Tab")
        assert order[:2] == ["prompt", "send"]
        page.screenshot(path=str(tmp_path / "page.png"))
        assert not errors and all(url.startswith(address) for url in requests)
        page.close()
        until(lambda: not running.view.watched)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_the_newest_token_read(browser, scheme, tmp_path):
    running = engine(tiny_llama(), RECALL)
    with served(running) as address:
        size = dict(width=1280, height=1200)
        page, errors, _ = opened(browser, address, color_scheme=scheme, viewport=size)
        until(lambda: page.text_content("#link") == "connected")
        assert page.is_hidden("#reads")
        page.fill("#prompt", "a story that goes on, " * 12)
        page.keyboard.press("Enter")
        until(lambda: page.is_visible("#reads"))

        def held() -> int:
            found = re.search(r"a KV head read 2 of (\d+) pages", page.text_content("#read-note"))
            return int(found[1]) if found else 0

        until(lambda: held() > 30 and colors(page, "read-map") >= 4)
        assert "fetched from the host" in page.text_content("#read-note")
        assert "pages of the middle" in page.get_attribute("#read-map", "aria-label")
        legend = page.inner_text("#read-legend")
        assert "always read" in legend and "chosen, fetched from the host" in legend
        assert "in host memory" in page.inner_text("#bytes") and "a query read" in page.inner_text("#events")
        page.keyboard.press("Escape")
        until(lambda: page.is_enabled("#send"))
        page.screenshot(path=str(tmp_path / "reads.png"), full_page=True)
        assert not errors
        page.close()


def test_text_of_a_model_is_shown_as_text(browser):
    with served(engine(tiny_llama(heads=1, head_dim=32))) as address:
        page, errors, _ = opened(browser, address)
        page.fill("#prompt", "<img src=x onerror=alert(1)>")
        page.keyboard.press("Enter")
        until(lambda: page.locator(".message.user").count() == 1)
        assert page.locator("img").count() == 0 and "<img" in page.text_content(".message.user span")
        page.keyboard.press("Escape")
        assert not errors


def test_a_page_asks_for_the_api_key(browser):
    with served(engine(tiny_llama(heads=1, head_dim=32)), api_key="secret") as address:
        page, _, _ = opened(browser, address)
        until(lambda: page.is_visible("#key"))
        page.fill("#key", "secret")
        until(lambda: page.text_content("#link") == "connected")
        page.close()


def test_a_report_opens_from_disk(browser, tmp_path):
    path, model = tmp_path / "events.jsonl", tiny_llama()
    cache = new_cache(model, EVICTING)
    with cache.listen(path):
        generate(model, cache, prompt(60))
    (tmp_path / "page.html").write_text(report.page_of(telemetry.read(path), "events"), encoding="utf-8")
    page, errors, requests = opened(browser, f"file://{tmp_path}/page.html")
    assert colors(page, "tokens") >= 3 and colors(page, "map") >= 3
    assert "INT4 24" in page.inner_text("#legend") and page.locator("#events li").count() > 1
    assert page.is_hidden("#reads") and "tokens seen" in page.text_content("#tokens + .caption")
    assert not errors and len(requests) == 1
    page.close()


def test_a_report_shows_what_was_read(browser, tmp_path):
    path, model = tmp_path / "events.jsonl", tiny_llama()
    cache = new_cache(model, RECALL)
    with cache.listen(path):
        generate(model, cache, prompt(200))
    (tmp_path / "page.html").write_text(report.page_of(telemetry.read(path), "events"), encoding="utf-8")
    page, errors, requests = opened(browser, f"file://{tmp_path}/page.html")
    assert page.is_visible("#reads") and "a KV head read 2 of" in page.text_content("#read-note")
    assert colors(page, "read-map") >= 4 and not errors and len(requests) == 1
    page.close()

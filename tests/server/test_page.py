"""The chat page: what it may load, and a real browser that types, reads the stream, stops it and starts again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from dq_runtime.runtime.engine import FinishedEvent, Request
from dq_runtime.server.information import PAGE
from server.live_server import nothing_held, until

Fake = Callable[..., Any]


def test_the_page_asks_nobody_else_for_anything(fake: Fake) -> None:
    with fake() as live:
        response = httpx.get(live.url + "/")
    assert response.text == PAGE
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|//[a-z]|@import|url\(", PAGE)
    assert response.headers["x-content-type-options"] == "nosniff"


def test_every_field_has_a_label_and_regions_are_announced() -> None:
    for kind in ("input", "textarea"):
        for attributes in re.findall(rf"<{kind} ([^>]*)>", PAGE):
            name = re.search(r'id="([^"]+)"', attributes)
            assert name is not None
            assert f'<label for="{name.group(1)}">' in PAGE
    assert 'role="log" aria-live="polite"' in PAGE
    assert 'role="alert"' in PAGE
    assert 'role="status"' in PAGE
    assert '<html lang="en">' in PAGE


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2, 1.4.3."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_is_readable_in_light_and_dark() -> None:
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", PAGE, re.S)
    )
    for colours in (light, dark):
        for text, behind in (
            ("text", "page"),
            ("text", "card"),
            ("text", "mine"),
            ("quiet", "page"),
            ("quiet", "card"),
            ("quiet", "mine"),
            ("on-strong", "strong"),
            ("bad", "bad-page"),
        ):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
        assert contrast(colours["strong"], colours["page"]) >= 3, "the outline of what has the focus"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of the machine's own (Debian's package, or Chrome)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        # A container's root has no user namespaces to build the sandbox from; the page is our own.
        running = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty tab. Whatever it complains about, and whatever it asks of other hosts, fails the test."""
    context = browser.new_context(viewport={"width": 900, "height": 760})
    tab = context.new_page()
    tab.set_default_timeout(10_000)
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "request",
        lambda request: (
            "//127.0.0.1:" in request.url or request.url.startswith("data:") or complaints.append(request.url)
        ),
    )
    tab.on("console", lambda message: "Content Security Policy" in message.text and complaints.append(message.text))
    yield tab
    context.close()
    assert complaints == []


def slow(request: Request) -> Iterator[Any]:
    """Two sentences, a word every 20 ms, until it is stopped."""
    while True:
        for word in ("The", "sky", "is", "blue", "because", "air", "scatters", "short", "waves", "more."):
            yield f"{word} "
            yield 0.02


def brief(request: Request) -> Iterator[Any]:
    """Ten tokens that are markup, if anybody took them for it."""
    return iter(("<b>Hello</b>", " you", ",", " how", " are", " you", "?\n", "<img src=x>", " &amp;", " ☃"))


def said(page: Any) -> list[str]:
    found: list[str] = page.locator(".turn p").all_text_contents()
    return found


def test_a_question_is_typed_streamed_and_answered(page: Any, fake: Fake) -> None:
    with fake(brief) as live:
        page.goto(live.url)
        page.get_by_role("heading", name="fake").wait_for()
        assert page.locator("#size").inner_text() == "3.25 bits per weight, 100 MB, context of 256 tokens"
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("Who are")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("you?")
        page.keyboard.press("Enter")
        page.get_by_text("Done.").wait_for()
        assert said(page) == ["Who are\nyou?", "<b>Hello</b> you, how are you?\n<img src=x> &amp; ☃"]
        assert re.match(r"10 tokens, [0-9.]+ tokens/s", page.locator("#speed").inner_text())
        assert page.locator("#log").get_attribute("aria-busy") == "false"
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("And now?")
        page.get_by_role("button", name="Send").click()
        until(lambda: len(said(page)) == 4 and page.locator("#send").is_enabled())
        prompts = [live.application.api.state.service.served.model.decode(list(r.tokens)) for r in live.engine.requests]
        assert "how are you?" in prompts[1], "the second question comes with what was said before"
        page.get_by_role("button", name="Clear").click()
        assert said(page) == []
        assert page.get_by_text("Nothing said yet").is_visible()


@pytest.mark.parametrize("by", ["button", "keyboard", "clear"])
def test_an_answer_can_be_stopped(by: str, page: Any, fake: Fake) -> None:
    with fake(slow) as live:
        page.goto(live.url)
        page.get_by_label("Your message").fill("Why is the sky blue?")
        page.keyboard.press("Enter")
        page.get_by_text("air scatters").wait_for()
        assert page.get_by_role("button", name="Send").is_disabled()
        assert page.locator("#log").get_attribute("aria-busy") == "true"
        assert live.engine.stats().running == 1
        if by == "button":
            page.get_by_role("button", name="Stop").click()
        elif by == "clear":
            page.get_by_role("button", name="Clear").click()
        else:
            page.keyboard.press("Escape")
        nothing_held(live.engine)
        until(lambda: page.locator("#send").is_enabled())
        if by == "clear":
            assert said(page) == []
        else:
            assert page.get_by_text("Stopped.").is_visible()
            assert said(page)[1].startswith("The sky is blue because air scatters")


def test_errors_are_shown_and_the_question_is_not_lost(page: Any, fake: Fake) -> None:
    with fake(lambda request: iter([FinishedEvent("error", message="out of luck")])) as live:
        page.goto(live.url)
        page.get_by_label("Your message").fill("Hello?")
        page.keyboard.press("Enter")
        page.get_by_role("alert").filter(has_text="out of luck").wait_for()
        assert page.get_by_label("Your message").input_value() == "Hello?"
        assert said(page) == []


def test_a_server_with_a_key_asks_for_it(page: Any, fake: Fake) -> None:
    with fake(brief, api_key="s3cret") as live:
        page.goto(live.url)
        key = page.get_by_label("This server wants an API key")
        key.wait_for()
        key.fill("wrong")
        page.get_by_role("button", name="Use key").click()
        page.get_by_role("alert").filter(has_text="valid API key").wait_for()
        key.fill("s3cret")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="fake").wait_for()
        assert not key.is_visible()
        page.get_by_label("Your message").fill("Hello?")
        page.keyboard.press("Enter")
        page.get_by_text("Done.").wait_for()


def test_the_keyboard_reaches_everything_in_the_order_of_reading(page: Any, fake: Fake) -> None:
    with fake(brief) as live:
        page.goto(live.url)
        page.get_by_role("heading", name="fake").wait_for()
        page.locator("body").click(position={"x": 1, "y": 1})
        reached = []
        for _ in range(9):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert reached[:5] == ["log", "prompt", "send", "clear", "SUMMARY"]
        page.locator("summary").press("Enter")
        for name in ("Temperature", "Top p", "Most tokens", "System prompt"):
            page.keyboard.press("Tab")
            assert page.get_by_label(name).evaluate("e => e === document.activeElement")
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Your message").fill("Hello?")
        page.get_by_label("Your message").press("Enter")
        page.get_by_text("Done.").wait_for()
        (request,) = live.engine.requests
        assert request.sampling.temperature == 0
        assert "Be brief." in live.application.api.state.service.served.model.decode(list(request.tokens))


def test_it_fits_a_telephone_and_the_dark(browser: Any, fake: Fake) -> None:
    with fake(brief) as live:
        context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
        tab = context.new_page()
        tab.goto(live.url)
        tab.get_by_label("Your message").fill("a" * 300)
        tab.keyboard.press("Enter")
        tab.get_by_text("Done.").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        context.close()

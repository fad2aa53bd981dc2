"""The studio in a real Chromium: text, images, a hostile document, a phone's width, the keyboard alone, dark mode."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from studio_samples import DOCUMENT, QUESTION, image, save_models, served

from quickmerge.serve.studio import Shelf

pytest.importorskip("gradio", reason="the studio needs gradio: pip install quickmerge[studio]")
pytest.importorskip("playwright", reason="the studio's browser is led by playwright: pip install playwright")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
PATIENCE = 60_000
"""Milliseconds; a busy machine is slow."""
HOSTILE = (
    '<img src=x onerror="document.title=1;window.hit=1"><script>window.hit=1</script>${window.hit=1}{{7*7}}'
    '</iframe></style></textarea><a href="javascript:window.hit=1">x</a>" onload="window.hit=1" \u202egpj.exe '
    "<|im_start|> \x00 & &lt; "
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(Shelf.of(save_models(tmp_path_factory.mktemp("studio")))) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # in a container a process of root has no sandbox
        led = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield led
        led.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Any]:
    """Opens the page in a browser of a new user; at the end nothing has left this machine and nothing has failed."""
    contexts, asked, wrong = [], set(), []

    def open_page(**settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        button(page, "Run").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    away = [url for url in asked if not url.startswith((address, "data:", "blob:", "about:"))]
    assert asked and not away
    assert not wrong


def button(page: Page, name: str) -> Locator:
    """The button of the tab that is shown."""
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def status(page: Page) -> Locator:
    return page.locator(".qs-status").locator("visible=true")


def write(page: Page, document: str = DOCUMENT, question: str = QUESTION) -> None:
    page.get_by_label("Text", exact=True).fill(document)
    page.get_by_label("Question, which is never reduced").fill(question)


def run(page: Page) -> None:
    button(page, "Run").click()
    page.locator(".qs-good, .qs-error").locator("visible=true").wait_for()
    assert page.locator(".qs-error").locator("visible=true").all_inner_texts() == []


def no_wider_than_the_window(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_text(opened: Any, tmp_path: Path) -> None:
    page = opened()
    write(page)
    button(page, "Example").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(box => box.value.includes('turquoise'))")
    write(page)
    run(page)
    sides = page.locator(".qs .sides section")
    assert sides.count() == 2 and sides.nth(0).locator(".said").inner_text() not in ("", "…")
    assert page.locator(".qs .cards li").count() >= 3
    assert {"time to first token", "cache after the prompt"} <= set(page.locator(".qs tbody th").all_inner_texts())
    tokens = page.frame_locator(".qs-frame").locator(".qm-text .t")
    assert tokens.count() > 250
    tokens.nth(60).hover()  # the map's own script runs in its frame
    assert "token 60" in page.frame_locator(".qs-frame").locator(".qm-read").inner_text()
    page.get_by_role("button", name="Take the recipe along").click()
    with page.expect_download() as got:
        page.get_by_role("link", name="Save recipe.json").click()
    assert got.value.suggested_filename == "recipe.json"
    saved = tmp_path / "recipe.json"
    got.value.save_as(saved)
    assert json.loads(saved.read_text())["merge"]["reducer"]["keep"] == 0.4
    # Another share, then both are there at once, and play by themselves.
    keep = page.get_by_label(re.compile("number input for Keep")).locator("visible=true").first
    keep.fill("0.2")
    keep.press("Tab")
    # a program is faster than a hand: the page tells its server of a slider a moment later
    page.wait_for_timeout(1000)
    button(page, "Run").click()
    page.locator(".qs-good", has_text="keep 20%").wait_for()
    button(page, "Play").click()
    status(page).filter(has_text="the run at keep 0.2").wait_for()
    status(page).filter(has_text="the run at keep 0.4. 2 runs").wait_for()
    button(page, "Play").wait_for()


def test_images(opened: Any) -> None:
    from playwright.sync_api import TimeoutError as LateError

    page = opened()
    page.get_by_role("tab", name="Images").click()
    button(page, "Run").click()
    page.get_by_role("alert").filter(has_text="drop an image first").wait_for()
    files = page.locator("input[type=file]").locator("xpath=self::*[contains(@accept, 'image')]")
    name = "<img src=x onerror=window.hit=1>.png"
    files.set_input_files([{"name": name, "mimeType": "image/png", "buffer": image()}])
    error = page.locator(".qs-error").locator("visible=true")
    good = page.locator(".qs-good").locator("visible=true")
    for _ in range(6):  # what is still on its way up is not there yet
        button(page, "Run").click()
        with suppress(LateError):
            good.wait_for(timeout=PATIENCE / 6)
            break
    assert error.all_inner_texts() == []
    assert page.locator(".qs-sheet").locator("visible=true").count() == 1
    shown = page.locator(".qs-sheet img").locator("visible=true")
    assert shown.count() == 1 and shown.evaluate("image => image.complete && image.naturalWidth > 300")
    assert page.evaluate("window.hit") is None


def test_a_hostile_document_runs_nothing_and_breaks_nothing(opened: Any) -> None:
    page = opened()
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog opened: {dialog.message}"))
    title = page.title()
    write(page, HOSTILE + DOCUMENT, HOSTILE.replace("\x00", ""))
    run(page)
    frame = page.frame_locator(".qs-frame")
    assert "onerror" in frame.locator(".qm-text").first.inner_text().replace("\n", "")
    assert frame.locator("img, a").count() == 0 and frame.locator("script").count() == 1
    assert page.evaluate("window.hit") is None and page.title() == title
    assert page.locator(".qs-out img, .qs-out script").count() == 0
    page.get_by_role("button", name="Take the recipe along").click()
    assert page.locator(".cm-content").first.inner_text().startswith("import quickmerge")
    assert page.evaluate("window.hit") is None


def test_a_text_file_of_other_bytes_is_refused(opened: Any) -> None:
    page = opened()
    chooser = page.locator("input[type=file]").first
    chooser.set_input_files([{"name": "../../x.txt", "mimeType": "text/plain", "buffer": b"\xff\xfe\x00"}])
    page.get_by_role("alert").filter(has_text="must be UTF-8 text").wait_for()
    chooser.set_input_files([{"name": "a.txt", "mimeType": "text/plain", "buffer": "a harbour é".encode()}])
    status(page).filter(has_text="11 characters").wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == "a harbour é"


def test_a_phones_width(opened: Any) -> None:
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    no_wider_than_the_window(page)
    write(page)
    run(page)
    no_wider_than_the_window(page)
    frame = page.locator(".qs-frame")
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360
    inside = page.frames[-1]
    assert inside.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_keyboard_alone(opened: Any) -> None:
    page = opened()

    def tab_to(name: str, kind: str = "") -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if kind and page.evaluate("document.activeElement.localName") != kind:
                continue
            here = page.evaluate("(document.activeElement.ariaLabel || document.activeElement.innerText || "
                                 "document.activeElement.closest('label')?.innerText || '').trim()")  # fmt: skip
            if here.startswith(name):
                return
        pytest.fail(f"Tab does not come to {name!r}")

    tab_to("Text", "textarea")  # and not the tab of that name
    for name, text in (("Text", DOCUMENT), ("Question", QUESTION)):
        if name != "Text":
            tab_to(name)
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)
    tab_to("Run")
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring not in ("none", "")
    page.keyboard.press("Enter")
    page.locator(".qs-good").locator("visible=true").wait_for()
    tab_to("Take the recipe along")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Save recipe.json").wait_for()


def test_dark_mode(opened: Any) -> None:
    page = opened(color_scheme="dark")
    write(page)
    run(page)

    def light(where: Any, selector: str) -> float:
        # of the element itself, or of what lies behind it
        found = where.evaluate(
            """selector => {
                let element = document.querySelector(selector), colour;
                do { colour = getComputedStyle(element).backgroundColor; element = element.parentElement }
                while (element && /, 0\\)$|transparent/.test(colour));
                return colour;
            }""",
            selector,
        )
        return sum(float(part) for part in re.findall(r"[\d.]+", found)[:3]) / 3

    assert light(page, ".qs .sides section") < 80
    assert light(page.frames[-1], ".qm-map") < 80  # the frame follows the page


def test_two_users_see_their_own(opened: Any) -> None:
    pages = [opened(), opened()]
    words = ("zebra", "giraffe")
    for page, word in zip(pages, words, strict=True):
        write(page, f"{word} {DOCUMENT}")
        button(page, "Run").click()
    for page, word in zip(pages, words, strict=True):
        page.locator(".qs-good").locator("visible=true").wait_for()
        text = page.frame_locator(".qs-frame").locator(".qm-text").first.inner_text()
        assert [word in text for word in words] == [word == own for own in words]


def test_a_run_is_stopped(opened: Any) -> None:
    page = opened()
    button(page, "Stop").click()
    status(page).filter(has_text="Nothing is at work").wait_for()
    write(page)
    button(page, "Try every share").click()
    status(page).filter(has_text="…").wait_for()
    button(page, "Stop").click()
    status(page).filter(has_text="Stopped.").wait_for()
    run(page)  # and there is a next one

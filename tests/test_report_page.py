"""The report in a browser: it loads nothing, says nothing on the console, fits a phone, is legible and accessible."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import dfq_deploy as dfq
from dfq_deploy.reporting import measuring

_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_CHROMIUM = next(filter(None, map(shutil.which, _BROWSERS)), None)
_SCREENS = {
    "desktop": (1280, 900, "light"),
    "desktop-dark": (1280, 900, "dark"),
    "phone": (360, 740, "light"),
    "phone-dark": (360, 740, "dark"),
}
pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason=f"none of {', '.join(_BROWSERS)} is installed")


@pytest.fixture(scope="module")
def pages(demo_report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report and a comparison."""
    out = tmp_path_factory.mktemp("pages") / "compare.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_MOST", 2)
        written = dfq.report(demo_report, compare=demo_report, out=out)
    return {"report": demo_report / "report.html", "compare": written.path}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])  # root has none
        yield opened
        opened.close()


def _opened(browser: Browser, path: Path, screen: str) -> tuple[Page, list[str]]:
    """The page on a screen, and what it said or asked for."""
    width, height, scheme = _SCREENS[screen]
    said: list[str] = []
    context: Any = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,  # type: ignore[arg-type]
        bypass_csp=True,  # axe is a script
    )
    page: Page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.resolve().as_uri())
    return page, said


@pytest.mark.parametrize("screen", _SCREENS)
@pytest.mark.parametrize("kind", ["report", "compare"])
def test_the_page_is_whole_legible_and_as_wide_as_the_screen(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, kind: str, screen: str
) -> None:
    page, said = _opened(browser, pages[kind], screen)
    assert said == [pages[kind].resolve().as_uri()], "the page itself is all that is loaded"
    assert page.evaluate("document.documentElement.scrollWidth") == _SCREENS[screen][0]
    unread = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert unread == 0
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == _SCREENS[screen][0]
        corner = shot.convert("L").getpixel((0, 0))
        assert isinstance(corner, int)
        assert (corner < 60) == screen.endswith("dark")
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    page.context.close()


def test_the_page_prints(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = _opened(browser, pages["report"], "desktop-dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "on paper"
    assert page.locator("nav").is_hidden()
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 12
    page.context.close()


def test_the_keyboard_reaches_what_scrolls_and_what_unfolds(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = _opened(browser, pages["report"], "phone")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the findings"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    details = page.locator("details").first
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    assert details.get_attribute("open") is not None
    scrolling = page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")
    assert scrolling
    page.context.close()

"""The page in a real headless Chromium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Service, wait_until

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
COMMAND_SECONDS = 60.0
"""That a command to the browser may take."""
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="there is no Chromium: apt-get install chromium chromium-driver"
    ),
]

from selenium import webdriver  # noqa: E402 - after the check that it is there
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        driver.command_executor.client_config.timeout = COMMAND_SECONDS  # the driver's own, to begin, is 120 s
        driver.set_page_load_timeout(COMMAND_SECONDS / 2)
        driver.set_script_timeout(COMMAND_SECONDS / 2)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: the folder that CASCADE_ARTEFACTS names, or a temporary one."""
    folder = Path(os.environ.get("CASCADE_ARTEFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(browser: Any, service: Service) -> Iterator[Page]:
    opened = Page(browser, service.url)
    yield opened
    wait_until(lambda: service.load == 0)


class Page:
    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)
        wait_until(lambda: bool(self.all("#model option")), 20)
        browser.get_log("browser")

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def fill(self, **values: Any) -> None:
        for name, value in values.items():
            field = self.one(f"#{name}")
            field.clear()
            field.send_keys(str(value))

    @property
    def status(self) -> str:
        return str(self.one("#status").text)

    @property
    def error(self) -> str:
        return str(self.one("#error").text)

    def console(self) -> list[str]:
        """Errors in the console, but for those that Chromium writes of every answer above 399."""
        log = self.browser.get_log("browser")
        return [
            entry["message"] for entry in log if entry["level"] == "SEVERE" and "status of 4" not in entry["message"]
        ]


def test_a_picture_is_drawn_with_previews(page: Page, screenshots: Path) -> None:
    page.fill(prompt="a red circle", seed=7)
    page.browser.execute_script(
        """window.seen = [];
        new MutationObserver(() => {
          for (const figure of document.querySelectorAll("figure")) window.seen.push(figure.className);
        }).observe(document.getElementById("pictures"), {childList: true, subtree: true, attributes: true});"""
    )
    page.one("#draw").click()
    wait_until(lambda: "1 picture in" in page.status)
    assert "unfinished" in page.browser.execute_script("return window.seen")
    image = page.one("figure img")
    assert page.browser.execute_script("return arguments[0].naturalWidth", image) == 256
    assert image.get_attribute("alt") == "a red circle"
    assert "seed 7" in page.one("figcaption").text
    page.browser.save_screenshot(str(screenshots / "page-drawn.png"))
    assert page.console() == []


def test_several_pictures_and_the_keyboard(page: Page, screenshots: Path) -> None:
    page.fill(prompt="a blue star", count=3, steps=4, seed=2**64 - 2)
    page.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: "3 pictures in" in page.status)
    captions = [figure.text for figure in page.all("figcaption")]
    assert [c.split(",")[0] for c in captions] == [f"seed {2**64 - 2}", f"seed {2**64 - 1}", "seed 0"]
    page.browser.save_screenshot(str(screenshots / "page-several.png"))
    assert page.console() == []


def test_escape_and_the_button_cancel(page: Page, service: Service) -> None:
    for cancel in (lambda: page.one("#prompt").send_keys(Keys.ESCAPE), lambda: page.one("#cancel").click()):
        page.fill(prompt="a star", steps=1000)
        page.one("#draw").click()
        wait_until(lambda: service.load == 1)
        assert not page.one("#draw").is_enabled()
        cancel()
        wait_until(lambda: page.status == "cancelled")
        wait_until(lambda: service.load == 0, 5)
        assert page.one("#draw").is_enabled()
    assert page.error == ""
    assert page.console() == []


def test_an_error_is_said_in_words(page: Page, screenshots: Path) -> None:
    page.fill(prompt="a star", size="63x64")
    page.one("#draw").click()
    wait_until(lambda: "width 63 is not accepted" in page.error or "63" in page.error)
    assert page.one("#error").get_attribute("role") == "alert"
    page.browser.save_screenshot(str(screenshots / "page-error.png"))
    assert page.console() == []


def test_history_repeats_a_picture_from_its_seed(page: Page) -> None:
    page.fill(prompt="a green square", steps=4)
    page.one("#draw").click()
    wait_until(lambda: "1 picture in" in page.status)
    first = page.one("figure img").get_attribute("src")
    page.fill(prompt="something else")
    page.one("#history li button").click()
    wait_until(lambda: len(page.all("#history li")) == 2)
    wait_until(lambda: "1 picture in" in page.status)
    assert page.one("#prompt").get_attribute("value") == "a green square"
    assert page.one("figure img").get_attribute("src") == first


def test_two_tabs_draw_at_once(page: Page, service: Service) -> None:
    first = page.browser.current_window_handle
    page.fill(prompt="a star", steps=60, seed=1)
    page.one("#draw").click()
    page.browser.switch_to.new_window("tab")
    other = Page(page.browser, service.url)
    other.fill(prompt="a circle", steps=30, seed=2)
    other.one("#draw").click()
    wait_until(lambda: "1 picture in" in other.status)
    assert "seed 2" in other.one("figcaption").text
    page.browser.close()
    page.browser.switch_to.window(first)
    wait_until(lambda: "1 picture in" in page.status)
    assert "seed 1" in page.one("figcaption").text


def test_dark_and_light(page: Page, screenshots: Path) -> None:
    def colour() -> str:
        return str(page.browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    before = colour()
    page.one("#theme").click()
    assert colour() != before
    page.browser.save_screenshot(str(screenshots / "page-other-theme.png"))
    page.one("#theme").click()
    assert colour() == before


def test_a_picture_to_vary(page: Page, tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "mine.png"
    Image.new("RGB", (32, 32), "red").save(file)
    page.fill(prompt="a star", seed=1)
    page.one("#draw").click()
    wait_until(lambda: "1 picture in" in page.status)
    plain = page.one("figure img").get_attribute("src")
    page.one("#file").send_keys(str(file))
    wait_until(lambda: page.one("#drop-text").text == "mine.png")
    page.one("#draw").click()
    wait_until(lambda: page.all("figure:not(.unfinished) img") and page.one("figure img").get_attribute("src") != plain)
    page.one("#drop-clear").click()
    assert "Drop a picture" in page.one("#drop-text").text


def test_a_model_without_the_encoder_refuses_a_picture_to_vary(
    browser: Any, plain_service: Service, tmp_path: Path
) -> None:
    from PIL import Image

    page = Page(browser, plain_service.url)
    file = tmp_path / "mine.png"
    Image.new("RGB", (32, 32), "red").save(file)
    page.one("#file").send_keys(str(file))
    wait_until(lambda: page.one("#drop-text").text == "mine.png")
    page.fill(prompt="a star")
    page.one("#draw").click()
    wait_until(lambda: "image_encoder" in page.error)


def test_every_field_has_a_name_for_screen_readers(page: Page) -> None:
    unnamed = page.browser.execute_script(
        """return [...document.querySelectorAll("input, textarea, select, button, progress")]
        .filter(e => !e.labels?.length && !e.textContent.trim() && !e.getAttribute("aria-label")).map(e => e.id)"""
    )
    assert unnamed == []
    assert page.one("html").get_attribute("lang") == "en"
    assert page.one("#status").get_attribute("aria-live") == "polite"
    assert Select(page.one("#model")).first_selected_option.text == "cascade-tiny"


def test_a_key_that_is_asked_for_is_sent(browser: Any, make_service: Callable[..., Service]) -> None:
    guarded = make_service(keys=("secret-key",))
    browser.get(guarded.url)
    wait_until(lambda: "API key" in browser.find_element(By.ID, "error").text)
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    browser.find_element(By.ID, "key").send_keys("secret-key", Keys.TAB)
    wait_until(lambda: bool(browser.find_elements(By.CSS_SELECTOR, "#model option")))
    browser.find_element(By.ID, "steps").send_keys("2")
    time.sleep(0.1)
    browser.find_element(By.ID, "draw").click()
    wait_until(lambda: "1 picture in" in browser.find_element(By.ID, "status").text)

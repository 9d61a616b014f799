"""The page that draws in the browser, in a real headless Chromium: the picture is Python's."""

from __future__ import annotations

import base64
import functools
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade_rt import CascadePipeline
from scripts import ROOT, load_script

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
from selenium import webdriver  # noqa: E402 - after the check that it is there
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="there is no Chromium: apt-get install chromium chromium-driver"
    ),
]
SECONDS = 90


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    script = load_script("try_page")
    folder = tmp_path_factory.mktemp("try")
    try:
        package = script.fetch_runtime(ROOT / "build" / "npm")
    except OSError as error:
        pytest.skip(f"onnxruntime-web cannot be had here: {error}")
    script.build(folder / "page", package.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder / "page")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/index.html"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def draw(browser: Any, address: str) -> Callable[[str, int, str], np.ndarray[Any, Any]]:
    """Draw on the page; the pixels of its canvas."""
    browser.get(address)
    wait = WebDriverWait(browser, SECONDS)
    wait.until(lambda b: b.find_element(By.ID, "draw").is_enabled() or error_of(b))
    assert error_of(browser) == ""

    def act(prompt: str, seed: int, preset: str) -> np.ndarray[Any, Any]:
        for name, value in (("prompt", prompt), ("seed", str(seed))):
            field = browser.find_element(By.ID, name)
            field.clear()
            field.send_keys(value)
        Select(browser.find_element(By.ID, "preset")).select_by_value(preset)
        browser.find_element(By.ID, "draw").click()
        wait.until(lambda b: b.find_element(By.ID, "status").text.startswith("Drawn in") or error_of(b))
        assert error_of(browser) == ""
        url = browser.execute_script("return document.getElementById('picture').toDataURL('image/png')")
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        return np.asarray(image).astype(int)

    return act


def error_of(browser: Any) -> str:
    return str(browser.find_element(By.ID, "error").get_attribute("textContent"))


@pytest.mark.parametrize(
    ("prompt", "seed", "preset"),
    [
        ("a large red circle at the left on a blue background", 0, "balanced"),
        ("A yellow STAR above a green square, unheard-of", 2**32 + 7, "fast"),
    ],
)
def test_the_picture_is_pythons(
    draw: Callable[[str, int, str], np.ndarray[Any, Any]],
    browser: Any,
    pipe: CascadePipeline,
    prompt: str,
    seed: int,
    preset: Any,
) -> None:
    found = draw(prompt, seed, preset)
    wanted = np.asarray(pipe(prompt, seed=seed, preset=preset).images[0]).astype(int)
    assert found.shape == wanted.shape == (256, 256, 3)
    assert np.abs(found - wanted).max() <= 2
    another = np.asarray(pipe(prompt, seed=seed + 1, preset=preset).images[0]).astype(int)
    assert np.abs(found - another).max() > 50
    steps = {"balanced": 15, "fast": 6}[preset]
    assert browser.find_element(By.ID, "picture").get_attribute("data-previews") == str(steps)
    assert f"--seed {seed} --preset {preset}" in browser.find_element(By.ID, "command").text


def test_it_asks_no_other_host(draw: Any, browser: Any, address: str) -> None:
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    asked = browser.execute_script(script)
    assert asked
    assert all(name.startswith(address.rpartition("/")[0]) for name in asked)
    assert [row for row in browser.get_log("browser") if row["level"] == "SEVERE"] == []


@pytest.mark.parametrize(("name", "width", "height"), [("phone", 390, 844), ("desktop", 1280, 900)])
def test_it_fits(
    draw: Any, browser: Any, tmp_path_factory: pytest.TempPathFactory, name: str, width: int, height: int
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    folder = Path(os.environ.get("CASCADE_ARTEFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(folder / f"try-{name}.png"))

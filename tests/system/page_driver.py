"""A headless Chromium with the chat page open, and what a person does there."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'weft[dev]'")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

__all__ = ["By", "Keys", "Page", "open_browser"]

Driver = webdriver.Chrome
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def open_browser(downloads: Path) -> Driver:
    """A browser that logs its console and its requests; skips the test where there is none."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    return opened


class Page:
    """The page at `url`, as a person sees it for the first time."""

    def __init__(self, driver: Driver, url: str) -> None:
        self.driver, self.url = driver, url
        self.size(1280, 800)
        self.emulate("light")
        driver.get(url)
        self.script("localStorage.clear()")
        self.reload()
        self.console(), self.requests()

    def reload(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.get("#model").is_enabled() or self.all(".error"))

    def size(self, width: int, height: int, touch: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})

    def emulate(self, scheme: str) -> None:
        """Make the system prefer `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    # Looking.

    def get(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def text(self, selector: str) -> str:
        """All text of the first match, shown or not."""
        return self.script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    @property
    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    @property
    def messages(self) -> list[tuple[str, str]]:
        """Who said what, from the page."""
        code = """return [...document.querySelectorAll("#messages > .message:not(.error)")]
            .map((row) => [row.classList.contains("user") ? "user" : "assistant", row.querySelector(".body").textContent])"""
        return [(who, text) for who, text in self.script(code)]

    @property
    def chats(self) -> list[Any]:
        """The conversations that the browser keeps."""
        code = 'return Object.keys(localStorage).filter((key) => key.startsWith("weft.chat.")).map((key) => JSON.parse(localStorage[key]))'
        return self.script(code)

    @property
    def answering(self) -> bool:
        return self.get("#stop").is_displayed()

    def until(self, happens: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := happens():
                return found
            time.sleep(0.02)
        raise AssertionError(f"did not happen in {seconds} s; console: {self.console()}")

    def console(self) -> list[str]:
        """What the console said since the last call, problems alone."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[Any]:
        """Bodies of the chat completions that the page asked for since the last call."""
        said = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [message["params"]["request"] for message in said if message["method"] == "Network.requestWillBeSent"]
        return [json.loads(request["postData"]) for request in asked if request["url"].endswith("/v1/chat/completions")]

    # Doing.

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, held: str, key: str) -> None:
        webdriver.ActionChains(self.driver).key_down(held).send_keys(key).key_up(held).perform()

    def point(self, element: Any) -> None:
        webdriver.ActionChains(self.driver).move_to_element(element).perform()

    def act(self, index: int, action: str) -> None:
        """Click a message's button."""
        self.script(
            "document.querySelectorAll('#messages > .message')[arguments[0]].querySelector(`[data-action=${arguments[1]}]`).click()",
            index,
            action,
        )

    def set(self, **fields: Any) -> None:
        """Fill in fields of the settings, which open for it and close again."""
        self.get("#open-settings").click()
        for name, value in fields.items():
            field = self.get(f"#settings-form [name={name}]")
            if isinstance(value, bool):
                if field.is_selected() != value:
                    self.get("#settings-form .switch").click()
            else:
                field.clear()
                field.send_keys(str(value))
        self.get("#close-settings").click()

    def send(self, text: str) -> None:
        prompt = self.get("#prompt")
        prompt.send_keys(text)
        prompt.send_keys(Keys.ENTER)

    def ask(self, text: str) -> str:
        """Say something and wait for the end of the answer, which is returned."""
        before = len(self.messages)
        self.send(text)
        return self.answer(before + 2)

    def answer(self, count: int) -> str:
        """The last message, once there are `count` and nothing more is being written."""
        self.until(lambda: len(self.messages) == count and not self.answering)
        return self.messages[-1][1]

"""A headless Chromium and the chat page in it, as its users see it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SECONDS = 60  # patience: the machine may be busy


def find_chromium() -> tuple[str, str] | None:
    """The programs of browser and driver, if both are here."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def start_browser(programs: tuple[str, str], downloads: Path, width: int = 1280, height: int = 900) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    several = "profile.default_content_setting_values.automatic_downloads"  # without being asked
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads), several: 1})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))


class Page:
    """The chat page in a browser's tab."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> "Page":
        """A first visit: nothing is kept from an earlier one."""
        self.driver.get(self.url)
        self.driver.execute_script("localStorage.clear()")
        return self.reload()

    def reload(self) -> "Page":
        self.driver.get(self.url)
        self.wait(lambda: self.find("#message textarea") and self.find("#message .submit-button"))
        return self

    def wait(self, condition: Callable[[], Any]) -> Any:
        wait = WebDriverWait(self.driver, SECONDS, poll_frequency=0.05)
        return wait.until(lambda _: condition())

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {code}", *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.script("Array.from(document.querySelectorAll(arguments[0])).map(e => e.innerText.trim())", selector)

    @property
    def questions(self) -> list[str]:
        return self.texts("#chat .user .message-content")

    @property
    def answer(self) -> str:
        """The last reply with its note."""
        return (self.texts("#chat .bot.message") or [""])[-1]

    @property
    def notes(self) -> list[str]:
        return self.texts("#chat .note, #chat .error")

    @property
    def box(self) -> str:
        return self.script("document.querySelector('#message textarea').value")

    @property
    def is_busy(self) -> bool:
        return bool(self.find("#message .stop-button"))

    def click(self, selector: str) -> None:
        self.script("document.querySelector(arguments[0]).click()", selector)

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds, at once and with any characters (the driver's keys know no emoji)."""
        self.script(
            "(() => { const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "['input', 'change', 'blur'].forEach(k => e.dispatchEvent(new Event(k, {bubbles: true}))) })()"
            .replace("arguments[0]", json.dumps(selector)).replace("arguments[1]", json.dumps(text))
        )  # fmt: skip

    def send(self, text: str) -> None:
        self.type("#message textarea", text)
        self.find("#message textarea")[0].send_keys(Keys.ENTER)

    def ask(self, text: str) -> str:
        """The finished reply to a message, with its note."""
        count = len(self.notes)
        self.send(text)
        # The box empties when the page takes the message, and shows from then on whether it is busy.
        self.wait(lambda: len(self.notes) > count and not self.box and not self.is_busy)
        return self.answer

    def requests(self) -> set[str]:
        """Every address that was loaded from since the last call; what the page's policy forbade was not."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        events = [(message["method"], message["params"]) for message in messages]
        asked = {p["requestId"]: p["request"]["url"] for method, p in events if method == "Network.requestWillBeSent"}
        for method, params in events:
            if method == "Network.loadingFailed" and params.get("blockedReason") == "csp":
                asked.pop(params["requestId"], None)
        return set(asked.values())

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
        self.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        return self.reload()

    def reload(self) -> "Page":
        self.driver.get(self.url)
        self.wait(lambda: self.script("Boolean(window.chat?.tools)"))
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
        return self.texts("#chat .user-row .message-content")

    @property
    def answer(self) -> str:
        """The last reply."""
        return (self.texts("#chat .bot-row .message-content") or [""])[-1].replace("\u200b", "")

    @property
    def notes(self) -> list[str]:
        """What stands under the replies."""
        return self.texts("#chat .bot-row .note")

    @property
    def box(self) -> str:
        return self.script("document.querySelector('#message textarea').value")

    @property
    def is_busy(self) -> bool:
        return self.script("window.chat.isBusy")

    def act(self, label: str, row: int = -1) -> None:
        """Press a button under a message, known by what it is called."""
        button = f".tools [aria-label={json.dumps(label)}]"
        press = "[...document.querySelectorAll('#chat .message-row')].at(arguments[0]).querySelector(arguments[1])"
        self.wait(lambda: self.script(press, row, button))
        self.script(f"{press}.click()", row, button)

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
        """The finished reply to a message."""
        count = len(self.script("window.chat.tools.items"))
        self.send(text)
        self.wait(lambda: len(self.script("window.chat.tools.items")) > count and not self.is_busy)
        self.wait(lambda: len(self.notes) == len(self.texts("#chat .bot-row")) and self.answer or self.notes[-1:])
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

"""The chat page in a real browser, its model behind it, as people use it: type, stop, reload, two at once."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.transcript import load_transcript

webdriver = pytest.importorskip("selenium.webdriver")
import browser  # noqa: E402
from browser import Page  # noqa: E402

PROGRAMS = browser.find_chromium()
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="no Chromium: apt-get install chromium chromium-driver")

LONG = "say: " + " ".join(str(number) for number in range(150))
HTML = '<img src=x onerror="window.pwned=1"> <script>window.pwned=1</script> <b>bold</b>'


@contextlib.contextmanager
def serve(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A running web_demo.py with the demo checkpoint, and its address."""
    command = [sys.executable, str(ROOT / "tests" / "web_worker.py"), "-c", "demo", "--server-port", "0", *flags]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = os.environ | {"PYTHONPATH": path, "no_proxy": "127.0.0.1"}
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=subprocess.PIPE, text=True, env=env)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                yield process, found[0]
                return
        pytest.fail("".join(lines))
    finally:
        process.send_signal(signal.SIGINT)
        with process.stderr:
            rest = process.stderr.read()
        assert process.wait(30) == 0 and "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def url(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replies at once, and room for short chats only."""
    log = tmp_path_factory.mktemp("web") / "stdout.txt"
    with serve(log, "--max-users", "2", "--kv-cache-gib", "0.3", "--lang", "en") as (_, url):
        yield url


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads: Path) -> Iterator["webdriver.Chrome"]:
    driver = browser.start_browser(PROGRAMS, downloads)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def other_driver(downloads: Path) -> Iterator["webdriver.Chrome"]:
    driver = browser.start_browser(PROGRAMS, downloads, 360, 740)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: "webdriver.Chrome", url: str) -> Page:
    return Page(driver, url).open()


def test_a_reply_streams_and_can_be_stopped(page: Page) -> None:
    page.send(LONG)
    first = page.wait(lambda: "0 1 2 3" in page.answer and page.answer)
    longer = page.wait(lambda: len(page.answer) > len(first) + 10 and page.answer)
    assert longer.startswith("0 1 2 3") and page.is_busy
    page.click("#message .stop-button")
    page.wait(lambda: not page.is_busy)
    assert "stopped" in page.notes[-1] and "149" not in page.answer
    assert page.ask("say: All is well.").startswith("All is well.")
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s, prompt \d+$", page.notes[-1])


def test_regenerate_edit_undo_and_clear(page: Page) -> None:
    assert page.ask("say: one").startswith("one")
    assert page.ask("say: two").startswith("two")
    page.click("#regenerate")
    page.wait(lambda: page.is_busy)
    page.wait(lambda: not page.is_busy)
    assert page.questions == ["say: one", "say: two"] and page.answer.startswith("two")
    page.click("#edit")
    page.wait(lambda: page.box == "say: two")
    assert page.questions == ["say: one"]
    assert page.ask("say: three").startswith("three")
    page.click("#undo")
    page.wait(lambda: page.questions == ["say: one"])
    page.click("#clear")
    page.wait(lambda: not page.questions)
    assert page.ask("say: afresh").startswith("afresh")


def test_html_is_shown_and_not_run(page: Page) -> None:
    outside = "![p](http://192.0.2.1/p.png) [l](javascript:window.pwned=1)"
    fence = "```\n<script>window.pwned=1</script>\n```"
    answer = page.ask(f"say: {HTML} {outside}\n\n{fence}\n\n`a <b>`")
    for shown in (answer, page.questions[0]):
        assert HTML in shown and "<script>window.pwned=1</script>" in shown.replace(HTML, "") and "a <b>" in shown
    assert page.find("#chat .message-content script, #chat .message-content img, #chat a[href^=javascript]") == []
    assert page.script("window.pwned") is None
    # The browser itself is told to stay: this is what would happen if all else failed.
    page.script("void document.body.insertAdjacentHTML('beforeend', '<img src=\"http://192.0.2.1/evil.png\">')")
    page.wait(lambda: any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser")))
    assert [url for url in page.requests() if not url.startswith((page.url, "data:", "blob:"))] == []


def test_any_script_and_markdown(page: Page, tmp_path: Path) -> None:
    text = "你好，世界 🎉👩‍👩‍👧 **مرحبا**\n\nשלום עולם\n\n$$x^2 < y$$\n\n```python\nprint('<b>')\n```"
    answer = page.ask(f"say: {text}")
    assert "你好，世界 🎉👩‍👩‍👧 مرحبا" in answer and "print('<b>')" in answer
    assert (
        page.find("#chat .bot strong") and page.find("#chat .bot .katex") and page.find("#chat .bot .copy_code_button")
    )
    start, end = page.script(
        "(() => { const p = [...document.querySelectorAll('#chat .bot p')].find(p => p.innerText.includes('שלום'));"
        "const r = document.createRange(); r.selectNodeContents(p); const t = r.getBoundingClientRect();"
        "const b = p.getBoundingClientRect(); return [t.left - b.left, b.right - t.right] })()"
    )
    assert start > end  # Hebrew begins at the right
    assert page.driver.save_screenshot(str(tmp_path / "page.png"))


def test_two_browsers_at_once(page: Page, other_driver: "webdriver.Chrome", url: str) -> None:
    other = Page(other_driver, url).open()
    page.send(LONG)
    other.send(LONG.replace("say: ", "say: other "))
    page.wait(lambda: "0 1 2" in page.answer)
    other.wait(lambda: "other 0 1 2" in other.answer)
    assert page.is_busy and other.is_busy and "other" not in page.answer
    # A third one waits for a place, and gets it when a tab is closed.
    page.driver.switch_to.new_window("tab")
    try:
        third = Page(page.driver, url).reload()
        third.send("say: third")
        third.wait(lambda: any("place 1" in note for note in third.notes))
        other_driver.get("about:blank")
        third.wait(lambda: third.answer.startswith("third"))
    finally:
        page.driver.close()
        page.driver.switch_to.window(page.driver.window_handles[0])
    assert page.is_busy and len(page.questions) == 1
    page.click("#message .stop-button")
    page.wait(lambda: not page.is_busy)


def test_a_reload_keeps_the_chat(page: Page) -> None:
    page.ask("say: remember <b>me</b>")
    page.wait(lambda: page.script("Object.keys(localStorage).length") > 0)
    page.reload()
    page.wait(lambda: page.questions == ["say: remember <b>me</b>"])
    assert page.answer.startswith("remember <b>me</b>") and page.ask("say: more").startswith("more")
    assert len(page.questions) == 2


@pytest.mark.slow
def test_settings_act_and_can_be_reset(page: Page) -> None:
    page.click("#settings button")
    page.wait(lambda: page.find("#max_new_tokens input[type=number]"))
    page.type("#max_new_tokens input[type=number]", "6")
    page.type("#temperature input[type=number]", "2")
    page.type("#seed textarea", "7")
    same = page.ask("Hello!")
    assert "6 tokens" in page.notes[-1] and "cut at the longest reply" in page.notes[-1]
    prompt = int(page.notes[-1].split("prompt ")[1].split()[0])
    page.click("#clear")
    page.wait(lambda: not page.questions)
    assert page.ask("Hello!").split("\n")[0] == same.split("\n")[0]
    page.type("#seed textarea", "8")
    page.click("#clear")
    page.wait(lambda: not page.questions)
    assert page.ask("Hello!").split("\n")[0] != same.split("\n")[0]
    page.type("#system textarea", "Speak like a pirate, and " + "never " * 20 + "stop.")
    page.click("#clear")
    page.wait(lambda: not page.questions)
    page.ask("Hello!")
    assert int(page.notes[-1].split("prompt ")[1].split()[0]) > prompt + 20
    page.click("#reset")
    page.wait(lambda: page.script("document.querySelector('#max_new_tokens input').value") == "512")
    assert page.script("document.querySelector('#system textarea').value") == "You are a helpful assistant."


@pytest.mark.slow
def test_errors_are_sentences_and_the_next_message_works(page: Page) -> None:
    page.ask("word " * 8000)
    assert re.fullmatch(r"No reply: the prompt has [\d,]+ tokens and .*: shorten it", page.notes[-1])
    assert page.ask("say: fine").startswith("fine")
    assert int(page.notes[-1].split("prompt ")[1].split()[0]) < 100  # the failed question is not told to the model


@pytest.mark.slow
def test_export(page: Page, downloads: Path) -> None:
    page.ask("say: <b>ü</b> 🎉")
    page.click("#save_json")
    page.click("#save_markdown")
    page.wait(lambda: (downloads / "chat.json").exists() and (downloads / "chat.md").exists())
    transcript = load_transcript(downloads / "chat.json")
    assert transcript == ("You are a helpful assistant.", [("say: <b>ü</b> 🎉", "<b>ü</b> 🎉")])
    assert "**You**\n\nsay: <b>ü</b> 🎉" in (downloads / "chat.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_phone_sees_all_of_it(other_driver: "webdriver.Chrome", url: str, tmp_path: Path) -> None:
    other_driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    page = Page(other_driver, url).open()
    page.ask("say: | a | b |\n|---|---|\n| 1 | 2 |\n\n```\n" + "wide " * 40 + "\n```")
    assert page.script("document.documentElement.scrollWidth") <= 360
    page.click("#dark")
    assert page.script("document.body.classList.contains('dark')")
    assert page.driver.save_screenshot(str(tmp_path / "phone.png"))
    unnamed = page.script(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent && !(e.innerText || "
        "e.ariaLabel || e.title || e.labels?.length || e.placeholder)).map(e => e.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_who_has_no_password_sees_nothing(demo_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "stdout.txt", "--auth", "user:pass:word") as (_, url):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url + "gradio_api/info")
        login = urllib.request.Request(url + "login", data=b"username=user&password=pass%3Aword")
        assert json.load(urllib.request.urlopen(login)) == {"success": True}

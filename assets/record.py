"""Make the pictures of the README: the chat page as it is on a desk and on a phone, and both chats while they write.

python assets/record.py

Needs Chromium with its driver, and what requirements_dev.txt installs. Runs the demo model, for two minutes or so.
"""

import argparse
import html
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from selenium import webdriver

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Page, find_chromium, start_browser  # noqa: E402
from terminal import CTRL_D, Terminal  # noqa: E402

from qwen import QwenError  # noqa: E402
from utils import run_script  # noqa: E402

QUESTION = "Write a Python function that reverses a string."
SYSTEM = "You are a helpful assistant. Answer briefly."
FRAME = 0.4  # seconds between two pictures of a recording
COLORS = 64
TERMINAL = "<body style='margin:0;background:#10141c;color:#e6e6e6'><pre style='font:15px/1.35 monospace;margin:16px'>"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="what answers (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "assets", help="folder (default: assets/)")
    return parser.parse_args(argv)


def look(driver: webdriver.Chrome) -> Image.Image:
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def save_animation(frames: list[Image.Image], path: Path, width: int) -> None:
    """A looping GIF, `width` pixels wide, that rests on its last frame."""
    size = (width, round(frames[0].height * width / frames[0].width))
    small = [frame.resize(size, Image.Resampling.LANCZOS).quantize(COLORS) for frame in frames]
    times = [round(FRAME * 1000)] * (len(small) - 1) + [3000]
    small[0].save(path, save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True)


def wait_for_address(process: subprocess.Popen) -> str:
    """Where web_demo.py says that it serves."""
    for line in process.stderr:
        if line.startswith("serving at "):
            return line.split()[-1]
    raise QwenError("web_demo.py did not start: run it by hand to see why")


def record_page(driver: webdriver.Chrome, url: str, output: Path) -> None:
    """A question and its reply on a desk; then the same on a phone, in the dark."""
    page = Page(driver, url).open()
    set_size(driver, 1280, 860)
    frames = [look(driver)]
    page.send(QUESTION)
    page.wait(lambda: page.is_busy)
    while page.is_busy:
        frames.append(look(driver))
        time.sleep(FRAME)
    frames.append(look(driver))
    frames[-1].save(output / "web_demo.png", optimize=True)
    save_animation(frames, output / "web_demo.gif", 800)
    set_size(driver, 360, 740)
    page.script("document.body.classList.add('dark')")
    time.sleep(1)
    look(driver).save(output / "web_demo_phone.png", optimize=True)


def set_size(driver: webdriver.Chrome, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def terminal_frames(driver: webdriver.Chrome, checkpoint: str) -> Iterator[Image.Image]:
    """The terminal chat from its prompt to the end of a reply."""
    command = [sys.executable, str(ROOT / "cli_demo.py"), "-c", checkpoint, "-s", "1", "--lang", "en"]
    env = os.environ | {"TERM": "xterm-256color", "NO_COLOR": "1"}
    terminal = Terminal([*command, "--system", SYSTEM], env, ROOT, columns=88, rows=22)
    try:
        terminal.read_until(terminal.at_prompt)
        for end in range(0, len(QUESTION) + 1, 4):
            terminal.write(QUESTION[max(0, end - 4) : end])
            terminal.read(FRAME)
            yield draw(driver, terminal)
        terminal.write(QUESTION[end:] + "\r")
        while not terminal.at_prompt():
            until = time.monotonic() + FRAME
            while time.monotonic() < until:
                terminal.read(0.05)
            yield draw(driver, terminal)
        terminal.write(CTRL_D)
        terminal.wait()
    finally:
        terminal.close()


def draw(driver: webdriver.Chrome, terminal: Terminal) -> Image.Image:
    """The terminal's screen as a picture, its cursor with it."""
    lines = list(terminal.screen.display)
    row, column = terminal.screen.cursor.y, terminal.screen.cursor.x
    lines[row] = f"{lines[row][:column]}█{lines[row][column + 1 :]}"
    driver.execute_script("document.documentElement.innerHTML = arguments[0]", TERMINAL + html.escape("\n".join(lines)))
    return look(driver)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    programs = find_chromium()
    if programs is None:
        raise QwenError("no Chromium with its driver is here: apt-get install chromium chromium-driver")
    driver = start_browser(programs, args.output)
    command = [sys.executable, str(ROOT / "web_demo.py"), "-c", args.checkpoint_path, "--server-port", "0"]
    server = subprocess.Popen([*command, "--lang", "en"], stderr=subprocess.PIPE, text=True)
    try:
        record_page(driver, wait_for_address(server), args.output)
        server.terminate()
        server.wait()
        driver.get("about:blank")
        set_size(driver, 860, 480)
        save_animation(list(terminal_frames(driver, args.checkpoint_path)), args.output / "cli_demo.gif", 800)
    finally:
        server.kill()
        driver.quit()
    for name in ("web_demo.png", "web_demo_phone.png", "web_demo.gif", "cli_demo.gif"):
        print(f"{args.output / name}: {(args.output / name).stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    run_script(main)

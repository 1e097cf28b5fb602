"""The local page in a real browser: one types, draws, and sees pictures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import ROOT, run_command_line
from PIL import Image
from test_app_parts import slowed

from megatron_nuwa.generation.app.__main__ import OFFLINE
from megatron_nuwa.generation.trained import Generator
from megatron_nuwa.training.launcher import free_port

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SECONDS = 120
# A picture that has arrived, and its width in pixels.
WIDTHS = "return [...document.querySelectorAll('.finished img')].map(image => image.naturalWidth)"
# What a finished run says, or nothing yet.
FINAL = """
const status = document.querySelector('#status .status:not([data-old])');
const said = status ? status.innerText.trim() : '';
return said === 'Done.' || status?.classList.contains('wrong') ? said : null;
"""


def reason_against() -> str | None:
    """Why there is no browser to test with; None where there is one."""
    for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")):
        if shutil.which(program) is None:
            return f"no {program} (apt-get install {package})"
    for module in ("gradio", "gradio_client", "selenium"):
        try:
            __import__(module)
        except ImportError:
            return f"no {module} (pip install 'megatron-nuwa[app,dev]')"
    return None


@pytest.fixture(scope="module")
def address(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page of a small random model is served; its frames arrive slowly."""
    os.environ.update(OFFLINE)
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"the page in a browser: {reason}")
    from megatron_nuwa.generation.app import page as module

    with pytest.MonkeyPatch.context() as patch:
        slowed(patch, 0.05)
        page = module.build_page(generator, tmp_path_factory.mktemp("pictures"))
        _, local, _ = page.launch(prevent_thread_lock=True, **module.serving())
        yield local
        page.close()


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Chrome]:
    """A headless Chromium with the page open."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    # Editors draw with WebGL, which a machine without a GPU does in software.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1400"):
        options.add_argument(f"--{flag}")
    options.add_argument("--enable-unsafe-swiftshader")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        browser.get(address)
        wait(browser, lambda: browser.find_elements("css selector", "#prompt textarea"))
        yield browser
    finally:
        browser.quit()


def wait(browser: Chrome, there: Callable[[], object]) -> object:
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    # Parts of the page come and go while it changes.
    passing = (NoSuchElementException, StaleElementReferenceException)
    return WebDriverWait(browser, SECONDS, 0.1, passing).until(lambda _: there())


def choose(browser: Chrome, task: str) -> None:
    button = browser.find_element("css selector", f'#task input[value="{task}"]')
    browser.execute_script("arguments[0].click()", button)


def write(browser: Chrome, text: str) -> None:
    def typed() -> bool:
        field = browser.find_element("css selector", "#prompt textarea")
        field.clear()
        field.send_keys(text)
        return field.get_attribute("value") == text

    # A part that is not shown is not there.
    wait(browser, typed)


def generate(browser: Chrome) -> str:
    """Press the button; what the status says in the end."""
    # What was said before is marked, and the first thing that a new run says replaces it.
    browser.execute_script("document.querySelector('#status .status').dataset.old = ''")

    def pressed() -> bool:
        browser.find_element("css selector", "#generate").click()
        return within(30, lambda: not browser.find_elements("css selector", "#status [data-old]"))

    # Pressed again where the page was not ready to take it.
    wait(browser, pressed)
    return str(wait(browser, lambda: browser.execute_script(FINAL)))


def within(seconds: float, there: Callable[[], object]) -> bool:
    """Whether something comes to be there in so much time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if there():
            return True
        time.sleep(0.2)
    return False


def changes(browser: Chrome, editor: str) -> bool:
    """Whether an editor takes what it was given, which a busy machine needs some time for."""
    undo = f'{editor} button[aria-label="Undo"]:not([disabled])'
    return within(20, lambda: browser.find_elements("css selector", undo))


def upload(browser: Chrome, editor: str, path: Path) -> None:
    """Give an editor a picture, again where it was not ready to take it."""

    def uploaded() -> bool:
        browser.find_element("css selector", f"{editor} input[type=file]").send_keys(str(path))
        return changes(browser, editor)

    wait(browser, uploaded)


def paint(browser: Chrome, editor: str) -> None:
    """Draw a stroke in an editor, again where it was not ready to take it."""
    from selenium.webdriver import ActionChains

    def painted() -> bool:
        canvas = browser.find_element("css selector", f"{editor} canvas")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        stroke = ActionChains(browser).move_to_element_with_offset(canvas, -60, -40).pause(0.2)
        stroke.click_and_hold().move_by_offset(60, 30).move_by_offset(30, 40).release().perform()
        # A picture could be undone before; what was painted on it needs a moment, too.
        time.sleep(1)
        return changes(browser, editor)

    wait(browser, painted)


def test_one_types_and_sees_a_picture(browser: Chrome) -> None:
    choose(browser, "t2i")
    write(browser, "a red square moves left")
    assert generate(browser) == "Done."
    assert wait(browser, lambda: browser.execute_script(WIDTHS) == [16])
    assert wait(browser, lambda: "t2i-0" in browser.find_element("css selector", "#files").text)


def test_one_watches_frames_arrive(browser: Chrome) -> None:
    choose(browser, "t2v")
    browser.execute_script(
        "window.seen = []; new MutationObserver(() => window.seen.push("
        "document.querySelectorAll('.strip img').length)).observe("
        "document.querySelector('#result'), {childList: true, subtree: true})"
    )
    write(browser, "a blue circle stays")
    assert generate(browser) == "Done."
    seen = browser.execute_script("return window.seen")
    assert [count for count in (1, 2, 3) if count in seen] == [1, 2, 3]
    assert wait(browser, lambda: browser.execute_script(WIDTHS) == [16])


def test_one_paints_over_a_picture(browser: Chrome, tmp_path: Path) -> None:
    Image.new("RGB", (480, 400), "teal").save(tmp_path / "photo.png")
    choose(browser, "i2i")
    assert generate(browser) == "upload a picture first."
    upload(browser, "#picture", tmp_path / "photo.png")
    paint(browser, "#picture")
    assert generate(browser) == "Done."
    assert wait(browser, lambda: browser.execute_script(WIDTHS) == [16])


def test_one_draws_a_sketch(browser: Chrome) -> None:
    choose(browser, "s2i")
    paint(browser, "#sketch")
    assert generate(browser) == "Done."
    assert wait(browser, lambda: browser.execute_script(WIDTHS) == [16])


def test_who_waits_for_others_is_told(browser: Chrome, address: str) -> None:
    def prepare() -> None:
        choose(browser, "t2v")
        write(browser, "a green circle stays")

    def begin(window: str) -> None:
        browser.switch_to.window(window)
        browser.find_element("css selector", "#generate").click()

    first = browser.current_window_handle
    prepare()
    browser.switch_to.new_window("tab")
    second = browser.current_window_handle
    try:
        browser.get(address)
        wait(browser, lambda: browser.find_elements("css selector", "#prompt textarea"))
        prepare()
        # Only now, lest the one be done before the other asks.
        begin(first)
        wait(browser, lambda: browser.find_elements("css selector", ".strip"))
        begin(second)
        said = browser.find_element("css selector", "#status")
        wait(browser, lambda: said.text == "Waiting for its turn …")
        assert wait(browser, lambda: browser.execute_script(FINAL)) == "Done."
    finally:
        browser.switch_to.window(second)
        browser.close()
        browser.switch_to.window(first)


def test_a_mistake_is_one_sentence(browser: Chrome) -> None:
    choose(browser, "t2i")
    write(browser, "word " * 90)
    assert generate(browser).endswith("tokens, and at most 77 are allowed.")


def test_nothing_is_asked_of_other_machines(browser: Chrome, address: str) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_without_gradio_the_command_says_what_to_install(tmp_path: Path) -> None:
    broken = tmp_path / "gradio"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no gradio here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_command_line(
        *("env", f"PYTHONPATH={path}", sys.executable, "-m", "megatron_nuwa.generation.app"),
        *("--run", "nowhere"),
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: the page needs gradio (no gradio here); install it: pip install 'gradio>=6'"
    )


def test_a_page_that_has_ended_leaves_no_file(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    port = free_port()
    command = [sys.executable, "-m", "megatron_nuwa.generation.app", "--port", str(port)]
    kept = {**os.environ, "TMPDIR": str(tmp_path)}
    with (
        subprocess.Popen([*command, "--run", str(run)], cwd=ROOT, env=kept) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client,
    ):

        def answers() -> bool:
            assert process.poll() is None
            with suppress(httpx.TransportError):
                return bool(client.get("/config").is_success)
            return False

        try:
            assert within(SECONDS, answers)
            client.post("/gradio_api/upload", files={"files": ("mine.png", b"uploaded")})
            runs = client.get("/config").json()["dependencies"]
            number = max(runs, key=lambda each: len(each["inputs"]))["id"]
            values = ["t2i", "a red square", None, None, None, None, 1, False, 3, 0, 1, 1, 0, 1, 1]
            asked = {"data": values, "fn_index": number, "session_hash": "one"}
            client.post("/gradio_api/queue/join", json=asked).raise_for_status()
            with client.stream("GET", "/gradio_api/queue/data?session_hash=one") as told:
                result = next(line for line in told.iter_lines() if "process_completed" in line)
            assert '"success":true' in result.replace(" ", "")
            names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
            assert names >= {"mine.png", "t2i-0.png"}
        finally:
            # As Ctrl+C, which shells have their background commands ignore.
            process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)
    assert list(tmp_path.iterdir()) == []

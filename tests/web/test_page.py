"""The web page in headless Chromium: a chat with streaming, the gauges, an API key, the keyboard, the narrow layout.

With SAGELLM_SCREENSHOTS=FOLDER it leaves pictures there (`make web-test`).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, SHIFT, Page, browser
from servers import ScriptedChannel, TestServer, running, tokenizer

from sageLLM.runtime.server.messages import Load, Step
from sageLLM.runtime.server.pages import FOLDER

SCREENSHOTS = Path(os.environ.get("SAGELLM_SCREENSHOTS") or tempfile.mkdtemp())
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="requires Chromium; on Debian: apt-get install chromium")
KEY = "opens-the-door"
ANSWER = "Two phases:\n```python\nprefill()\n```\nand **decode**. <b>No markup</b>"


@pytest.fixture(scope="module")
def channel() -> ScriptedChannel:
    return ScriptedChannel()


@pytest.fixture(scope="module")
def server(channel: ScriptedChannel) -> Iterator[TestServer]:
    with running(lambda: channel, api_key=[KEY]) as found:
        yield found


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        yield found


@pytest.fixture
def chat(page: Page, server: TestServer) -> Page:
    """The page with its key, also in a process in which no other test has entered it."""
    if page.value("location.href") != f"{server.url}/":
        page.show_as(scheme="light", width=1280, height=800)
        page.open(f"{server.url}/")
        page.wait_for("document.querySelector('#key-dialog').open")
        page.type(KEY)
        page.press("Enter")
        page.wait_for("document.querySelector('#model').value == 'tiny'")
        page.problems.clear()
    return page


def test_files_refer_to_nothing_elsewhere(server: TestServer) -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|\son\w+=\"", text), path
        if path.suffix != ".html":
            assert server.get(f"/web/{path.name}").status_code == 200
    answer = server.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "<title>sageLLM</title>" in answer.text and "<title>sageLLM: API" in server.get("/docs").text
    for path in ("/web/", "/web/index.html", "/web/..%2fpages.py", "/web/%2e%2e/pages.py"):
        assert server.get(path).status_code == 404, path


@needs_chromium
def test_a_conversation(page: Page, server: TestServer, channel: ScriptedChannel) -> None:
    """The engine is scripted, so every stage of an answer can be looked at."""
    page.show_as(scheme="light", width=1280, height=800)
    page.open(f"{server.url}/")
    page.wait_for("document.querySelector('#key-dialog').open")
    page.type("wrong")
    page.press("Enter")
    page.wait_for("document.querySelector('#key-note').textContent.includes('does not accept')")
    page.type(KEY)
    page.press("Enter")
    page.wait_for("document.querySelector('#model').value == 'tiny'")
    assert all("a status of 401" in one for one in page.problems)
    page.problems.clear()
    page.screenshot(SCREENSHOTS / "light-empty.png")

    page.click("#prompt")
    page.type("Describe")
    page.press("Enter", SHIFT)
    page.type("a step")
    page.press("Enter")
    assert channel.arrived.acquire(timeout=30)
    [name] = channel.submitted
    ids = tokenizer().encode(ANSWER)
    channel.emit_tokens(name, ids[:4], num_cached_tokens=0)
    page.wait_for("document.querySelector('.assistant .body').textContent.startsWith('Two')")
    assert page.text(".message.user .body") == "Describe\na step"
    assert page.value("document.querySelector('.assistant').ariaBusy") == "true"
    assert page.value("document.querySelector('#send').ariaLabel") == "Stop"
    load = Load(3, 2, 1, 100, 40, 25, 80, 20, 1, 4000, 900, 7)
    channel.emit(Step([], load))
    page.wait_for("document.querySelector('#kv-used').textContent == '40'")
    page.wait_for("document.querySelector('#running').textContent == '3'")
    channel.emit(Step([], Load(3, 2, 1, 100, 40, 25, 80, 20, 1, 9000, 2900, 9)))
    page.wait_for("document.querySelector('#prefill-rate').textContent != '0'")
    assert page.value("document.querySelector('#kv').ariaValueText") == "40 used and 25 cached of 100 blocks"
    assert [page.text(f"#{one}") for one in ("waiting", "queued", "refused", "hits")] == ["2", "0", "2", "25 %"]
    channel.emit_tokens(name, [*ids[4:], *tokenizer().eos_token_ids], "stop")
    page.wait_for("document.querySelector('.assistant .facts')")
    assert page.text(".assistant pre") == "prefill()" and page.text(".assistant strong") == "decode"
    assert "<b>No markup</b>" in page.text(".assistant"), "an answer is text, not HTML"
    page.screenshot(SCREENSHOTS / "light-chat.png")


@needs_chromium
def test_escape_stops_an_answer(chat: Page, channel: ScriptedChannel) -> None:
    page, num_facts = chat, chat.value("document.querySelectorAll('.assistant .facts').length")
    page.click("#prompt")
    page.type("Another one")
    page.press("Enter")
    assert channel.arrived.acquire(timeout=30)
    name = list(channel.submitted)[-1]
    channel.emit_tokens(name, [50, 60])
    page.wait_for("document.querySelector('.assistant:last-child .body').textContent")
    page.press("Escape")
    page.wait_for(f"document.querySelectorAll('.assistant .facts').length == {num_facts + 1}")
    assert channel.arrived.acquire(timeout=30) and channel.aborted[-1].request_id == name


@needs_chromium
def test_keyboard_and_screen_reader(chat: Page) -> None:
    """Every control can be reached with Tab and has a name."""
    page = chat
    page.value("document.activeElement.blur()")
    seen = []
    for _ in range(20):
        page.press("Tab")
        seen.append(page.value("document.activeElement.id || document.activeElement.innerText"))
    wanted = {"API", "Metrics", "key", "theme", "log", "prompt", "send"}
    if page.value("document.querySelectorAll('.message').length"):  # it clears them
        wanted.add("clear")
    assert wanted <= set(seen), seen
    tree = page.accessible()
    roles = {role for role, _ in tree}
    assert {"banner", "navigation", "main", "complementary", "log", "meter", "status"} <= roles
    named = ("button", "link", "textbox", "combobox", "meter", "slider", "main", "complementary", "log")
    assert not [role for role, name in tree if role in named and not name]


@needs_chromium
def test_dark_and_narrow(chat: Page) -> None:
    page = chat

    def background() -> str:
        return str(page.value("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.show_as(scheme="dark", width=1280, height=800)
    dark = background()
    assert dark != light
    page.screenshot(SCREENSHOTS / "dark-chat.png")
    page.click("#theme")  # light, whatever the system prefers
    assert background() == light
    page.value("localStorage.clear()")
    page.show_as(scheme="light", width=390, height=800)
    assert page.value("document.documentElement.scrollWidth") <= 390
    assert not page.value("document.querySelector('#engine').offsetHeight")
    page.screenshot(SCREENSHOTS / "narrow.png")
    page.click("#show-engine")
    assert page.value("document.querySelector('#engine').offsetHeight")
    page.screenshot(SCREENSHOTS / "narrow-engine.png")


@needs_chromium
def test_reference(page: Page, server: TestServer) -> None:
    page.show_as(scheme="light", width=1280, height=800)
    page.open(f"{server.url}/docs")
    page.wait_for("document.querySelectorAll('.method').length > 12")
    page.click(".reference summary")
    page.wait_for("document.querySelector('.reference table').offsetHeight")
    assert "max_tokens" in page.text(".reference table")
    page.screenshot(SCREENSHOTS / "reference.png")
    assert not page.problems
    assert all(url.startswith(server.url) for url in page.urls)

"""The chat page in a headless Chromium, against a live server with a small model that never ends by itself."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation_cases import STORY, TEMPLATE
from page_driver import By, Keys, Page, open_browser
from serve_cases import Server, serving

from weft.nn import build
from weft.spec import model_spec
from weft.tokenizer.train import train_tokenizer
from weft.weights.save import save_model

CONTEXT = 3000
HOSTILE = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) <script>alert(1)</script> **bold <b>x</b>** `a<b>` http://a.example/<i>"


def make_model(folder: Path) -> Path:
    """Random weights, and a head that will not have the end token: how long an answer is, the tests say."""
    tokenizer = train_tokenizer("bpe", [STORY], 300)
    tokenizer.settings = replace(tokenizer.settings, chat_templates={"default": TEMPLATE})
    layer = {"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 64}}
    sizes = {"vocab": tokenizer.vocab_size, "dim": 32, "context": CONTEXT, "init_std": 0.3, "tie_embeddings": False, "head_bias": True}
    model = build(model_spec({**sizes, "norm": {"type": "rms"}, "layers": [layer]}), seed=5)
    with torch.no_grad():
        model.head.bias[list(tokenizer.eos_ids)] = -1e4
    return save_model(model, folder, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator:
    opened = open_browser(downloads)
    yield opened
    opened.quit()


@pytest.fixture
def page(browser, server: Server) -> Iterator[Page]:
    page = Page(browser, server.url)
    yield page
    assert page.console() == []


def test_send_and_stream(page: Page) -> None:
    assert page.get(".greeting").is_displayed()
    page.set(max_completion_tokens=400)
    page.send("the quick")
    first = page.until(lambda: len(page.messages) == 2 and page.messages[1][1])
    assert page.answering
    assert page.get("#prompt").get_attribute("value") == ""
    whole = page.answer(2)
    assert len(whole) > len(first), "the text grew while it was written"
    assert page.messages[0] == ("user", "the quick")
    assert re.search(
        r"^400 tokens · [\d.]+ tokens/s · first token after [\d.]+ s · cut at the token limit$", page.text(".assistant .stats")
    )
    assert page.text("#title") == page.text("#history .open") == "the quick"
    assert "The model answered" in page.text("#status")
    assert not page.get(".greeting").is_displayed()


def test_shift_enter_is_a_line_and_empty_text_is_not_sent(page: Page) -> None:
    prompt = page.get("#prompt")
    prompt.send_keys(Keys.ENTER)
    assert page.messages == []
    prompt.send_keys("one")
    page.chord(Keys.SHIFT, Keys.ENTER)
    page.press("two")
    assert prompt.get_attribute("value") == "one\ntwo"
    page.set(max_completion_tokens=3)
    prompt.send_keys(Keys.ENTER)
    page.answer(2)
    assert page.requests()[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop(by: str, page: Page, server: Server) -> None:
    page.send("the lazy dog")
    page.until(lambda: len(page.messages) == 2 and len(page.messages[1][1]) > 20)
    if by == "key":
        page.press(Keys.ESCAPE)
    else:
        page.get("#stop").click()
    kept = page.answer(2)
    assert page.text(".assistant .stats").endswith("stopped")
    assert page.chats[0]["messages"][1]["content"], "what was there is kept"
    page.set(max_completion_tokens=4)
    page.ask("and on")
    assert page.messages[1][1] == kept
    assert page.requests()[-1]["messages"][1] == {"role": "assistant", "content": page.chats[0]["messages"][1]["content"]}


def test_edit_and_retry(page: Page) -> None:
    page.set(temperature=0, max_completion_tokens=6)
    first = page.ask("the quick brown fox")
    page.ask("jumps over")
    page.requests()
    page.act(0, "edit")
    page.focused.send_keys(" 7")
    page.press(Keys.ENTER)
    edited = page.answer(2)
    assert page.messages[0][1] == "the quick brown fox 7"
    assert edited != first
    assert page.requests()[0]["messages"] == [{"role": "user", "content": "the quick brown fox 7"}]
    assert page.get("#toast").text.startswith("2 later messages went with it.")
    page.get("#toast-action").click()
    assert page.messages[:2] == [("user", "the quick brown fox"), ("assistant", first)]
    assert len(page.messages) == 4

    page.act(1, "retry")
    assert page.answer(2) == first, "greedy: the same again, in the old one's place"
    page.act(1, "edit")
    page.focused.send_keys("!")
    page.press(Keys.ENTER)
    assert page.messages[1][1].endswith("!")
    page.ask("on")
    assert page.requests()[-1]["messages"][1]["content"].endswith("!")
    page.act(2, "retry")
    page.answer(4)


def test_settings_are_sent(page: Page) -> None:
    page.set(max_completion_tokens=5)
    page.ask("plain")
    plain = page.requests()[0]
    assert set(plain) == {"model", "messages", "max_completion_tokens", "stream", "stream_options"}, "what is not set is not sent"
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_completion_tokens": 5, "seed": 11}
    page.set(system="Be brief.", probabilities=True, **sampling)
    page.ask("again")
    sent = page.requests()[0]
    assert sampling.items() <= sent.items()
    assert sent["model"] == plain["model"] == page.get("#model").get_attribute("value")
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["logprobs"], sent["top_logprobs"], sent["stream"]) == (True, 5, True)
    page.reload()
    assert page.get("[name=top_k]").get_attribute("value") == "40"
    page.set(temperature="9")
    page.send("refused")
    assert page.get("#toast").text.startswith("Temperature: ")
    assert page.get("#prompt").get_attribute("value") == "refused"
    assert page.requests() == []
    page.script("document.getElementById('reset-sampling').click()")
    assert page.get("[name=temperature]").get_attribute("value") == ""


def test_token_probabilities(page: Page) -> None:
    page.set(probabilities=True, temperature=0.8, seed=3, max_completion_tokens=30)
    page.ask("the quick")
    kept = page.chats[0]["messages"][1]
    tokens = page.all(".token")
    assert len(tokens) == len(kept["tokens"]) == 30
    assert "".join(token[0] for token in kept["tokens"]).strip() == kept["content"].strip()
    doubts = [float(page.script("return arguments[0].style.getPropertyValue('--doubt')", token)) for token in tokens]
    colours = {page.script("return getComputedStyle(arguments[0]).backgroundColor", token) for token in tokens}
    assert min(doubts) < max(doubts)
    assert len(colours) > 5
    page.point(tokens[2])
    tip = page.get("#tip")
    assert tip.is_displayed()
    rows = page.all("#tip .row")
    shares = [float(row.text.split()[-1].strip("<%")) for row in rows]
    assert len(rows) in (5, 6)
    assert shares[:5] == sorted(shares[:5], reverse=True)
    assert len(page.all("#tip .chosen")) == 1
    page.point(page.get("#title"))
    assert not tip.is_displayed()
    page.script("arguments[0].focus()", tokens[0])
    page.press(Keys.ARROW_RIGHT)
    assert page.focused == tokens[1]
    assert tip.is_displayed()
    page.press(Keys.END)
    assert page.focused == tokens[-1]
    assert len(page.all(".token[tabindex='0']")) == 1, "one stop for the tab key, however many tokens"
    page.set(probabilities=False)
    assert page.all(".token") == []


def test_history_lasts(page: Page, downloads: Path, tmp_path: Path) -> None:
    page.set(max_completion_tokens=4, probabilities=True)
    page.ask("first words")
    page.chord(Keys.CONTROL, "k")
    assert page.messages == []
    page.ask("second words")
    said = page.messages
    page.reload()
    assert page.messages == said, "the same conversation is open again"
    assert [entry.text for entry in page.all("#history .open")] == ["second words", "first words"]

    page.all("#history .open")[1].click()
    assert page.messages[0][1] == "first words"
    page.script("document.querySelectorAll('[data-action=rename]')[1].click()")
    page.focused.send_keys(Keys.CONTROL, "a")
    page.press("Renamed", Keys.ENTER)
    page.reload()
    assert page.text("#title") == "Renamed"

    page.script("document.querySelectorAll('[data-action=delete]')[1].click()")
    assert [chat["title"] for chat in page.chats] == ["second words"]
    page.get("#toast-action").click()
    assert len(page.chats) == 2
    kept = sorted(page.chats, key=lambda chat: chat["id"])
    page.get("#export").click()
    file = page.until(lambda: next(downloads.glob("*.json"), None))
    assert sorted(json.loads(file.read_text())["chats"], key=lambda chat: chat["id"]) == kept
    page.script("localStorage.clear()")
    page.reload()
    assert page.chats == []
    page.get("#import-file").send_keys(str(file))
    page.until(lambda: page.get("#toast").text == "Imported 2 conversations.")
    assert sorted(page.chats, key=lambda chat: chat["id"]) == kept
    (tmp_path / "bad.json").write_text('{"chats": [{"messages": [{"role": "user", "content": 3}]}]}')
    page.get("#import-file").send_keys(str(tmp_path / "bad.json"))
    page.until(lambda: page.get("#toast").text.startswith("None of the conversations"))
    assert len(page.chats) == 2


def luminance(colour: str) -> float:
    """Relative luminance of a computed colour (WCAG 2)."""
    channels = [float(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark(page: Page) -> None:
    def colours() -> tuple[str, str, str]:
        style = "return ['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
        paper, ink = page.script(style)
        return paper, ink, page.script("return getComputedStyle(document.querySelector('#title')).color")

    for scheme in ("light", "dark"):
        page.emulate(scheme)
        paper, ink, soft = colours()
        assert (luminance(paper) > 0.8) == (scheme == "light")
        assert (luminance(paper) < 0.05) == (scheme == "dark")
        assert contrast(paper, ink) > 7
        assert contrast(paper, soft) > 4.5
    page.get("#theme").click()
    assert page.get("#theme").get_attribute("aria-label") == "Theme: Light"
    assert luminance(colours()[0]) > 0.8, "the switch is stronger than the system"
    page.reload()
    assert luminance(colours()[0]) > 0.8
    page.get("#theme").click()
    page.emulate("light")
    assert luminance(colours()[0]) < 0.05


def test_a_phone_of_360_pixels(page: Page) -> None:
    def fits() -> bool:
        return page.script("return document.documentElement.scrollWidth <= 360 && document.getElementById('log').scrollWidth <= 360")

    page.size(360, 720, touch=True)
    page.reload()
    assert fits()
    page.get("#open-settings").click()
    page.get("[name=max_completion_tokens]").send_keys("40")
    assert fits()
    page.get("#close-settings").click()
    page.ask("a" * 200 + " word" * 30)
    assert fits()
    code = "import('./markdown.js').then(({render}) => {document.querySelector('.assistant .body').replaceChildren(render(arguments[0]))})"
    page.script(f"return {code}", "```\n" + "x = 1; " * 60 + "\n```\n\n" + "https://a.example/" + "b" * 90)
    assert page.all("pre")
    assert fits()
    page.get("#open-side").click()
    page.until(lambda: page.get("#new-chat").is_displayed())
    assert fits()
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.get("#new-chat").is_displayed())
    sizes = [page.get(selector).size for selector in ("#open-side", "#open-settings", "#send")]
    assert all(min(size["width"], size["height"]) >= 35 for size in sizes)


def test_keyboard_only(page: Page) -> None:
    page.script("document.body.tabIndex = -1; document.body.focus()")  # where one is who came from the address bar
    page.press(Keys.TAB)
    assert page.focused.text == "Skip to the message box"
    page.press(Keys.ENTER)
    page.press("the quick")
    assert page.get("#prompt").get_attribute("value") == "the quick"
    for _ in range(12):
        page.chord(Keys.SHIFT, Keys.TAB)
        if page.focused.get_attribute("id") == "open-settings":
            break
    outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus can be seen"
    page.press(Keys.ENTER)
    assert page.focused.get_attribute("name") == "system"
    for _ in range(5):
        page.press(Keys.TAB)
    assert page.focused.get_attribute("name") == "max_completion_tokens"
    page.press("6")
    page.press(Keys.ESCAPE)
    assert page.focused.get_attribute("id") == "prompt"
    page.press(Keys.ENTER)
    page.answer(2)
    page.press(Keys.ARROW_UP)
    assert page.focused.tag_name == "textarea"
    page.press(" brown", Keys.ESCAPE)
    assert page.messages[0][1] == "the quick"
    page.press(Keys.ARROW_UP)
    page.press(" fox", Keys.ENTER)
    page.answer(2)
    assert page.messages[0][1] == "the quick fox"
    assert page.focused.get_attribute("id") == "prompt"
    page.chord(Keys.CONTROL, "k")
    assert page.messages == []
    assert page.focused.get_attribute("id") == "prompt"


def test_an_error_is_one_sentence(page: Page) -> None:
    page.set(max_completion_tokens=4)
    page.script("document.getElementById('prompt').value = 'word '.repeat(3000)")
    page.get("#prompt").send_keys(Keys.ENTER)
    alert = page.until(lambda: next(iter(page.all("[role=alert]")), None))
    assert re.search(r"[A-Z].*\d+ tokens.*\b3000\b.*\.$", alert.find_element(By.TAG_NAME, "p").text)
    assert [who for who, _ in page.messages] == ["user"]
    assert all("400" in line for line in page.console()), "the browser's own note of the status, and nothing else"
    page.act(0, "edit")
    page.focused.send_keys(Keys.CONTROL, "a")
    page.press("short", Keys.ENTER)
    page.answer(2)
    assert page.all("[role=alert]") == []


def test_a_key_and_a_server_that_leaves(browser, folder: Path) -> None:
    with serving(folder, "--dtype", "float32", "--api-key", "sesame") as server:
        page = Page(browser, server.url)
        assert "key" in page.get("[role=alert] p").text.lower()
        assert page.focused.get_attribute("name") == "key"
        page.press("sesame")
        page.until(lambda: page.get("#model").is_enabled())
        assert page.all("[role=alert]") == []
        page.press(Keys.ESCAPE)
        page.set(max_completion_tokens=4)
        page.ask("the quick")
        assert "sesame" not in page.script("return JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie")
    page.console()
    page.send("anyone there?")
    page.until(lambda: page.all("[role=alert]"))
    assert page.get("[role=alert] p").text == "The server cannot be reached; check that it is still running, then retry."


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b** *c* `d`", "<p>a <strong>b</strong> <em>c</em> <code>d</code></p>"),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# T\n- a\n  - b\n- c", "<h3>T</h3><ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. x\n4. y\n\n\n5. z", '<ol start="3"><li>x</li><li>y</li><li>z</li></ol>'),
        ("~~~py\n**a**\n", '<figure class="code"><figcaption><span>py</span><button type="button" data-action="copy-code">Copy</button>'),
        ("> q\n\n---", "<blockquote><p>q</p></blockquote><hr>"),
        ("**open", "<p>**open</p>"),
    ],
)
def test_markdown(text: str, html: str, page: Page) -> None:
    code = """return import('./markdown.js').then(({render}) => {
        const made = document.createElement('div');
        made.append(render(arguments[0]));
        return made.innerHTML;
    })"""
    assert page.script(code, text).startswith(html)


def test_markdown_is_never_markup(page: Page) -> None:
    code = """return import('./markdown.js').then(({render}) => {
        document.getElementById('messages').append(render(arguments[0]));
        const names = [...document.querySelectorAll('#messages *')].map((node) => node.tagName.toLowerCase());
        return [names, document.getElementById('messages').textContent, [...document.querySelectorAll('#messages a')].map((a) => a.href)];
    })"""
    names, text, links = page.script(code, HOSTILE + "\n```html\n<script>alert(1)</script>\n```")
    assert not {"img", "script", "b", "i"} & set(names)
    assert "<img src=x onerror=alert(1)>" in text
    assert links == ["http://a.example/"]


def test_nothing_comes_from_elsewhere_or_runs_inline(page: Page) -> None:
    page.set(max_completion_tokens=3)
    page.ask("the quick")
    loaded = page.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((page.url, "data:")) for name in loaded)
    page.script("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.head.append(s)")
    assert page.script("return window.ran ?? null") is None, "control: the policy is in force"
    assert any("Content Security Policy" in line for line in page.console())

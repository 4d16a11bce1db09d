"""The page at /, in Chromium, against a running server: what a reader sees and what the page asks the server for."""

import json
import math
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from serve_help import TEMPLATE, running_server, write_folder

import bardling
from bardling.config.recipes import config_from_dict
from bardling.serve.app import page as page_and_policy

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "The king and "
WRITE, COMPARE, LOSS = (f"#{area} textarea" for area in ("write-area", "compare-prompt", "loss-area"))
STEPS = range(1, 9)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DARK = {"color_scheme": "dark"}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with a chat template. Random bytes make many characters of several tokens, and many that are incomplete."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", template=TEMPLATE)


@pytest.fixture(scope="module")
def site(corpus, folder, tmp_path_factory):
    """A server with a run of eight checkpoints, whose tokens are characters, and a chat model."""
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 96},
        "data": {"source": str(corpus), "tokenizer": "char"},
        "optim": {"lr": 0.02},
        "train": {"steps": len(STEPS), "batch_size": 2},
        "eval": {"every": 1, "windows": 2},
        "sample": {"every": 0},
        "checkpoint": {"every": 1, "keep_last": len(STEPS)},
    }
    path = tmp_path_factory.mktemp("runs") / "first"
    bardling.train(config_from_dict(bardling.RunConfig, values, "test"), path, quiet=True)
    with running_server(path, folder) as served:
        yield served


@pytest.fixture
def open_page(site, browser):
    """`open_page(url, **options)`: the page in a browser without history. No script error may occur on it."""
    contexts, errors = [], []

    def log(message):
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            errors.append(message.text)

    def open_url(url=site.url, **options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(20_000)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", log)
        page.goto(url)
        ready(page)
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(open_page):
    return open_page()


def ready(page):
    page.wait_for_selector("main[aria-busy=false]")


def go(page, area, text=None, keys="Control+Enter"):
    """Start what the view does, and wait for its end."""
    if text is not None:
        page.fill(area, text)
    page.press(area, keys)
    ready(page)


def sent(page, path="/v1/completions") -> list[dict]:
    """Bodies of the requests to a path, from now on."""
    bodies: list[dict] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if urlsplit(request.url).path == path else None)
    return bodies


def answer(site, body: dict, path="/v1/completions") -> dict:
    """The only choice of the answer to a request of the page, asked for again without a stream."""
    return site.post(path, **{**body, "stream": False})["choices"][0]


def events(*values) -> str:
    return "".join(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n" for value in values)


def show_alternatives(page, area, number):
    """Point at a token and wait for its alternatives."""
    box = page.locator(f"#{area} .t").nth(number).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#pop:not([hidden])")


def test_the_file_is_self_contained_and_inserts_no_markup():
    text, policy = page_and_policy()
    assert len(re.findall("<script", text)) == len(re.findall("<style", text)) == 1
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.findall(r"<[^>]*\s(?:style|on\w+)=", text)
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}


def test_generates_in_place_and_undoes(page, site):
    requests = sent(page)
    lengths = page.evaluate_handle(
        """() => {
            const [lengths, spans] = [new Set(), document.querySelector("#write-area .stack > div")];
            new MutationObserver(() => lengths.add(spans.textContent.length)).observe(spans, { childList: true });
            return lengths;
        }"""
    )
    go(page, WRITE, PROMPT)
    choice = answer(site, requests[0])
    text = page.input_value(WRITE)
    assert text == PROMPT + choice["text"]
    assert requests[0]["stream"] is True
    assert lengths.evaluate("(lengths) => lengths.size") > 30, "it grew token by token"
    classes = page.locator("#write-area .t").evaluate_all("(all) => all.map((one) => one.className)")
    edges = (0.9, 0.5, 0.2, 0.05, 0.01)
    scores = choice["logprobs"]["token_logprobs"]
    assert classes == [f"t p{sum(math.exp(score) < edge for edge in edges)}" for score in scores]
    assert page.inner_text("#status").startswith("64 tokens, ")

    page.press(WRITE, "Control+z")
    assert page.input_value(WRITE) == PROMPT
    page.press(WRITE, "Control+Shift+z")
    assert page.input_value(WRITE) == text
    go(page, WRITE)  # continues with the very tokens; of these, as many as the context has room for
    asked = requests[1]["prompt"]
    assert asked == [*requests[0]["prompt"], *choice["logprobs"]["bardling"]["ids"]][-len(asked) :]
    assert len(asked) + requests[1]["max_tokens"] == 96
    assert "no longer fit in the context" in page.inner_text("#status")


def test_an_alternative_replaces_its_token_and_is_continued(page, site):
    requests = sent(page)
    go(page, WRITE, PROMPT)
    scores = answer(site, requests[0])["logprobs"]["bardling"]
    text = page.input_value(WRITE)
    show_alternatives(page, "write-area", 5)
    rows = page.locator("#pop .choice")
    assert rows.count() in (10, 11)
    chosen = next(place for place, token in enumerate(scores["top"][5]) if token["id"] != scores["ids"][5])
    rows.nth(chosen).click()
    ready(page)
    token = scores["top"][5][chosen]
    assert requests[1]["prompt"] == [*requests[0]["prompt"], *scores["ids"][:5], token["id"]]
    assert page.input_value(WRITE).startswith(text[: len(PROMPT) + 5] + token["text"])
    assert page.input_value(WRITE).endswith(answer(site, requests[1])["text"])
    page.press(WRITE, "Control+z")
    assert page.input_value(WRITE) == text[: len(PROMPT) + 5] + token["text"]
    page.press(WRITE, "Control+z")
    assert page.input_value(WRITE) == text


@pytest.mark.slow
def test_shades_lie_under_their_characters(open_page):
    """Text field and spans break lines alike: their contents have the same height at every width."""
    text = "a\tb  c\n\n    wide 漢字 e\u0301 😀 fi ffl\n" + "long" * 60 + " end \n" + "x " * 150 + "\n"
    for width in (390, 777, 1440):
        page = open_page(viewport={"width": width, "height": 800})
        page.fill(WRITE, text)
        heights = page.locator(WRITE).evaluate(
            """(box) => {
                const spans = box.previousElementSibling;
                spans.style.alignSelf = "start";
                Object.assign(box.style, { alignSelf: "start", height: "0" });
                return [spans.offsetHeight, box.scrollHeight];
            }"""
        )
        assert heights[0] == pytest.approx(heights[1], abs=2)


def test_alternatives_from_the_keyboard(page, site):
    requests = sent(page)
    go(page, WRITE, PROMPT)
    text, scores = page.input_value(WRITE), answer(site, requests[0])["logprobs"]["bardling"]
    page.press(WRITE, "Alt+ArrowDown")
    assert page.locator("#pop").get_attribute("role") == "dialog"
    page.keyboard.press("Escape")
    assert page.locator("#pop").is_hidden()
    assert page.evaluate("document.activeElement.ariaLabel") == "Text to continue"
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("ArrowLeft")
    top, token = scores["top"][-2], scores["ids"][-2]
    shown = [*top, *([] if token in [each["id"] for each in top] else [{"id": token}])]
    rank = [each["id"] for each in shown].index(token)
    focused = page.evaluate("[...document.querySelectorAll('#pop .choice')].indexOf(document.activeElement)")
    assert focused == rank, "the token itself"
    page.keyboard.press("ArrowUp" if rank else "ArrowDown")
    page.keyboard.press("Enter")
    ready(page)
    chosen = shown[rank - 1 if rank else 1]
    assert requests[1]["prompt"][-1] == chosen["id"]
    assert page.input_value(WRITE).startswith(text[:-2] + chosen["text"])


def test_tokens_behind_an_edit_lose_their_probabilities(page, site):
    requests = sent(page)
    go(page, WRITE, PROMPT)
    place = len(PROMPT) + 10
    page.locator(WRITE).evaluate("(box, place) => box.setSelectionRange(place, place)", place)
    page.keyboard.type("sea")
    assert page.locator("#write-area .t").count() == 10
    text = page.input_value(WRITE)
    assert text[place : place + 3] == "sea"
    go(page, WRITE)
    ids = site.post("/tokenize", model="first", prompt=text)["tokens"]
    assert requests[1]["prompt"] == ids[-len(requests[1]["prompt"]) :]
    for _ in range(2):
        page.press(WRITE, "Control+z")
    assert page.locator("#write-area .t").count() == 64, "undone: the probabilities hold again"


def test_retry_repeats_with_the_next_seed(page):
    requests = sent(page)
    go(page, WRITE, PROMPT)
    first = page.input_value(WRITE)
    go(page, WRITE, keys="Control+Shift+Enter")
    assert [request["seed"] for request in requests] == [1, 2]
    assert requests[0]["prompt"] == requests[1]["prompt"]
    assert page.input_value(WRITE).startswith(PROMPT)
    assert page.input_value(WRITE) != first


def test_sampling_settings_reach_the_server_and_survive_a_reload(page, site):
    requests = sent(page)
    values = {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "max_tokens": 9, "seed": 5}
    for name, value in values.items():
        page.fill(f"#setting-{name}", str(value))
    page.fill("#stop", r"\n")
    go(page, WRITE, PROMPT)
    asked = {name: value for name, value in requests[0].items() if name != "prompt"}
    assert asked == {**values, "model": "first", "stream": True, "logprobs": 10, "stop": ["\n"]}
    text, tokens = page.input_value(WRITE), page.locator("#write-area .t").count()
    page.reload()
    ready(page)
    assert (page.input_value(WRITE), page.locator("#write-area .t").count()) == (text, tokens)
    assert page.input_value("#setting-top_k") == "7"
    go(page, WRITE)
    assert requests[1]["prompt"] == site.post("/tokenize", model="first", prompt=text)["tokens"]


def test_escape_stops(page):
    page.route("**/v1/completions", lambda route: None)  # never answered
    page.fill(WRITE, PROMPT)
    page.press(WRITE, "Control+Enter")
    page.wait_for_selector("#go.stop")
    page.keyboard.press("Escape")
    ready(page)
    assert page.inner_text("#status") == "Stopped."
    assert page.input_value(WRITE) == PROMPT
    assert page.is_hidden("#error")


def test_eight_checkpoints_continue_one_prompt(page, site):
    requests = sent(page)
    page.fill("#setting-max_tokens", "24")
    page.click("#tab-compare")
    go(page, COMPARE, PROMPT)
    assert page.locator(".column h2").all_inner_texts() == [f"Step {step}" for step in STEPS]
    by_model = {request["model"]: request for request in requests}
    assert sorted(by_model) == [f"first@step-{step:06}" for step in STEPS]
    assert len({(tuple(request["prompt"]), request["seed"]) for request in requests}) == 1
    expected = [answer(site, by_model[f"first@step-{step:06}"])["text"] for step in STEPS]
    texts = [box.input_value() for box in page.locator(".column textarea").all()]
    assert texts == expected
    for before, text, column in zip(texts, texts[1:], page.locator(".column").all()[1:], strict=False):
        places = [place for place, (one, other) in enumerate(zip(before, text, strict=False)) if one != other]
        classes = column.locator(".t").evaluate_all("(all) => all.map((one) => one.className)")
        assert [place for place, name in enumerate(classes) if "departs" in name] == places[:1]

    box = page.locator(".column .area").nth(3).locator(".t").nth(4).bounding_box()  # an alternative in one column
    page.mouse.move(box["x"] + 3, box["y"] + 5)
    page.wait_for_selector("#pop:not([hidden])")
    page.locator("#pop .choice:not([aria-current])").first.click()
    ready(page)
    changed = [box.input_value() for box in page.locator(".column textarea").all()]
    assert [place for place in range(8) if changed[place] != texts[place]] == [3]
    assert changed[3][:4] == texts[3][:4]


def test_the_loss_of_a_text_under_several_checkpoints(page, site):
    page.click("#tab-compare")
    page.click("#compare-none")
    for step in (1, 8):
        page.check(f'#chips input[value="first@step-{step:06}"]')
    text = "The rose and the night met 3 times."
    page.fill(COMPARE, text)
    page.click("#second")
    ready(page)
    start = site.http.get("/v1/models/first").json()["bardling"]["document_start"]
    ids = site.post("/tokenize", model="first", prompt=text, add_special_tokens=False)["tokens"]
    for step, shown in zip((1, 8), page.locator(".column header strong").all_inner_texts(), strict=True):
        body = {"model": f"first@step-{step:06}", "prompt": [*start, *ids], "echo": True, "max_tokens": 0, "logprobs": 0}
        scores = [score for score in answer(site, body)["logprobs"]["token_logprobs"] if score is not None]
        assert shown == f"{-sum(scores) / len(scores):.2f}"
    page.check("#compare-change")
    page.locator(".column").nth(1).locator(".better1, .better2, .worse1, .worse2").first.wait_for()


def test_loss_per_token_of_a_text_longer_than_the_context(page, site):
    page.click("#tab-loss")
    text = "The king and the queen met 3 times.\nThe storm and the rose met 5 times.\n" * 3
    go(page, LOSS, text)
    start = site.http.get("/v1/models/first").json()["bardling"]["document_start"]
    ids = [*start, *site.post("/tokenize", model="first", prompt=text, add_special_tokens=False)["tokens"]]
    scores: list[float] = []
    while len(scores) < len(ids):  # windows of 96 tokens, of which the first 48 are context, except in the first one
        begin = max(0, len(scores) - 48)
        body = {"model": "first", "prompt": ids[begin : begin + 96], "echo": True, "max_tokens": 0, "logprobs": 0}
        scores += answer(site, body)["logprobs"]["token_logprobs"][len(scores) - begin :]
    scores = [score for score in scores[len(start) :] if score is not None]
    nats, size = -sum(scores), len(text.encode()) - (0 if start else 1)
    names, values = (page.locator(f"#loss-tiles {tag}").all_inner_texts() for tag in ("dt", "dd"))
    tiles = dict(zip(names, values, strict=True))
    assert tiles["Tokens"] == str(len(scores))
    assert tiles["Bytes"] == str(size)
    assert float(tiles["Nats per token"]) == pytest.approx(nats / len(scores), abs=6e-4)
    assert float(tiles["Bits per byte"]) == pytest.approx(nats / math.log(2) / size, abs=6e-4)
    assert float(tiles["Perplexity"].replace(",", "")) == pytest.approx(math.exp(nats / len(scores)), rel=1e-3)
    assert page.input_value(LOSS) == text
    assert page.locator("#loss-worst button").count() == 8
    page.locator("#loss-worst button").first.click()
    assert f"loss {-min(scores):.2f} nats" in page.inner_text("#pop")
    page.press(LOSS, "End")
    page.keyboard.type("!")
    assert page.is_hidden("#loss-tiles"), "the totals were those of another text"


def test_chat(page, site):
    assert page.is_hidden("#tab-chat"), "the run has no template"
    page.select_option("#model", "tiny")
    page.click("#tab-chat")
    requests = sent(page, "/v1/chat/completions")
    page.fill("#chat-system", "Be brief.")
    page.fill("#setting-max_tokens", "12")
    go(page, "#chat-input", "hello")
    assert requests[0]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    content = answer(site, requests[0], "/v1/chat/completions")["message"]["content"]
    shown = page.locator("#messages textarea")
    assert shown.input_value() == content.replace("\r", "")
    assert page.locator("#messages .t").count() > 2, "its tokens are shaded"
    go(page, "#chat-input", "more")
    assert [message["role"] for message in requests[1]["messages"]] == ["system", "user", "assistant", "user"]
    page.click("#undo")
    assert page.input_value("#chat-input") == "more"
    assert page.locator("#messages li").count() == 2
    go(page, "#chat-input", keys="Control+Shift+Enter")
    assert requests[2] == {**requests[0], "seed": requests[1]["seed"] + 1}


def test_characters_of_several_tokens(page, site):
    page.select_option("#model", "tiny")
    requests = sent(page)
    go(page, WRITE, "é😀")
    choice = answer(site, requests[0])
    assert page.input_value(WRITE) == "é😀" + choice["text"].replace("\r", "")
    go(page, WRITE)
    asked = requests[1]["prompt"]
    assert asked == [*requests[0]["prompt"], *choice["logprobs"]["bardling"]["ids"]][-len(asked) :]
    page.click("#tab-loss")
    go(page, LOSS, "naïve 😀 text")
    assert page.input_value(LOSS) == "naïve 😀 text"
    assert page.locator("#loss-area .t").all_inner_texts()[-6:] == ["😀", " ", "t", "e", "x", "t"]


def test_an_api_key_is_asked_for_and_not_stored(open_page, folder):
    with running_server(folder, key="correct-key") as served:
        page = open_page(served.url)
        assert page.is_visible("#key")
        assert page.inner_text("#error p") == "This server needs an API key."
        page.fill("#key-value", "another-key")
        page.press("#key-value", "Enter")
        ready(page)
        assert page.inner_text("#error p") == "The server does not accept this API key."
        page.fill("#key-value", "correct-key")
        page.click("#key button")
        ready(page)
        assert page.is_hidden("#key")
        assert page.is_hidden("#error")
        go(page, WRITE, PROMPT)
        assert len(page.input_value(WRITE)) > len(PROMPT)
        page.reload()
        ready(page)
        assert page.is_hidden("#error")
        assert "correct-key" not in page.evaluate("JSON.stringify(localStorage)")


def test_errors_are_told_in_plain_words(page):
    def refusal(message):
        return {"json": {"error": {"message": message}}}

    answers = [
        ({"status": 429, "headers": {"Retry-After": "3"}, **refusal("")}, "The server is busy. Try again in 3 seconds."),
        ({"status": 400, **refusal("top_k: too large")}, "The server refused this: top_k: too large"),
        ({"status": 503, **refusal("no memory")}, "The server cannot do this now: no memory"),
        ({"status": 500, "body": "<b>oops</b>"}, "The server failed: status 500"),
        ({"body": events({"error": {"message": "out of memory"}})}, "The server stopped: out of memory"),
        ({"body": ""}, "The server ended the text early."),
    ]
    page.fill(WRITE, PROMPT)
    for response, message in answers:
        page.route("**/v1/completions", lambda route, _, response=response: route.fulfill(**response), times=1)
        go(page, WRITE)
        assert page.inner_text("#error p") == message
        assert page.input_value(WRITE) == PROMPT
    page.route("**/v1/completions", lambda route: route.abort())
    go(page, WRITE)
    assert page.inner_text("#error p").startswith("The server does not answer.")
    page.click("#error-close")
    assert page.is_hidden("#error")


def test_what_a_model_writes_is_never_markup(page):
    text = "<img src=x onerror=alert(1)></textarea><script>alert(2)</script>"
    token = {"id": 1, "text": text, "logprob": -0.5}
    scores = {"tokens": [text], "token_logprobs": [-0.5], "text_offset": [0], "bardling": {"ids": [1], "top": [[token]]}}
    choice = {"index": 0, "text": text, "logprobs": scores, "finish_reason": "length"}
    page.route("**/v1/completions", lambda route: route.fulfill(body=events({"choices": [choice]}, "[DONE]")))
    go(page, WRITE, PROMPT)
    assert page.input_value(WRITE) == PROMPT + text
    show_alternatives(page, "write-area", 0)
    assert text.replace(" ", "␣") in page.inner_text("#pop")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


ALL_VIEWS = ("write", "alternatives", "compare", "changes", "loss", "error", "help", "panel", "chat")


def fill_views(page):
    """Bring every view into use, and yield its name."""
    page.evaluate("changeSetting('max_tokens', 12)")
    go(page, WRITE, PROMPT)
    page.press(WRITE, "Alt+ArrowDown")
    yield "alternatives"
    page.keyboard.press("Escape")
    yield "write"
    page.click("#tab-compare")
    go(page, COMPARE, PROMPT)
    yield "compare"
    page.click("#second")
    ready(page)
    page.check("#compare-change")
    yield "changes"
    page.click("#tab-loss")
    go(page, LOSS, PROMPT)
    yield "loss"
    page.route("**/v1/completions", lambda route: route.abort())
    go(page, LOSS)
    yield "error"
    page.keyboard.press("Control+/")
    yield "help"
    page.keyboard.press("Escape")
    page.click("#error-close")
    is_phone = page.is_visible("#panel-open")
    if is_phone:
        page.click("#panel-open")
    yield "panel"
    page.select_option("#model", "tiny")
    if is_phone:
        page.click("#panel-close")
    page.click("#tab-chat")
    go(page, "#chat-input", "hello")
    yield "chat"


@pytest.mark.parametrize(
    ("options", "views"),
    [
        pytest.param({}, ("alternatives", "compare"), id="light, two views"),
        pytest.param({}, ALL_VIEWS, id="light", marks=pytest.mark.slow),
        pytest.param(DARK, ALL_VIEWS, id="dark", marks=pytest.mark.slow),
        pytest.param(PHONE, ALL_VIEWS, id="phone", marks=pytest.mark.slow),
    ],
)
def test_accessible_and_nothing_overflows(open_page, options, views):
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="needs axe-core-python").Axe()
    page = open_page(reduced_motion="reduce", **options)
    for view in fill_views(page):
        if view in views:
            violations = axe.run(page)["violations"]
            assert not [(view, violation["id"], [node["target"] for node in violation["nodes"]]) for violation in violations]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{view}: the page scrolls sideways"


@pytest.mark.slow
def test_dark_and_light(open_page):
    page = open_page(**DARK)

    def luminance():
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert luminance() < 150, "as the system"
    page.click("#theme")
    assert luminance() > 600
    page.reload()
    assert luminance() > 600, "the choice is remembered"


def test_on_a_phone(open_page):
    page = open_page(**PHONE)
    assert page.is_hidden("#panel")
    page.click("#panel-open")
    page.fill("#setting-max_tokens", "20")
    page.click("#panel-close")
    page.fill(WRITE, PROMPT)
    page.click("#go")
    ready(page)
    box = page.locator("#write-area .t").nth(3).bounding_box()
    page.touchscreen.tap(box["x"] + 3, box["y"] + 5)
    page.wait_for_selector("#pop:not([hidden])")
    sheet = page.locator("#pop").bounding_box()
    assert sheet["width"] > 350
    assert sheet["y"] + sheet["height"] <= 844
    page.keyboard.press("Escape")
    page.click("#tab-compare")
    page.fill(COMPARE, PROMPT)
    page.click("#go")
    ready(page)
    boxes = [column.bounding_box() for column in page.locator(".column").all()]
    assert len({box["y"] for box in boxes}) == 1, "side by side"
    assert all(300 < box["width"] < 390 for box in boxes)

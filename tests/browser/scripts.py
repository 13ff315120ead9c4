"""Use the page's scripts without Gradio and print what was seen: `scripts.py CHROMIUM FILL`.

FILL is what the page answers the button of the grid of balances with, for the tab txt2img.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
SITE = "http://klora.test/"

# The text of a grid of shares, and then of another picture in the same gallery.
GALLERY = """
<div id="txt2img_gallery"><img style="width: 400px; height: 100px" src="data:image/svg+xml,
    <svg xmlns='http://www.w3.org/2000/svg' width='400' height='100'></svg>"></div>
<div id="generation_info_txt2img"><textarea></textarea></div>
<div id="txt2img_klora_share_slider"><input type="number" value="0.5"></div>
<div id="beside">beside</div>
"""
GRID = 'dogs, Script: X/Y/Z plot, X Type: [K-LoRA] Judged share, X Values: "0.4, 0.5, 0.6, 0.7"'

# What a1111-sd-webui-tagcomplete gives to scripts of others, and how it uses what they give: it asks parsers for what
# is at the cursor, and puts the first answer of QUEUE_SANITIZE in the place of the word there.
TAGCOMPLETE = """
<textarea></textarea><ul></ul>
<script>
const PARSERS = [], QUEUE_SANITIZE = [], ResultType = { wildcardFile: 4 };
const loras = [["sub/dog.safetensors"], ["ink+.pt"]];
class BaseTagParser { constructor(condition) { this.condition = condition; } }
class AutocompleteResult { constructor(text, type) { Object.assign(this, { text, type }); } }
let tagword = "";
const starters = [];
function onUiLoaded(start) { starters.push(start); }
const area = document.querySelector("textarea"), list = document.querySelector("ul");
function take(result) {
    const text = QUEUE_SANITIZE[0](result.type, result.text), start = area.selectionStart - tagword.length;
    area.value = area.value.slice(0, start) + text + area.value.slice(area.selectionStart);
    area.setSelectionRange(start + text.length, start + text.length);
    offer();
}
function offer() {
    list.textContent = "";
    tagword = area.value.slice(0, area.selectionStart).split(" ").pop().toLowerCase();
    const { parse } = PARSERS.find((parser) => parser.condition()) || { parse: () => [] };
    for (const result of parse.call(null, area, area.value)) {
        const item = document.createElement("li");
        item.textContent = result.text;
        item.addEventListener("click", () => take(result));
        list.append(item);
    }
}
area.addEventListener("input", offer);
</script>
"""

PROMPT = """
<div id="txt2img_prompt"><textarea></textarea></div>
<div id="txt2img_klora_subject"><input value="dog"></div><div id="txt2img_klora_style"><input value="ink"></div>
"""

ROWS = """
<div id="txt2img_klora"><span>Subject</span> <span class="klora-data">Subject</span></div>
<script>window.opts = { ui_locale: "ja: Japanese" };</script>
"""


def open_page(browser: Browser, body: str, *scripts: str) -> tuple[Page, list[str]]:
    """Open a page with a body and then some of our scripts; what it throws comes into the list."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    tags = "".join(f'<script src="{SITE}javascript/{name}.js"></script>' for name in scripts)

    def answer(route: Route) -> None:
        path = ROOT / route.request.url.removeprefix(SITE)
        if route.request.url == SITE:
            route.fulfill(body=f"<!DOCTYPE html><body>{body}{tags}", content_type="text/html; charset=utf-8")
        elif path.is_file():
            route.fulfill(path=path)
        else:
            route.fulfill(status=404)

    page.route("**/*", answer)
    page.goto(SITE)
    return page, errors


def on_an_empty_page(browser: Browser) -> list[str]:
    """Load everything where nothing of the accordion is, and touch the page."""
    body = '<p>Nothing</p><div class="klora-window"></div>'
    page, errors = open_page(browser, body, *(path.stem for path in (ROOT / "javascript").iterdir()))
    page.click("p")
    for event in ("input", "change", "click", "mousemove"):
        page.evaluate(f"document.dispatchEvent(new Event('{event}'))")
    page.wait_for_timeout(500)
    return errors


def at_a_gallery(browser: Browser) -> dict[str, Any]:
    """Point at a cell of a grid and click it, and then at another picture."""
    page, errors = open_page(browser, GALLERY, "klora")
    image, found = page.locator("#txt2img_gallery img"), {}
    show = "(text) => { document.querySelector('textarea').value = JSON.stringify({ infotexts: [text] }); }"
    page.evaluate(show, GRID)
    image.hover(position={"x": 350, "y": 50})
    found["at a cell"] = image.get_attribute("title")
    image.click(position={"x": 350, "y": 50})
    found["clicked"] = page.input_value("#txt2img_klora_share_slider input")
    page.evaluate(show, "a dog")
    image.hover(position={"x": 300, "y": 50})
    found["at a picture"] = image.get_attribute("title")
    return {**found, "errors": errors}


def compare(browser: Browser, fill: str) -> dict[str, Any]:
    """Press the button of the grid of balances, where K-LoRA is enabled or not: whether it is then."""
    page, errors = open_page(browser, PROMPT, "klora")
    found: dict[str, Any] = {}
    for name, prompt in (("from the accordion", "a dog"), ("by a tag", "a dog <klora:dog:ink>")):
        page.fill("textarea", prompt)
        code = f"(enabled) => ({fill})(...Array(16).fill('before'), enabled)"
        found[name] = [page.evaluate(code, enabled)[-1] for enabled in (False, True)]
    return {**found, "errors": errors}


def complete(browser: Browser) -> dict[str, Any]:
    """Type the beginning of a tag and take what is offered, by click alone."""
    page, errors = open_page(browser, TAGCOMPLETE, "klora_completion")
    page.evaluate("starters.forEach((start) => start())")
    page.click("textarea")
    page.keyboard.type("a dog <kl")
    found = {"offered": page.locator("li").all_inner_texts()}
    for name in ("<klora:", "dog", "ink+"):
        page.locator("li", has_text=name).click()
    return {**found, "completed": page.input_value("textarea"), "errors": errors}


def translate(browser: Browser) -> dict[str, Any]:
    """Load a page in Japanese."""
    page, errors = open_page(browser, ROWS, "klora_locale")
    page.wait_for_function("() => document.querySelector('span').textContent !== 'Subject'")
    return {"texts": page.locator("span").all_inner_texts(), "errors": errors}


def main() -> None:
    """Look at everything."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=sys.argv[1], args=FLAGS)
        seen = {
            "empty": on_an_empty_page(browser),
            "gallery": at_a_gallery(browser),
            "compared": compare(browser, sys.argv[2]),
            "completion": complete(browser),
            "locale": translate(browser),
        }
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

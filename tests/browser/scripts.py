"""Use the page's scripts without Gradio, on pages of a few elements, and print what was seen: `scripts.py CHROMIUM`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
SITE = "http://klora.test/"

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


def main() -> None:
    """Look at everything."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=sys.argv[1], args=FLAGS)
        seen = {
            "completion": complete(browser),
        }
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

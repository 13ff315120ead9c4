"""Use the accordion of `serve.py` as a person does and print what was seen: `drive.py URL CHROMIUM`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

SCRIPT = Path(__file__).resolve().parents[2] / "javascript" / "klora.js"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
WAIT = 60_000


def use(page: Page) -> dict[str, Any]:
    """Walk through every control that does something."""
    seen: dict[str, Any] = {"before": echo(page), "title": title(page)}
    page.click("#txt2img_klora > .label-wrap")
    page.check("#txt2img_klora_enabled input")
    choose(page, "subject", "dog")
    choose(page, "style", "dog")
    seen["error"] = analyse(page, "there is no LoRA")
    seen["map after error"] = page.locator("#txt2img_klora_map img").count()
    choose(page, "style", "ink")
    seen["summary"] = analyse(page, "×")
    page.wait_for_selector("#txt2img_klora_map img", timeout=WAIT)
    seen["active title"] = title(page)
    page.click("#txt2img_klora_refresh_names")
    choose(page, "style", "new")
    page.click("#txt2img_klora_advanced > .label-wrap")
    page.fill("#txt2img_klora_beta textarea, #txt2img_klora_beta input", "0.6")
    page.fill("#txt2img_klora_balance input[type=number]", "-0.5")
    page.keyboard.press("Tab")
    seen["seed at first"] = page.locator("#txt2img_klora_seed").is_visible()
    choose(page, "policy", "random")
    page.wait_for_selector("#txt2img_klora_seed", state="visible", timeout=WAIT)
    page.wait_for_selector("#txt2img_klora_balance", state="hidden", timeout=WAIT)
    seen["after"] = echo(page)
    return seen


def choose(page: Page, name: str, value: str) -> None:
    """Type into a menu and take what it offers."""
    box = page.locator(f"#txt2img_klora_{name} input").first
    box.click()
    box.fill(value)
    box.press("Enter")
    page.wait_for_timeout(300)
    box.press("Escape")


def analyse(page: Page, expected: str) -> str:
    """Press the button and give what is said."""
    page.click("#txt2img_klora_analyse")
    words = "document.querySelector('#txt2img_klora_summary textarea')?.value || ''"
    page.wait_for_function(f"() => ({words}).includes({json.dumps(expected)})", timeout=WAIT)
    return str(page.input_value("#txt2img_klora_summary textarea"))


def echo(page: Page) -> Any:
    """Give what the script would get."""
    old = page.input_value("#out textarea")
    page.click("#echo")
    page.wait_for_function(f"() => document.querySelector('#out textarea').value !== {json.dumps(old)}", timeout=WAIT)
    return json.loads(page.input_value("#out textarea"))


def title(page: Page) -> str:
    """Give the accordion's title."""
    page.wait_for_timeout(400)
    return page.locator("#txt2img_klora > .label-wrap > span").first.inner_text()


def main() -> None:
    """Drive the page, with everything outside it out of reach."""
    url, chromium = sys.argv[1:]
    errors: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 1200})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith((url, "data:", "blob:")) else r.abort())
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_selector("#txt2img_klora", timeout=WAIT)
        page.wait_for_timeout(1000)
        page.add_script_tag(content=SCRIPT.read_text(encoding="utf-8"))
        seen = use(page)
        browser.close()
    print(json.dumps({**seen, "page errors": errors}))


if __name__ == "__main__":
    main()

"""Use the accordion of `serve.py` as a person does and print what was seen: `drive.py URL CHROMIUM`."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
SCRIPTS = ("klora.js", "klora_sides.js", "klora_windows.js")
WAIT = 60_000


def use(page: Page) -> dict[str, Any]:
    """Walk through every control that does something."""
    seen: dict[str, Any] = {"before": echo(page), "title": title(page)}
    page.click("#txt2img_klora > .label-wrap")
    seen["folded by the tick"] = fold_with_the_tick(page)
    choose(page, "subject", "dog")
    choose(page, "style", "dog")
    seen["error"] = analyse(page, "there is no LoRA")
    seen["map after error"] = page.locator(".klora-map").count()
    choose(page, "style", "ink")
    seen["summary"] = analyse(page, "×")
    seen["active title"] = title(page)
    seen.update(look_at_the_map(page))
    seen["misfit"] = misfit(page)
    page.click("#txt2img_klora_refresh_names")
    choose(page, "style", "new")
    page.wait_for_selector(".klora-stale-note", state="visible", timeout=WAIT)
    page.click("#txt2img_klora_advanced > .label-wrap")
    seen["rule"] = page.inner_text("#txt2img_klora_rule")
    seen["opacity of the stale"] = [opacity(page, text) for text in (".klora-result > p", ".klora-rule > span")]
    page.fill("#txt2img_klora_beta textarea, #txt2img_klora_beta input", "0.6")
    seen.update(set_the_share(page))
    fill_number(page, "balance", "-0.5")
    fill_number(page, "style_strength", "0.83")
    seen["seed at first"] = page.locator("#txt2img_klora_seed").is_visible()
    seen["windows"] = move_the_windows(page)
    seen["focused handles"] = focus_the_handles(page)
    page.check("#txt2img_klora_share_switch input")
    choose(page, "policy", "random")
    page.wait_for_selector("#txt2img_klora_seed", state="visible", timeout=WAIT)
    page.wait_for_selector("#txt2img_klora_balance", state="hidden", timeout=WAIT)
    seen["rows"] = page.evaluate(ROWS)
    seen["after"] = echo(page)
    seen["several"] = edit_several(page)
    seen["layouts"] = layouts(page)
    return seen


def move_the_windows(page: Page) -> list[Any]:
    """Drag both handles of one window, the first beyond the second: what the script gets, and where they are."""
    found = []
    handles = [f"#txt2img_klora_style_{end} input[type=range]" for end in ("from", "to")]
    boxes = [page.locator(handle).bounding_box() for handle in handles]
    found.append([round(box[at]) for box in boxes if box for at in ("x", "y")])
    page.locator(handles[0]).scroll_into_view_if_needed()
    for start, end in ((1.0, 0.5), (0.0, 0.8)):
        box = page.locator(handles[0]).bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 8 + start * (box["width"] - 16), y)
        page.mouse.down()
        page.mouse.move(box["x"] + 8 + end * (box["width"] - 16), y, steps=8)
        page.mouse.up()
        page.wait_for_timeout(300)
        values = echo(page)
        found.append([values["style_from"], values["style_to"]])
    row = "document.querySelector('#txt2img_klora_style_from').closest('.klora-window').style"
    found.append([page.evaluate(f"{row}.getPropertyValue('--klora-{end}')") for end in ("from", "to")])
    return found


def focus_the_handles(page: Page) -> list[list[bool]]:
    """Go to each handle of a window by the keyboard: which of the two look otherwise than before."""
    names = [f"#txt2img_klora_subject_{end} input" for end in ("from", "to")]
    track = page.locator(f"{names[0]}[type=range]")
    track.scroll_into_view_if_needed()

    def pictures() -> list[Image.Image]:
        page.wait_for_timeout(300)
        shot = Image.open(BytesIO(track.screenshot(animations="disabled"))).convert("L")
        return [shot.crop((left, 0, left + 16, 16)) for left in (0, shot.width - 16)]

    def differ(now: Image.Image, old: Image.Image) -> bool:
        # A few pixels of an edge may.
        return sum(ImageChops.difference(now, old).histogram()[64:]) > 20

    page.mouse.move(0, 0)
    page.locator("#txt2img_klora_beta").locator("input, textarea").focus()
    before, found = pictures(), []
    for name in names:
        page.focus(f"{name}[type=number]")
        page.keyboard.press("Tab")
        found.append([differ(*pair) for pair in zip(pictures(), before, strict=True)])
    return found


def edit_several(page: Page) -> list[Any]:
    """Add a LoRA to the subject, give it a weight, and remove the first: what the script gets after each."""
    found = [page.locator(".klora-part").count()]
    page.click("#txt2img_klora_several > .label-wrap")
    choose(page, "more_subject", "ink")
    page.wait_for_selector(".klora-part", state="visible", timeout=WAIT)
    found.append(echo(page)["subject"])
    page.locator(".klora-part input").nth(1).fill("0.5")
    page.keyboard.press("Enter")
    page.wait_for_selector('.klora-part input[value="0.5"]', state="visible", timeout=WAIT)
    page.wait_for_timeout(300)
    found.append(echo(page)["subject"])
    page.locator(".klora-part button").nth(0).click()
    page.wait_for_function("() => document.querySelectorAll('.klora-part').length === 1", timeout=WAIT)
    found.append(echo(page)["subject"])
    # As a host does whose words in another language happen to have one for the name.
    page.locator(".klora-part span").evaluate("(shown) => { shown.textContent = 'Tinte'; }")
    page.locator(".klora-part input").fill("1")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.klora-part').length === 0", timeout=WAIT)
    found.append([echo(page)["subject"], page.input_value("#txt2img_klora_more_subject input")])
    return found


def layouts(page: Page) -> list[dict[str, Any]]:
    """What stands out of the accordion, and where some things lie, on a wide page and on a narrow one."""
    choose(page, "policy", "k-lora")
    page.uncheck("#txt2img_klora_share_switch input")
    page.wait_for_selector("#txt2img_klora_balance", state="visible", timeout=WAIT)
    found = []
    for width in (1400, 420):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(500)
        found.append(page.evaluate(LAYOUT))
    page.set_viewport_size({"width": 1000, "height": 1200})
    return found


LAYOUT = """() => {
    const box = (selector) => document.querySelector(`#txt2img_klora${selector}`).getBoundingClientRect();
    const whole = box('');
    const shown = [...document.querySelectorAll('#txt2img_klora *')].filter((found) => found.offsetParent);
    const rows = [...document.querySelectorAll('#txt2img_klora_advanced .klora-row')].filter((row) => row.offsetHeight);
    const boxes = rows.map((row) => row.getBoundingClientRect());
    const [balance, refresh, style] = ['_balance', '_refresh_names', '_style input'].map(box);
    const right = (found) => found.getBoundingClientRect().right;
    return {
        out: shown.filter((found) => right(found) > whole.right + 1).map((found) => found.outerHTML),
        balance: [balance.left - box('_subject_strength').left, balance.right - box('_style_strength').right],
        refresh: [refresh.top, (style.top + style.bottom) / 2, refresh.bottom],
        gaps: boxes.slice(1).map((row, i) => Math.round(row.top - boxes[i].bottom)),
        switch: box('_share_switch').height,
        titles: [...document.querySelectorAll('#txt2img_klora .block span[title]')].map((found) => found.title),
    };
}"""


# The tops of labels and the bottoms of controls in every row of the advanced settings, each relative to the first.
ROWS = """() => [...document.querySelectorAll('#txt2img_klora_advanced .klora-row .block:not(.hidden)')]
    .filter((block) => block.offsetHeight)
    .map((block) => ({
        top: block.getBoundingClientRect().top,
        label: block.querySelector('span').getBoundingClientRect().top,
        input: (block.querySelector('.wrap-inner')?.parentElement || block.querySelector('input, textarea'))
            .getBoundingClientRect().bottom,
    }))"""


def look_at_the_map(page: Page) -> dict[str, Any]:
    """Point at the right half of the map, a third from its top, and beside it."""
    image = page.locator(".klora-map img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.34 * box["height"])
    page.wait_for_timeout(200)
    found = {"pointed at": page.inner_text(".klora-map figcaption")}
    page.locator(".klora-map figcaption").hover()
    page.wait_for_timeout(200)
    found["stale at first"] = page.locator(".klora-stale").count()
    return found


def opacity(page: Page, selector: str) -> float:
    """How opaque an element is in the end, with all that it stands in."""
    code = """(found) => {
        let product = 1;
        for (let one = found; one; one = one.parentElement) product *= Number(getComputedStyle(one).opacity);
        return product;
    }"""
    return float(page.locator(selector).first.evaluate(code))


def fold_with_the_tick(page: Page) -> list[Any]:
    """Tick in the header and fold: whether it is open and on after each."""
    found: list[Any] = []

    def note() -> None:
        page.wait_for_timeout(300)
        opened = page.locator("#txt2img_klora_subject").is_visible()
        found.append([opened, page.locator(".klora-tick").first.is_checked()])

    page.locator("#txt2img_klora .klora-tick").first.click()
    note()
    for _ in range(2):
        page.click("#txt2img_klora > .label-wrap", position={"x": 200, "y": 10})
        note()
    return found


def set_the_share(page: Page) -> dict[str, Any]:
    """Turn the switch on, choose a share, and turn it off again."""
    page.check("#txt2img_klora_share_switch input")
    page.wait_for_selector("#txt2img_klora_share_slider", state="visible", timeout=WAIT)
    page.wait_for_selector("#txt2img_klora_balance", state="hidden", timeout=WAIT)
    fill_number(page, "share_slider", "0.4")
    found = {"by share": echo(page)["share"]}
    page.uncheck("#txt2img_klora_share_switch input")
    page.wait_for_selector("#txt2img_klora_balance", state="visible", timeout=WAIT)
    return {**found, "by balance": echo(page)["share"]}


def fill_number(page: Page, name: str, value: str) -> None:
    """Type into the box of a slider."""
    page.fill(f"#txt2img_klora_{name} input[type=number]", value)
    page.keyboard.press("Tab")
    page.wait_for_timeout(200)


def misfit(page: Page) -> list[Any]:
    """Choose another checkpoint in the host's menu, and go back: what is said of the pair before and after."""
    said = page.locator("#txt2img_klora_misfit p")
    found: list[Any] = [said.count()]
    pick(page, ".model_selection", "flux")
    said.first.wait_for(state="visible", timeout=WAIT)
    found.append(said.first.inner_text())
    pick(page, ".model_selection", "sd1")
    said.first.wait_for(state="detached", timeout=WAIT)
    return found


def choose(page: Page, name: str, value: str) -> None:
    """Choose in one of the accordion's menus."""
    pick(page, f"#txt2img_klora_{name}", value)


def pick(page: Page, menu: str, value: str) -> None:
    """Type into a menu and take what it offers."""
    box = page.locator(f"{menu} input").first
    box.click()
    box.fill(value)
    box.press("Enter")
    page.wait_for_timeout(300)
    box.press("Escape")
    box.blur()


def analyse(page: Page, expected: str) -> str:
    """Press the button and give what is said first."""
    page.click("#txt2img_klora_analyse")
    words = "document.querySelector('#txt2img_klora_result p')?.textContent || ''"
    page.wait_for_function(f"() => ({words}).includes({json.dumps(expected)})", timeout=WAIT)
    return str(page.locator("#txt2img_klora_result p").first.text_content())


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
        for name in SCRIPTS:
            page.add_script_tag(content=(ROOT / "javascript" / name).read_text(encoding="utf-8"))
        page.add_style_tag(content=(ROOT / "style.css").read_text(encoding="utf-8"))
        seen = use(page)
        browser.close()
    print(json.dumps({**seen, "page errors": errors}))


if __name__ == "__main__":
    main()

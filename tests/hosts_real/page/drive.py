"""Use the accordion on a real WebUI's page as a person does and print what was seen.

`drive.py URL CHROMIUM FOLDER OTHER`: pictures of the page go into FOLDER; OTHER is the name of a checkpoint of another
architecture, or nothing. Runs in an environment that has playwright; nothing of this repository is imported.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
WAIT = 180_000
SIZES = ((1400, 1000), (420, 900))


class Walk:
    """One page of the host, and what was seen there."""

    def __init__(self, browser: Browser, url: str, folder: Path, width: int = 1400, dark: bool = False) -> None:
        self.seen: dict[str, Any] = {}
        self.errors: list[str] = []
        self.folder, self._look = folder, f"{width}-{'dark' if dark else 'light'}"
        height = dict(SIZES)[width]
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.route(
            "**/*", lambda r: r.continue_() if r.request.url.startswith((url, "data:", "blob:")) else r.abort()
        )
        self.page.goto(f"{url}/?__theme={'dark' if dark else 'light'}", wait_until="domcontentloaded")
        self.page.wait_for_selector("#txt2img_klora", timeout=WAIT)
        # What the extension's script adds once the host's page is there.
        self.page.wait_for_selector("#txt2img_klora .klora-tick", timeout=WAIT)
        self.page.wait_for_timeout(1500)

    def find(self, name: str) -> Any:
        """A control of the accordion."""
        return self.page.locator(f"#txt2img_klora_{name}")

    def title(self) -> str:
        """What the header says."""
        self.page.wait_for_timeout(500)
        return " ".join(self.page.locator("#txt2img_klora > .label-wrap > span").first.inner_text().split())

    def ticked(self) -> bool:
        """Whether the header's checkbox is on."""
        return bool(self.page.locator("#txt2img_klora .klora-tick").is_checked())

    def is_open(self) -> bool:
        """Whether the accordion is unfolded."""
        self.page.wait_for_timeout(500)
        return bool(self.find("subject").is_visible())

    def fold(self) -> None:
        """Fold or unfold by a click on the header, beside the checkbox."""
        self.page.click("#txt2img_klora > .label-wrap", position={"x": 120, "y": 10})

    def unfold(self, name: str = "") -> None:
        """Unfold the accordion, or a part of it, if it is not."""
        body = self.page.locator(f"#txt2img_klora{name} > .label-wrap")
        if "open" not in (body.get_attribute("class") or "").split():
            body.click(position={"x": 120, "y": 10})
            self.page.wait_for_timeout(500)

    def choose(self, selector: str, value: str) -> None:
        """Type into a menu and take what it offers."""
        box = self.page.locator(f"{selector} input").first
        box.scroll_into_view_if_needed()
        box.click()
        box.fill(value)
        self.page.wait_for_timeout(200)
        box.press("Enter")
        self.page.wait_for_timeout(300)
        box.press("Tab")
        self.page.wait_for_timeout(700)

    def set_number(self, selector: str, value: Any) -> None:
        """Type into the box of a slider."""
        self.page.fill(f"{selector} input[type=number]", str(value))
        self.page.keyboard.press("Tab")
        self.page.wait_for_timeout(300)

    def value(self, name: str) -> str:
        """What a control of the accordion holds."""
        return str(self.page.locator(f"#txt2img_klora_{name} :is(input, textarea)").first.input_value())

    def wait_text(self, selector: str, wanted: str) -> str:
        """Wait until an element says something, and give all that it says."""
        says = f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.innerText).join(' ')"
        self.page.wait_for_function(f"() => ({says}).includes({json.dumps(wanted)})", timeout=WAIT)
        return str(self.page.evaluate(says))

    def generate(self) -> str:
        """Make a picture and give its text, which may be that of the one before."""
        old = self.page.evaluate(GALLERY)
        self.page.click("#txt2img_generate")
        self.wait_picture(old)
        return self.infotext()

    def wait_picture(self, old: str) -> None:
        """Wait until the gallery shows another picture than the `old` one, and the job is done."""
        ended = "!document.querySelector('#txt2img_interrupt')?.offsetParent"
        shown = f"() => {GALLERY} && {GALLERY} !== {json.dumps(old)} && {ended}"
        self.page.wait_for_function(shown, timeout=WAIT)
        self.page.wait_for_timeout(500)

    def infotext(self) -> str:
        """The text below the picture."""
        return str(self.page.evaluate(INFO))

    def wait_checkpoint(self, name: str) -> None:
        """Wait until the host has changed to a checkpoint."""
        chosen = "(await (await fetch('/sdapi/v1/options')).json()).sd_model_checkpoint"
        deadline = time.monotonic() + WAIT / 1000
        while name not in (now := str(self.page.evaluate(f"async () => {chosen}"))):
            assert time.monotonic() < deadline, f"the checkpoint is {now}, not {name}"
            self.page.wait_for_timeout(500)
        self.page.wait_for_timeout(3000)

    def picture(self, name: str, whole: bool = False) -> None:
        """Keep how the accordion looks, or the whole page."""
        self.page.mouse.move(5, 5)
        self.page.wait_for_timeout(500)
        target: Any = self.page if whole else self.page.locator("#txt2img_klora")
        target.screenshot(path=self.folder / f"{self._look}-{name}.png")


GALLERY = "(document.querySelector('#txt2img_gallery img')?.src ?? '')"
INFO = "(document.querySelector('#html_info_txt2img')?.innerText ?? '')"


def small(walk: Walk) -> None:
    """Ask for a picture that is made at once."""
    for name, value in (("width", 64), ("height", 64), ("steps", 4)):
        walk.set_number(f"#txt2img_{name}", value)
    walk.page.fill("#txt2img_prompt textarea", "a dog")


def header(walk: Walk) -> None:
    """Tick and fold, each apart from the other."""
    found = [[walk.title(), walk.ticked(), walk.is_open()]]
    walk.fold()
    found.append([walk.title(), walk.ticked(), walk.is_open()])
    walk.page.locator("#txt2img_klora .klora-tick").click()
    walk.wait_text("#txt2img_klora > .label-wrap", "no pair yet")
    found.append([walk.title(), walk.ticked(), walk.is_open()])
    walk.fold()
    found.append([walk.title(), walk.ticked(), walk.is_open()])
    walk.unfold()
    walk.seen["header"] = found


def no_pair(walk: Walk) -> None:
    """Enabled without a pair, and a grid asked for."""
    walk.seen["no pair"] = walk.generate()
    walk.find("compare").click()
    walk.seen["no grid"] = walk.wait_text("#txt2img_klora .klora-wanted", "Choose")


def pair(walk: Walk) -> None:
    """Choose a pair, analyse it, and point at its map."""
    walk.choose("#txt2img_klora_subject", "subj")
    walk.choose("#txt2img_klora_style", "style")
    walk.seen["title"] = walk.title()
    walk.find("analyse").click()
    walk.seen["analysis"] = walk.wait_text("#txt2img_klora_result", "Overlap:")
    box = walk.page.locator("#txt2img_klora .klora-map img").bounding_box()
    walk.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 3)
    walk.page.wait_for_timeout(300)
    walk.seen["pointed at"] = walk.page.inner_text("#txt2img_klora .klora-map figcaption")


def picture(walk: Walk) -> None:
    """Make a picture, with a balance, before which the analysis and its rule are told to be of another."""
    walk.set_number("#txt2img_klora_balance", 0.5)
    walk.seen["stale"] = [walk.page.locator(f"#txt2img_klora_{one} .klora-stale").count() for one in ("result", "rule")]
    walk.seen["picture"] = walk.generate()


def several(walk: Walk) -> None:
    """A side of two with weights, windows and blocks."""
    walk.unfold("_several")
    walk.choose("#txt2img_klora_more_subject", "subj_te")
    walk.page.wait_for_selector("#txt2img_klora .klora-part", timeout=WAIT)
    for index, weight in enumerate(("0.8", "0.5")):
        walk.page.locator("#txt2img_klora .klora-part input").nth(index).fill(weight)
        walk.page.keyboard.press("Enter")
        walk.page.wait_for_selector(f'#txt2img_klora .klora-part input[value="{weight}"]', timeout=WAIT)
        walk.page.wait_for_timeout(500)
    walk.unfold("_advanced")
    walk.set_number("#txt2img_klora_subject_to", 0.75)
    walk.page.fill("#txt2img_klora_style_blocks :is(input, textarea)", "mid: 0.5")
    walk.seen["side"] = [walk.value("subject"), walk.title()]
    walk.picture("several")
    walk.seen["picture of several"] = walk.generate()


def paste(walk: Walk) -> None:
    """Paste a picture's text into a page that was reset by other values, and make it again."""
    text = walk.seen["picture of several"]
    walk.choose("#txt2img_klora_subject", "style")
    walk.set_number("#txt2img_klora_subject_to", 1)
    walk.set_number("#txt2img_klora_balance", -1)
    walk.page.fill("#txt2img_klora_style_blocks :is(input, textarea)", "")
    walk.page.fill("#txt2img_prompt textarea", text)
    walk.page.click("#paste")
    # The rows come last, since the host makes them of what has been pasted.
    walk.page.wait_for_selector("#txt2img_klora .klora-part", timeout=WAIT)
    walk.page.wait_for_timeout(1000)
    names = ("subject", "style", "subject_to", "style_blocks", "balance")
    walk.seen["pasted"] = {name: walk.value(name) for name in names}
    row = "document.querySelector('#txt2img_klora_subject_to').closest('.klora-window').style"
    walk.seen["pasted"]["handle"] = walk.page.evaluate(f"{row}.getPropertyValue('--klora-to')")
    walk.seen["pasted"]["rows"] = walk.page.locator("#txt2img_klora .klora-part").count()
    walk.seen["pasted"]["on"] = walk.ticked()
    walk.seen["pasted prompt"] = walk.page.input_value("#txt2img_prompt textarea")
    walk.seen["picture of the pasted"] = walk.generate()


def save(walk: Walk) -> None:
    """Save a fusion of a side of two; twice under one name, and by a policy that no file can hold."""
    walk.unfold("_advanced")
    button = walk.find("save")
    walk.seen["no file"] = [button.inner_text(), button.is_enabled()]
    walk.choose("#txt2img_klora_policy", "direct")
    walk.page.fill("#txt2img_klora_style_blocks :is(input, textarea)", "")
    walk.set_number("#txt2img_klora_subject_to", 1)
    walk.page.wait_for_function(
        "() => document.querySelector('#txt2img_klora_save').innerText.trim() === 'Save as LoRA'", timeout=WAIT
    )
    walk.page.fill("#txt2img_klora_save_name :is(input, textarea)", "both of them")
    button.click()
    walk.seen["saved"] = walk.wait_text("#txt2img_klora_saved", "among the LoRAs")
    button.click()
    walk.seen["saved again"] = walk.wait_text("#txt2img_klora_saved", "there already")
    walk.picture("saved")
    walk.find("refresh_names").click()
    walk.page.wait_for_timeout(1500)
    walk.choose("#txt2img_klora_style", "both of them")
    walk.seen["listed"] = walk.value("style")
    walk.choose("#txt2img_klora_style", "style")
    walk.choose("#txt2img_klora_policy", "k-lora")


def compare(walk: Walk) -> None:
    """Five balances, and the plot's controls as they were."""
    walk.page.fill("#txt2img_prompt textarea", "a dog")
    script = "#script_list input, #script_list select"
    before = walk.page.locator(script).first.input_value()
    old = walk.page.evaluate(GALLERY)
    walk.find("compare").click()
    walk.wait_picture(old)
    walk.page.wait_for_timeout(3000)
    walk.seen["grid"] = walk.page.evaluate(
        "JSON.parse(document.querySelector('#generation_info_txt2img textarea').value).infotexts[0]"
    )
    walk.seen["script after the grid"] = [before, walk.page.locator(script).first.input_value()]
    walk.picture("grid", whole=True)


def batch(walk: Walk) -> None:
    """A folder of pictures made anew, with a map wanted in the gallery: what comes into the other folder."""
    folders = {name: walk.folder / f"batch-{name}" for name in ("input", "output")}
    shutil.rmtree(folders["output"], ignore_errors=True)
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    for name in ("one", "two"):
        walk.page.screenshot(path=folders["input"] / f"{name}.png", clip={"x": 0, "y": 0, "width": 64, "height": 64})
    walk.page.locator("#tabs > .tab-nav > button", has_text="img2img").first.click()
    walk.page.locator("#mode_img2img > .tab-nav > button", has_text="Batch").first.click()
    walk.page.locator("#img2img_batch_source > .tab-nav > button", has_text="From directory").first.click()
    walk.page.wait_for_timeout(1500)
    for name, folder in folders.items():
        walk.page.fill(f"#img2img_batch_{name}_dir textarea", str(folder.resolve()))
    for name, value in (("width", 64), ("height", 64), ("steps", 4)):
        walk.set_number(f"#img2img_{name}", value)
    walk.page.fill("#img2img_prompt textarea", "a dog <klora:subj:style>")
    walk.page.click("#img2img_klora > .label-wrap", position={"x": 120, "y": 10})
    walk.page.check("#img2img_klora_show_map input")
    walk.page.click("#img2img_generate")
    deadline = time.monotonic() + WAIT / 1000
    while len(list(folders["output"].rglob("*.png"))) < 2 and time.monotonic() < deadline:
        walk.page.wait_for_timeout(500)
    walk.page.wait_for_timeout(4000)
    walk.seen["batch"] = sorted(path.name for path in folders["output"].rglob("*.png"))
    walk.page.locator("#tabs > .tab-nav > button", has_text="txt2img").first.click()


def misfit(walk: Walk, other: str) -> None:
    """Choose a checkpoint of another architecture; the host itself goes back, for what comes after."""
    box = ":is(#setting_sd_model_checkpoint, .model_selection)"
    here = walk.page.locator(f"{box} input").first.input_value()
    walk.choose(box, other)
    walk.seen["misfit"] = walk.wait_text("#txt2img_klora_misfit", "this pair is for")
    walk.picture("misfit")
    walk.wait_checkpoint(other)
    body = json.dumps({"sd_model_checkpoint": here})
    headers = "{'Content-Type': 'application/json'}"
    sent = f"{{method: 'POST', headers: {headers}, body: {json.dumps(body)}}}"
    walk.page.evaluate(f"() => fetch('/sdapi/v1/options', {sent}).then((answer) => answer.ok)")


def settings(walk: Walk) -> None:
    """The page of settings."""
    walk.page.locator("#tabs > .tab-nav > button", has_text="Settings").first.click()
    walk.page.wait_for_timeout(1000)
    walk.page.locator("#settings > .tab-nav > button", has_text="K-LoRA").first.click()
    walk.page.wait_for_selector("#settings_klora", state="visible", timeout=WAIT)
    walk.seen["settings"] = walk.page.inner_text("#settings_klora")
    walk.picture("settings", whole=True)


STEPS: tuple[Callable[[Walk], None], ...] = (
    small,
    header,
    no_pair,
    pair,
    picture,
    several,
    paste,
    save,
    compare,
    batch,
)


def looks(walk: Walk) -> dict[str, Any]:
    """Keep pictures of each state on a page of some width and colours; what stands out of the accordion there."""
    walk.picture("closed")
    walk.page.locator("#txt2img_klora .klora-tick").click()
    walk.unfold()
    walk.picture("no-pair")
    walk.choose("#txt2img_klora_subject", "subj_te")
    walk.choose("#txt2img_klora_style", "style_te_peft")
    walk.find("analyse").click()
    walk.wait_text("#txt2img_klora_result", "Overlap:")
    walk.picture("analysed")
    walk.unfold("_several")
    walk.choose("#txt2img_klora_more_style", "style")
    walk.page.wait_for_selector("#txt2img_klora .klora-part", timeout=WAIT)
    walk.unfold("_advanced")
    walk.picture("advanced")
    walk.choose("#txt2img_klora_subject", "nobody")
    walk.find("analyse").click()
    walk.wait_text("#txt2img_klora_result", "nobody")
    walk.picture("error")
    return {"out": walk.page.evaluate(OUT), "errors": walk.errors}


OUT = """() => {
    const right = (found) => found.getBoundingClientRect().right;
    const end = right(document.querySelector('#txt2img_klora'));
    return [...document.querySelectorAll('#txt2img_klora *')]
        .filter((found) => found.offsetParent && right(found) > end + 1)
        .map((found) => found.outerHTML.slice(0, 200));
}"""


def main() -> None:
    """Walk once through all that can be done, then look at it in every size and colour."""
    url, chromium, folder, other = sys.argv[1:5]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        walk = Walk(browser, url, Path(folder))
        for step in STEPS:
            step(walk)
        if other:
            misfit(walk, other)
        settings(walk)
        seen = {**walk.seen, "errors": walk.errors}
        walk.page.close()
        seen["looks"] = {}
        for width, _ in SIZES:
            for dark in (False, True):
                page = Walk(browser, url, Path(folder), width, dark)
                seen["looks"][f"{width} {'dark' if dark else 'light'}"] = looks(page)
                page.page.close()
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

"""Drop the example workflow and its picture onto ComfyUI's page and print what came of it: `drive.py URL CHROMIUM`.

Runs in an environment that has playwright; nothing of this repository is imported.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WORKFLOWS = Path(__file__).parents[3] / "workflows"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
WAIT = 180_000
# What the page does with a file that is dropped onto it.
DROP = """async ([name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    await window.app.handleFile(new File([bytes], name, {type}));
    await new Promise((done) => setTimeout(done, 2000));
    return window.app.graph._nodes.map((node) => ({
        type: node.type,
        known: node.type in LiteGraph.registered_node_types,
        linked: (node.inputs || []).filter((input) => input.link !== null).map((input) => input.name),
        values: Object.fromEntries((node.widgets || []).map((widget) => [widget.name, widget.value])),
    }));
}"""
PREVIEW = """() => window.app.graph._nodes.filter((node) => node.type === 'PreviewImage' && node.imgs?.length).length"""


def main() -> None:
    """Drop both, run what draws the map with one of the probe's models, and look at the page."""
    url, chromium, picture = sys.argv[1:]
    seen: dict[str, Any] = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1960, "height": 1330})
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith((url, "data:", "blob:")) else r.abort())
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && window.app.canvas", timeout=WAIT)
        page.wait_for_timeout(5000)
        for name, kind in (("k-lora.png", "image/png"), ("k-lora.json", "application/json")):
            data = base64.b64encode((WORKFLOWS / name).read_bytes()).decode()
            seen[name] = page.evaluate(DROP, [name, kind, data])
        page.evaluate(
            """async () => {
                const graph = window.app.graph;
                const of = (type) => graph._nodes.find((node) => node.type === type);
                for (const type of ['KSampler', 'VAEDecode', 'SaveImage']) of(type).mode = 2;
                for (const prompt of graph._nodes.filter((node) => node.type === 'CLIPTextEncode')) prompt.mode = 2;
                const loader = LiteGraph.createNode('ProbeModel');
                graph.add(loader);
                loader.connect(0, of('KLora'), 0);
                of('KLora').disconnectInput(1);
                of('CheckpointLoaderSimple').mode = 2;
                of('KLora').widgets.find((widget) => widget.name === 'subject').value = 'sd1_subject.safetensors';
                of('KLora').widgets.find((widget) => widget.name === 'style').value = 'sd1_style.safetensors';
                await window.app.queuePrompt(0, 1);
            }"""
        )
        page.wait_for_function(f"() => ({PREVIEW})() === 1", timeout=WAIT)
        # A first visit is greeted with the templates, among which the example is.
        page.keyboard.press("Escape")
        page.wait_for_timeout(1000)
        page.screenshot(path=picture)
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

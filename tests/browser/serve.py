"""The accordion in a bare Gradio app: `serve.py PORT`, run with the Python of a small environment without torch."""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr

from klora.errors import KloraError
from klora.webui.analysis_page import POINT, STALE, View
from klora.webui.args import ARG_ORDER, FusionRequest
from klora.webui.ui import build

NAMES = ["dog", "ink"]
RULE = '<p class="klora-rule"><span>S(τ) = 1.5·τ + 0.5</span></p>'


class FakeLibrary:
    """Lists a third LoRA once it has been refreshed."""

    def names(self) -> list[str]:
        return list(NAMES)

    def knows(self, name: str) -> bool:
        return name in NAMES

    def refresh(self) -> None:
        if "new" not in NAMES:
            NAMES.append("new")


def analyse(request: FusionRequest, view: View, hear: Callable[[int, int], None]) -> tuple[str, str]:
    """Stand for the analysis of files, which needs torch: two modules over so many steps."""
    if request.subject == request.style:
        raise KloraError(f"there is no LoRA named <b>{request.subject}</b>; did you mean cat?")
    modules = [[["down block 1", "query"], "c" * view.steps], [["up block 0", "key"], "s" * view.steps]]
    told = html.escape(json.dumps({"box": [0, 0, 1, 1], "steps": view.steps, "modules": modules}))
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAHd3dwAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="
    found = f"<p>{request.subject} × {request.style}, {view.steps} steps, {'dark' if view.dark else 'light'}</p>"
    note = f'<p class="klora-stale-note">{STALE}</p>'
    figure = f'<figure class="klora-map" data-klora="{told}"><img src="{pixel}" style="height: 200px">'
    caption = f'<figcaption data-idle="{POINT}">{POINT}</figcaption></figure>'
    return f'<div class="klora-result">{found}{note}{figure}{caption}</div>', RULE


def misfit(subject: str, style: str, checkpoint: str) -> str:
    """Stand for a look into the files."""
    return f"{subject} and {style} are not for {checkpoint}" if checkpoint != "sd1" else ""


def app() -> gr.Blocks:
    """One tab with the accordion, and a button that writes what the script would get."""
    with gr.Blocks(title="accordion") as page:
        # What a host has beside the accordion.
        gr.Slider(label="Sampling steps", minimum=1, maximum=150, step=1, value=24, elem_id="txt2img_steps")
        checkpoint = gr.Dropdown(["sd1", "flux"], value="sd1", label="Checkpoint", elem_classes=["model_selection"])
        checkpoint.interactive = True
        found = build("txt2img", FakeLibrary, analyse, misfit=misfit)
        echo = gr.Button("Echo", elem_id="echo")
        out = gr.Textbox(label="out", elem_id="out")
        echo.click(
            lambda *values: json.dumps(dict(zip(ARG_ORDER, values, strict=True))), inputs=found.inputs, outputs=[out]
        )
    return page


if __name__ == "__main__":
    torch_is_loaded = "torch" in sys.modules
    print("torch" if torch_is_loaded else "no torch", flush=True)
    app().queue().launch(
        server_name="127.0.0.1", server_port=int(sys.argv[1]), show_error=True, quiet=True, prevent_thread_lock=False
    )

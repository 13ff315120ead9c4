"""The accordion in a bare Gradio app: `serve.py PORT`, run with the Python of a small environment without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr
from PIL import Image

from klora.errors import KloraError
from klora.webui.args import ARG_ORDER, FusionRequest
from klora.webui.ui import build

NAMES = ["dog", "ink"]


class FakeLibrary:
    """Lists a third LoRA once it has been refreshed."""

    def names(self) -> list[str]:
        return list(NAMES)

    def refresh(self) -> None:
        if "new" not in NAMES:
            NAMES.append("new")


def analyse(request: FusionRequest) -> tuple[Image.Image, str]:
    if request.subject == request.style:
        raise KloraError(f"there is no LoRA named <b>{request.subject}</b>; did you mean cat?")
    return Image.new("RGB", (300, 200), "#0072B2"), f"{request.subject} × {request.style}\nsubject share 50.0%"


def echoed(*values: object) -> str:
    return json.dumps(dict(zip(ARG_ORDER, values, strict=True)))


def app() -> gr.Blocks:
    """One tab with the accordion, and a button that writes what the script would get."""
    with gr.Blocks(title="accordion") as page:
        found = build("txt2img", FakeLibrary, analyse)
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

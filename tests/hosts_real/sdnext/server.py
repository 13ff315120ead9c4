"""A real SD.Next as a subprocess, with this extension, tiny models and their LoRAs in a data folder of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.hosts_real.sdnext.models import write_loras, write_merged, write_models
from tests.hosts_real.server import REPOSITORY, Picture, _environment, _free_port, ask, end_process

FLAGS = "--skip-all --experimental --use-cpu all --server-name 127.0.0.1"
SETTINGS = {
    "sd_model_checkpoint": "Diffusers/sd",
    "theme_type": "Standard",
    # Each restores what it has changed bit for bit, which the host's own faster way does not.
    "lora_fuse_native": False,
    "samples_save": False,
    "grid_save": False,
    "return_grid": False,
    # What a pixel is, and not what a JPEG makes of it.
    "samples_format": "png",
    # A picture that is one too many in a minute is made, and then refused: it would be made twice.
    "server_rate_limit": 0,
}
STEPS = 6
IN_ONE_REPOSITORY = {"flux": "FluxPipeline", "z_image": "ZImagePipeline"}
"""Models of which the host's own loaders fetch parts by name, whatever folder they are asked to load."""


@dataclass
class SdnextServer:
    """One running SD.Next."""

    root: Path
    python: Path
    data: Path
    port: int = 0
    _process: subprocess.Popen[bytes] | None = None
    loaded: str = "sd"
    defaults: dict[str, Any] = field(
        default_factory=lambda: {
            "prompt": "a dog in the snow",
            "negative_prompt": "",
            "seed": 1,
            "steps": STEPS,
            "cfg_scale": 4,
            "width": 64,
            "height": 64,
            "sampler_name": "Default",
        }
    )

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def log(self) -> str:
        return (self.data / "host.log").read_text(errors="replace")

    def start(self, timeout: float = 900) -> None:
        """Write its models, start it and wait until it serves."""
        write_loras(self.models / "Lora", write_models(self.models / "Diffusers"))
        write_merged(self.models / "Diffusers", self.models / "Lora" / "sd_subject_norms.safetensors")
        extensions = self.data / "extensions"
        extensions.mkdir()
        (extensions / "klora").symlink_to(REPOSITORY)
        (extensions / "klora-probe").symlink_to(Path(__file__).with_name("probe"))
        (self.data / "config.json").write_text(json.dumps(SETTINGS))
        self.port = _free_port()
        command = [
            str(self.python),
            "launch.py",
            *FLAGS.split(),
            "--data-dir",
            str(self.data),
            "--port",
            str(self.port),
        ]
        with (self.data / "host.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.root,
                env={**_environment(), "TORCHDYNAMO_DISABLE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + timeout
        while "Startup time" not in self.log:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"SD.Next did not start:\n{self.log[-3000:]}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End it and everything it started."""
        if self._process is not None:
            end_process(self._process)

    def call(self, path: str, body: Any = None, **query: Any) -> Any:
        """GET, or POST where there is a body; ApiError for any answer but a success."""
        return ask(f"http://127.0.0.1:{self.port}{path}", body, **query)

    def use(self, model: str) -> None:
        """Load a model, unless it is loaded."""
        if model == self.loaded:
            return
        kind = IN_ONE_REPOSITORY.get(model)
        if kind is None:
            if self.loaded in IN_ONE_REPOSITORY and model == "sd":
                # The host believes that it is loaded.
                self.options(sd_model_checkpoint="Diffusers/sd_other")
            self.options(sd_model_checkpoint=f"Diffusers/{model}")
            self.call("/klora-probe/prepare")
        else:
            self.use("sd")
            self.call("/klora-probe/load", folder=str(self.models / "Diffusers" / model), kind=kind)
        self.loaded = model

    def options(self, **values: Any) -> None:
        """Change the host's settings."""
        self.call("/sdapi/v1/options", values)

    def txt2img(self, tags: str = "", **changes: Any) -> Picture:
        """Make a picture of the small prompt, with `tags` behind it."""
        return self._generate("txt2img", tags, changes)

    def img2img(self, source: Picture, tags: str = "", **changes: Any) -> Picture:
        """The same from a picture."""
        changes = {"init_images": source.encoded[:1], "denoising_strength": 0.6, **changes}
        return self._generate("img2img", tags, changes)

    def hires(self, tags: str = "", **changes: Any) -> Picture:
        """The same with a second, larger pass."""
        hires = {
            "enable_hr": True,
            "hr_force": True,
            "hr_scale": 1.5,
            "hr_resize_mode": 1,
            "hr_upscaler": "Latent Nearest",
            "hr_second_pass_steps": 4,
            "hr_denoising_strength": 0.6,
        }
        return self.txt2img(tags, **{**hires, **changes})

    def plot(self, script: str, axes: list[tuple[str, str]], tags: str = "", **changes: Any) -> Picture:
        """The pictures of a grid by one of the host's two XYZ scripts, the grid itself before them."""
        known = next(
            one for one in self.call("/sdapi/v1/script-info") if one["name"] == script and not one["is_img2img"]
        )
        labels = [arg["label"] for arg in known["args"]]
        args = ["" if arg["value"] is None else arg["value"] for arg in known["args"]]
        for place, letter in enumerate("XYZ"):
            kind, values = axes[place] if place < len(axes) else ("Nothing", "")
            at = labels.index(f"{letter} type")
            args[at : at + 3] = [kind, values, [one.strip() for one in values.split(",")]]
        args[labels.index("Include images")] = True
        args[labels.index("Draw legend")] = False
        if known["is_alwayson"]:
            args[0] = True
            scripts = {**changes.pop("alwayson_scripts", {}), script: {"args": args}}
            return self.txt2img(tags, alwayson_scripts=scripts, **changes)
        return self.txt2img(tags, script_name=script, script_args=args, **changes)

    def _generate(self, path: str, tags: str, changes: dict[str, Any]) -> Picture:
        body = {**self.defaults, **changes}
        body["prompt"] = f"{body['prompt']} {tags}".strip()
        answer = self.call(f"/sdapi/v1/{path}", body)
        pictures = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in answer["images"]
        ]
        comments = "".join(self.call("/klora-probe/comments"))
        return Picture(pictures, answer["images"], json.loads(answer["info"]), comments)

    def state(self) -> dict[str, Any]:
        """The hooks on the loaded model, and the hash of all its parameters."""
        return self.call("/klora-probe/state")

    def fault(self, kind: str, after: int = 2) -> None:
        """Make a later call of the denoiser fail, or end the job there."""
        self.call("/klora-probe/fault", kind=kind, after=after)

    def taus(self, generate: Any) -> list[float]:
        """The τ of every call of the denoiser in a generation."""
        self.call("/klora-probe/record")
        generate()
        return self.call("/klora-probe/recorded")


def find_sdnext(data: Path) -> SdnextServer | str:
    """Give the server that the environment names, or say why there is none."""
    named = os.environ.get("KLORA_SDNEXT_ROOT")
    if not named:
        return "KLORA_SDNEXT_ROOT names no checkout"
    root = Path(named)
    python = Path(os.environ.get("KLORA_SDNEXT_PYTHON") or root / "venv" / "bin" / "python")
    if not (root / "launch.py").is_file() or not python.is_file():
        return f"SD.Next is not installed: no launch.py or no {python.name} where it is looked for"
    return SdnextServer(root, python, data)

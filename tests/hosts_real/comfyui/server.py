"""A real ComfyUI as a subprocess, with this extension and the probe, driven by its `/prompt` route."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.hosts_real.comfyui.graphs import Graph
from tests.hosts_real.server import REPOSITORY, _environment, _free_port, _opener, end_process

ROOT, GGUF = "KLORA_COMFYUI_ROOT", "ComfyUI-GGUF"


class PromptError(Exception):
    """A prompt that ComfyUI refused or that failed; the text is what its page shows."""


@dataclass
class ComfyServer:
    """One running ComfyUI; `python` is that of `.venv`, `venv` or KLORA_COMFYUI_PYTHON."""

    root: Path
    python: Path
    data: Path
    flags: tuple[str, ...] = ()
    port: int = 0
    executed: list[str] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.data / "host.log").read_text(errors="replace")

    @property
    def loras(self) -> Path:
        return self.data / "models" / "loras"

    @property
    def output(self) -> Path:
        return self.data / "output"

    def start(self, timeout: float = 300) -> None:
        """Start ComfyUI on a folder of its own and wait until it serves."""
        nodes = self.data / "custom_nodes"
        for folder in (nodes, self.loras, self.output, self.data / "input"):
            folder.mkdir(parents=True, exist_ok=True)
        # As a clone would be called.
        (nodes / "sd-webui-k-lora").symlink_to(REPOSITORY)
        (nodes / "klora-probe").symlink_to(Path(__file__).with_name("probe"))
        if (gguf := self.root / "custom_nodes" / GGUF).is_dir():
            (nodes / GGUF).symlink_to(gguf)
        self.port = _free_port()
        command = [str(self.python), "main.py", "--cpu", "--port", str(self.port), "--listen", "127.0.0.1"]
        command += ["--base-directory", str(self.data), "--disable-auto-launch", *self.flags]
        with (self.data / "host.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.root,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + timeout
        while True:
            try:
                self.call("/system_stats")
                return
            except (OSError, urllib.error.URLError):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log[-3000:]}") from None
                time.sleep(0.3)

    def stop(self) -> None:
        """End ComfyUI."""
        if self._process is not None:
            end_process(self._process)

    def call(self, path: str, body: Any = None, **query: Any) -> Any:
        """GET, or POST where there is a body."""
        url = f"http://127.0.0.1:{self.port}{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with _opener.open(request, timeout=600) as answer:
            text = answer.read()
            return json.loads(text) if text else None

    def run(self, graph: Graph) -> dict[str, Any]:
        """Queue a graph and wait for its outputs, by node; PromptError where it fails. `executed` tells what ran."""
        try:
            queued = self.call("/prompt", {"prompt": graph.nodes, "client_id": uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode(errors="replace")) from None
        while not (history := self.call(f"/history/{queued['prompt_id']}")):
            time.sleep(0.05)
        found = history[queued["prompt_id"]]
        messages = found["status"]["messages"]
        cached = {node for kind, told in messages if kind == "execution_cached" for node in told["nodes"]}
        self.executed = [node for node in graph.nodes if node not in cached]
        if found["status"]["status_str"] != "success":
            failed = [told for kind, told in messages if kind in ("execution_error", "execution_interrupted")]
            raise PromptError(failed[0].get("exception_message", "interrupted") if failed else str(messages))
        outputs: dict[str, Any] = found["outputs"]
        return outputs

    def latents(self, graph: Graph) -> torch.Tensor:
        """The latents that a graph saves."""
        return self.read(self.run(graph)[graph.saver])

    def read(self, output: Any) -> torch.Tensor:
        """What a node has saved as its output."""
        saved = output["latents"][0]
        return load_file(self.output / saved["subfolder"] / saved["filename"])["latent_tensor"]

    def state(self) -> dict[str, Any]:
        """Hooks and weights of the probe's models, with everything unloaded."""
        found: dict[str, Any] = self.call("/klora-probe/state")
        return found

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The weights of one of the probe's models by their paths."""
        found: dict[str, list[int]] = self.call("/klora-probe/shapes", kind=kind)
        return {name: tuple(shape) for name, shape in found.items()}


def find_comfyui(data: Path, flags: tuple[str, ...] = ()) -> ComfyServer | str:
    """A server for the checkout that the environment names, or why there is none."""
    if not os.environ.get(ROOT):
        return f"{ROOT} is not set"
    root = Path(os.environ[ROOT])
    given = os.environ.get("KLORA_COMFYUI_PYTHON")
    places = [Path(given)] if given else [root / name / "bin" / "python" for name in (".venv", "venv")]
    python = next((place for place in places if place.exists()), None)
    if not (root / "main.py").exists() or python is None:
        return f"{root} is no ComfyUI with a virtual environment"
    return ComfyServer(root, python, data, flags)

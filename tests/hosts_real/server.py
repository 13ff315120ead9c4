"""A real WebUI as a subprocess, with this extension and the probe in a data folder of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from klora.webui.infotext import PASTERS
from tests.hosts_real.checkpoints import Checkpoint, read_checkpoint, write_loras, write_sdxl_loras

REPOSITORY = Path(__file__).parents[2]
FLAGS = (
    "--api --skip-prepare-environment --skip-torch-cuda-test --skip-version-check --skip-python-version-check"
    " --skip-install --loglevel INFO"
)
NO_DOWNLOADS = "--no-download-sd-model --do-not-download-clip"
# An unknown flag ends a host: each has those it knows. The last takes the folder of checkpoints.
FLAGS_OF = {
    "a1111": f"{NO_DOWNLOADS} --use-cpu all --no-half --no-half-vae --precision full --ckpt-dir",
    "forge": f"{NO_DOWNLOADS} --always-cpu --skip-google-blockly --ckpt-dir",
    "neo": "--cpu --ckpt-dirs",
    "reforge": f"{NO_DOWNLOADS} --always-cpu --ckpt-dir",
    "classic": "--no-download-sd-model --always-cpu --ckpt-dir",
}
STEPS = {"a1111": 6}
HOSTS = tuple(FLAGS_OF)
PROMPT = "a photo of a dog in the snow"
_WHOLE = {"seed": "Seed", "steps": "Steps", "width": "Size-1", "height": "Size-2"}
"""What the hosts call whole numbers of a request in a picture's text."""


class ApiError(Exception):
    """An answer of the host that is no success."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


@dataclass
class Picture:
    """What a generation gave: the pictures' pixels, (height, width, 3), and the host's own account."""

    all: list[np.ndarray[Any, Any]]
    encoded: list[str]
    info: dict[str, Any]
    comments: str

    @property
    def pixels(self) -> np.ndarray[Any, Any]:
        return self.all[0]

    @property
    def infotext(self) -> str:
        return self.info["infotexts"][0]

    def only(self, index: int) -> Picture:
        """One of the pictures, with the account of all."""
        return Picture(self.all[index : index + 1], self.encoded[index : index + 1], self.info, self.comments)

    def same(self, other: Picture) -> bool:
        """True where every picture has the very same pixels."""
        return len(self.all) == len(other.all) and all(map(np.array_equal, self.all, other.all))

    def distance(self, other: Picture) -> int:
        """The largest difference of any two pixels, of 255."""
        assert len(self.all) == len(other.all)
        return max(int(abs(a.astype(int) - b).max()) for a, b in zip(self.all, other.all, strict=True))


@dataclass
class Server:
    """One running host. `kind` is one of HOSTS."""

    kind: str
    root: Path
    python: Path
    data: Path
    model: Checkpoint
    other_model: Checkpoint | None
    sdxl_model: Checkpoint | None
    extra_flags: str = ""
    with_klora: bool = True
    port: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)
    made: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.data / "host.log").read_text(errors="replace")

    def is_alive(self, patience: float) -> bool:
        """Whether the host answers; one that is about to end has `patience` seconds to do so."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                self.call("/klora-probe/comments")
            except (OSError, ApiError):
                time.sleep(0.5)
            else:
                return True
        return False

    def start(self, timeout: float = 600) -> None:
        """Start the host and wait until it serves."""
        extensions, loras = self.data / "extensions", self.data / "models" / "Lora"
        for folder in (extensions, loras):
            folder.mkdir(parents=True)
        if self.with_klora:
            (extensions / "klora").symlink_to(REPOSITORY)
        for folder in (self.root / "models" / name for name in ("VAE", "text_encoder")):
            if folder.is_dir():
                (self.data / "models" / folder.name).symlink_to(folder)
        (extensions / "klora-probe").symlink_to(Path(__file__).with_name("probe"))
        for path in filter(None, os.environ.get("KLORA_BESIDE", "").split(os.pathsep)):
            (extensions / Path(path).name).symlink_to(path)
        # What the probe's stand-in for a detector takes for its weights.
        (self.data / "models" / "adetailer").mkdir()
        (self.data / "models" / "adetailer" / "stand-in.pt").touch()
        write_loras(loras, self.model)
        if self.sdxl_model is not None:
            write_sdxl_loras(loras, self.sdxl_model)
        (self.data / "config.json").write_text(
            # Other previews and the samples folder would download or write something.
            json.dumps(
                {
                    "sd_model_checkpoint": self.model.path.name,
                    "show_progress_type": "Approx cheap",
                    **_settings_version(self.root),
                }
            )
        )
        self.port = _free_port()
        command = [str(self.python), "launch.py", *FLAGS.split(), "--data-dir", str(self.data)]
        command += ["--port", str(self.port), "--server-name", "127.0.0.1", *self.extra_flags.split()]
        # Where the data lie elsewhere, Gradio 4 denies the page the host's own JavaScript unless it is told.
        command += ["--gradio-allowed-path", str(self.root)]
        command += [*FLAGS_OF[self.kind].split(), str(self.model.path.parent)]
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
        self.wait_started(1, timeout)
        self.defaults = {
            "prompt": PROMPT,
            "negative_prompt": "blurry",
            "seed": 1,
            "cfg_scale": 5,
            "sampler_name": "Euler",
            "scheduler": "Automatic",
            "width": 64,
            "height": 64,
            "steps": STEPS.get(self.kind, 4),
        }

    def wait_started(self, times: int, timeout: float = 600) -> None:
        """Wait until the host has logged that it has started so many times; it dies on a request before that."""
        end = time.monotonic() + timeout
        while self.log.count("Startup time") < times:
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.kind} did not start:\n{self.log[-3000:]}")
            time.sleep(0.3)

    def stop(self) -> None:
        """End the host and everything it started."""
        if self._process is not None:
            end_process(self._process)

    def call(self, path: str, body: Any = None, **query: Any) -> Any:
        """GET, or POST where there is a body; ApiError for any answer but a success."""
        return ask(f"http://127.0.0.1:{self.port}{path}", body, **query)

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
            "hr_scale": 1.5,
            "hr_upscaler": self.upscaler,
            "hr_second_pass_steps": 4,
            "denoising_strength": 0.6,
            # Forge fails without these two.
            "hr_additional_modules": ["Use same choices"],
            "hr_cfg": 5,
        }
        return self.txt2img(tags, **{**hires, **changes})

    def pasted(self, picture: Picture) -> Picture:
        """What comes of a picture's text alone: the prompt, the controls and the rest as the host reads them of it."""
        found = self.call("/sdapi/v1/png-info", {"image": picture.encoded[0]})["parameters"]
        filled = {name: value for name, paste in PASTERS.items() if (value := paste(found)) is not None}
        body = {
            "prompt": found["Prompt"],
            "negative_prompt": found["Negative prompt"],
            "alwayson_scripts": {"K-LoRA": {"args": [filled]}},
            "sampler_name": found["Sampler"],
            "scheduler": found["Schedule type"],
            **{name: int(found[key]) for name, key in _WHOLE.items()},
            "cfg_scale": float(found["CFG scale"]),
        }
        return self._made("txt2img", body)

    def plot(self, axes: list[tuple[str, str]], tags: str = "", **changes: Any) -> Picture:
        """A grid by the host's X/Y/Z plot, its single pictures behind it."""
        scripts = self.call("/sdapi/v1/script-info")
        script = next(one for one in scripts if one["name"] == "x/y/z plot" and not one["is_img2img"])
        args = [arg["value"] for arg in script["args"]]
        labels = [arg["label"] for arg in script["args"]]
        kinds = next(arg["choices"] for arg in script["args"] if arg["choices"] and "Steps" in arg["choices"])
        for i in range(3):
            label, values = axes[i] if i < len(axes) else ("Nothing", "")
            args[3 * i : 3 * i + 3] = [kinds.index(label), values, [one.strip() for one in values.split(",")]]
        args[labels.index("Include Sub Images")] = True
        args[labels.index("Draw legend")] = False
        return self.txt2img(tags, script_name="x/y/z plot", script_args=args, **changes)

    def script(
        self,
        name: str,
        tags: str = "",
        controls: dict[str, Any] | None = None,
        source: Picture | None = None,
        **changes: Any,
    ) -> Picture:
        """Make pictures by a host's script, of a `source` if it is one of img2img; `controls` by label, in any case."""
        wanted = (name, source is not None)
        found = next(one for one in self.call("/sdapi/v1/script-info") if (one["name"], one["is_img2img"]) == wanted)
        values = {label.lower(): value for label, value in (controls or {}).items()}
        args = [values.get((arg["label"] or "").lower(), arg["value"]) for arg in found["args"]]
        changes |= {"script_name": name, "script_args": args}
        return self.txt2img(tags, **changes) if source is None else self.img2img(source, tags, **changes)

    @cached_property
    def upscaler(self) -> str:
        """Latent where the host has it, else the first that it has."""
        modes = [one["name"] for one in self.call("/sdapi/v1/latent-upscale-modes")]
        return "Latent" if "Latent" in modes else self.call("/sdapi/v1/upscalers")[0]["name"]

    def _generate(self, path: str, tags: str, changes: dict[str, Any]) -> Picture:
        body = {**self.defaults, **changes}
        body["prompt"] = f"{body['prompt']} {tags}".strip()
        return self._made(path, body)

    def _made(self, path: str, body: dict[str, Any]) -> Picture:
        self.made += 1
        answer = self.call(f"/sdapi/v1/{path}", body)
        pictures = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in answer["images"]
        ]
        # NaN ends as black, and one black picture is the same as any other.
        assert all(one.any() for one in pictures), f"a black picture: {body['prompt']}"
        comments = "".join(self.call("/klora-probe/comments"))
        return Picture(pictures, answer["images"], json.loads(answer["info"]), comments)

    def options(self, **values: Any) -> None:
        """Change the host's settings."""
        self.call("/sdapi/v1/options", values)

    def state(self) -> dict[str, Any]:
        """What the loaded model is like now."""
        return self.call("/klora-probe/state")

    def hooks(self) -> dict[str, int]:
        """How many hooks there are on the UNet and on the text encoder."""
        found = self.call("/klora-probe/state", hashes=False)
        return {name: found[name]["hooks"] for name in ("unet", "text")}

    def fault(self, kind: str, after: int = 2) -> None:
        """Make a later evaluation of the UNet fail, or end the job there."""
        self.call("/klora-probe/fault", kind=kind, after=after)

    def taus(self, generate: Any) -> list[float]:
        """The τ of every evaluation of a generation."""
        return [tau for _, tau in self.levels(generate)]

    def levels(self, generate: Any) -> list[tuple[float, float]]:
        """The noise level and τ of every evaluation of a generation."""
        self.call("/klora-probe/record")
        generate()
        return [(level, tau) for level, tau in self.call("/klora-probe/recorded")]

    def memory(self) -> float:
        """GB of the machine's memory that the host has; 0 where the system does not tell."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmRSS:")), 0.0)

    def reload_ui(self) -> None:
        """Press "Reload UI" and wait until the host serves again."""
        times = self.log.count("Startup time")
        self.call("/klora-probe/reload")
        self.wait_started(times + 1)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a host that was started in a process group of its own, with everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, body: Any = None, **query: Any) -> Any:
    """GET, or POST where there is a body; ApiError for any answer but a success."""
    if query:
        url += "?" + urllib.parse.urlencode(query)
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ApiError(error.code, error.read().decode(errors="replace")) from None


# Whatever proxy the machine has, the host is here.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_server(kind: str, data: Path) -> Server | str:
    """Give the server that the environment names, or say why there is none."""
    named = os.environ.get(f"KLORA_{kind.upper()}_ROOT")
    if not named:
        return f"KLORA_{kind.upper()}_ROOT names no checkout"
    root = Path(named)
    python = Path(os.environ.get(f"KLORA_{kind.upper()}_PYTHON") or root / "venv" / "bin" / "python")
    if not (root / "launch.py").is_file() or not python.is_file():
        return f"{kind} is not installed: no launch.py or no {python.name} where it is looked for"
    found = [read_checkpoint(path) for path in sorted((root / "models" / "Stable-diffusion").glob("*.safetensors"))]
    sd1 = [one for one in found if one.is_sd1]
    if not sd1:
        return f"{kind} has no SD 1 checkpoint"
    sdxl = next((one for one in found if one.is_sdxl), None)
    flags = os.environ.get(f"KLORA_{kind.upper()}_FLAGS", "")
    return Server(kind, root, python, data, sd1[0], sd1[1] if len(sd1) > 1 else None, sdxl, flags)


def _settings_version(root: Path) -> dict[str, str]:
    """What a host that asks before it takes older settings wants to find in them."""
    code = (root / "modules" / "launch_utils.py").read_text(encoding="utf8")
    found = re.search(r'^VERSION_UID\b.*= "(\w+)"$', code, re.MULTILINE)
    return {"VERSION_UID": found[1]} if found else {}


def _free_port() -> int:
    # Not one that the system gives out: until the host binds it, minutes later, another process may be given the same.
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _environment() -> dict[str, str]:
    # What pytest's own run sets for the tests is not the host's: it has its caches where it always has them.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XDG_CACHE_HOME")}
    return environment | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "PYTHONUNBUFFERED": "1",
        "COMMANDLINE_ARGS": "",
        "no_proxy": "127.0.0.1,localhost",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }

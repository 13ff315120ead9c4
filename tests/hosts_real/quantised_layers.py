"""Run by Forge's own Python, with Forge's checkout as the working folder: one layer of each of its kinds, hooked.

Prints one JSON object: for each kind of layer what was found, or why it could not be tried here.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "packages_3rdparty"), str(Path(__file__).parents[2])]
sys.argv = [sys.argv[0], "--always-cpu"]

import torch

# Forge's initialisation reads the command line and fixes the order of its imports.
from backend import args, operations  # noqa: F401
from backend.operations_gguf import ParameterGGUF, dequantize_tensor
from torch import nn

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.errors import MismatchError
from klora.hosts.webui.forge import ForgeHost
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT, IN = 96, 64


class Block(nn.Module):
    """A UNet with one module, under the name that Forge's models give it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        block: nn.Module = layer
        for name in reversed(["input_blocks", "1", "1", "transformer_blocks", "0", "attn1", "to_q"]):
            block, inner = nn.Module(), block
            block.add_module(name, inner)
        self.model = block


def empty(dtype: torch.dtype, manual_cast: bool, quantised: str | None = None) -> nn.Module:
    with operations.using_forge_operations(
        device="cpu", dtype=dtype, manual_cast_enabled=manual_cast, bnb_dtype=quantised
    ):
        return nn.Linear(IN, OUT)


def plain(dtype: torch.dtype, manual_cast: bool, scaled: bool = False) -> nn.Module:
    layer = empty(dtype, manual_cast)
    state = {"weight": torch.randn(OUT, IN) / 8, "bias": torch.randn(OUT)}
    if scaled:
        state["scale_weight"] = torch.tensor(0.5)
    layer.load_state_dict(state)
    return layer


def gguf_layer(kind: str) -> nn.Module:
    import gguf
    import numpy as np

    quantised = gguf.quants.quantize(
        (torch.randn(OUT, IN) / 8).numpy().astype(np.float32), getattr(gguf.GGMLQuantizationType, kind)
    )
    tensor = type("Tensor", (), {})()
    tensor.tensor_type, tensor.shape, tensor.data = getattr(gguf.GGMLQuantizationType, kind), (IN, OUT), quantised
    with operations.using_forge_operations(
        device="cpu", dtype=torch.float16, manual_cast_enabled=True, bnb_dtype="gguf"
    ):
        layer = nn.Linear(IN, OUT)
    layer.load_state_dict({"weight": ParameterGGUF(tensor)}, strict=False)
    layer.weight.gguf_cls.bake(layer.weight)
    assert dequantize_tensor(layer.weight).shape == (OUT, IN)
    return layer


def nf4(kind: str) -> nn.Module:
    if not operations.bnb_avaliable:
        raise ImportError("bitsandbytes is not installed or does not import here")
    import bitsandbytes

    # Forge quantises on a GPU only; a checkpoint that is quantised already runs anywhere.
    data, state = bitsandbytes.functional.quantize_4bit(torch.randn(OUT, IN).half() / 8, blocksize=64, quant_type=kind)
    layer = empty(torch.float16, True, kind)
    packed = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    layer.load_state_dict({"weight": data, **packed})
    return layer


def bytes_of(layer: nn.Module) -> bytes:
    return layer.weight.data.contiguous().view(torch.uint8).numpy().tobytes()


def sites_of(layer: nn.Module) -> dict[str, Site]:
    unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=Block(layer).model))
    return dict(ForgeHost(SimpleNamespace(is_sd1=True, forge_objects=SimpleNamespace(unet=unet))).sites())


def dora(layer: nn.Module, dtype: torch.dtype, pair: Pair) -> float | str:
    """The error of a DoRA, which depends on the weight, in the same units; or why it is refused."""
    plan = pair.plan(Settings.parse({"policy": "direct", "style_strength": 0}))
    sites = sites_of(layer)
    x, probe = torch.randn(2, 7, IN).to(dtype), torch.eye(IN).to(dtype)
    with torch.inference_mode():
        # What the layer itself takes its weight to be, whatever it is stored as.
        bias = layer(torch.zeros(1, IN, dtype=dtype))
        weight = (layer(probe).double() - bias.double()).T
        wanted = layer(x).double() + x.double() @ pair.subject.modules[NAME].matrix(weight.float()).double().T
        try:
            session = Session(pair, plan, sites)
        except MismatchError as error:
            return str(error)
        with session:
            fused = layer(x)
    return float((fused.double() - wanted).abs().max() / (wanted.abs().max() * torch.finfo(fused.dtype).eps))


def check(layer: nn.Module, dtype: torch.dtype, pair: Pair) -> dict[str, object]:
    """Hook a layer, and compare what it then gives with what it gave and ΔW·x."""
    sites = sites_of(layer)
    session = Session(pair, pair.plan(Settings.parse({"policy": "direct", "style_strength": 0.5})), sites)
    x = torch.randn(2, 7, IN).to(dtype)
    before = bytes_of(layer)
    with torch.inference_mode():
        base = layer(x)
        with session:
            fused = layer(x)
            again = layer(x)
        after = layer(x)
    delta = pair.subject.modules[NAME].matrix() + 0.5 * pair.style.modules[NAME].matrix()
    wanted = base.double() + x.double() @ delta.double().T
    return {
        "class": f"{type(layer).__module__}.{type(layer).__qualname__}",
        "weight": f"{type(layer.weight).__name__} {layer.weight.dtype} as stored {tuple(layer.weight.data.shape)}",
        "output": str(base.dtype),
        # In units of the output's own resolution at its largest value.
        "error": float((fused.double() - wanted).abs().max() / (wanted.abs().max() * torch.finfo(base.dtype).eps)),
        "changed": float((fused.double() - base.double()).abs().max() / base.double().abs().max()),
        "repeatable": torch.equal(fused, again),
        "gone": torch.equal(base, after) and not layer._forward_hooks,
        "weight_untouched": bytes_of(layer) == before,
    }


def online(layer: nn.Module, dtype: torch.dtype, pair: Pair) -> float:
    """The distance between the hook and Forge's own online LoRA, in units of the output's resolution."""
    delta = pair.subject.modules[NAME]
    factors = delta.factors()
    plan = pair.plan(Settings.parse({"policy": "direct", "style_strength": 0}))
    session = Session(pair, plan, sites_of(layer))
    x = torch.randn(2, 7, IN).to(dtype)
    with torch.inference_mode():
        with session:
            ours = layer(x)
        patch = ("lora", (factors.up, factors.down, delta.scale * delta.rank, None, None, None))
        layer.forge_online_loras = {"weight": [(1.0, patch, 1.0, None, None)]}
        theirs = layer(x)
        del layer.forge_online_loras
    return float((ours.double() - theirs.double()).abs().max() / (theirs.abs().max() * torch.finfo(ours.dtype).eps))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    kinds = {
        "fp32": (lambda: plain(single, False), single),
        "fp16": (lambda: plain(half, False), half),
        "bf16": (lambda: plain(brain, False), brain),
        "fp16 computed in fp32": (lambda: plain(half, True), single),
        "fp8 e4m3": (lambda: plain(torch.float8_e4m3fn, True), half),
        "fp8 e5m2": (lambda: plain(torch.float8_e5m2, True), brain),
        "fp8 e4m3 scaled": (lambda: plain(torch.float8_e4m3fn, True, scaled=True), half),
        **{f"GGUF {kind}": (lambda kind=kind: gguf_layer(kind), half) for kind in ("Q4_0", "Q5_0", "Q8_0")},
        "NF4": (lambda: nf4("nf4"), half),
    }
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subject = write_lora(Path(folder) / "subj.safetensors", {NAME: (OUT, IN)}, rank=4, alpha=2.0, seed=1)
        style = write_lora(Path(folder) / "style.safetensors", {NAME: (OUT, IN)}, rank=8, seed=2)
        pair = Pair.open(subject, style, ScoreCache(Path(folder) / "cache"))
        by_weight = write_lora(Path(folder) / "dora.safetensors", {NAME: (OUT, IN)}, family="dora", rank=4, seed=3)
        dora_pair = Pair.open(by_weight, style, ScoreCache(Path(folder) / "cache"))
        for name, (make, dtype) in kinds.items():
            try:
                layer = make()
            except Exception as error:
                found[name] = {"not_run": f"{type(error).__name__}: {error}"}
                continue
            found[name] = check(layer, dtype, pair)
            found[name]["dora"] = dora(layer, dtype, dora_pair)
            # Forge's own way of adding a LoRA to NF4 needs a GPU.
            found[name]["against_online"] = 0.0 if name == "NF4" else online(layer, dtype, pair)
    print(json.dumps(found))


main()

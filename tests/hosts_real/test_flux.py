"""FLUX whose weights are GGUF, in Forge's kin: the picture of a forced side, of both, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.hosts_real.server import Picture, Server

gguf = pytest.importorskip("gguf")
FORCED = "scale=s:alpha=0:beta="
# To a GGUF the host merges LoRAs by quantising anew, which rounds them; asked for this, it adds them as they are.
ONLINE = "Automatic (fp16 LoRA)"


@pytest.fixture(params=["q8_0", "q4_0"])
def flux(server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    files = [path for path in server.model.path.parent.glob("*.gguf") if request.param in path.name.lower()]
    if not files or not server.kind.startswith(("forge", "neo")):
        pytest.skip(f"needs a FLUX GGUF whose name holds {request.param}, and a host that loads it")
    for seed, (name, rank) in enumerate((("flux_subj", 8), ("flux_style", 4)), 1):
        _write_lora(server.data / "models" / "Lora" / f"{name}.safetensors", files[0], rank, seed)
    server.call("/sdapi/v1/refresh-loras", {})
    models = server.data / "models"
    parts = [path.name for name in ("VAE", "text_encoder") for path in (models / name).glob("*.safetensors")]
    server.options(sd_model_checkpoint=files[0].name, forge_additional_modules=parts, forge_unet_storage_dtype=ONLINE)
    try:
        yield server
    finally:
        server.options(
            sd_model_checkpoint=server.model.path.name,
            forge_additional_modules=[],
            forge_unet_storage_dtype="Automatic",
        )


def test_a_flux_gguf(flux: Server) -> None:
    def make(tags: str = "") -> Picture:
        return flux.txt2img(tags, cfg_scale=1, scheduler="Simple")

    plain, before = make(), flux.state()
    subject, style = make("<lora:flux_subj:1>"), make("<lora:flux_style:1>")
    fused = make("<klora:flux_subj:flux_style>")
    assert fused.comments == ""
    assert "K-LoRA subject share" in fused.infotext
    assert min(fused.distance(one) for one in (plain, subject, style)) > 5
    assert make(f"<klora:flux_subj:flux_style:{FORCED}0>").distance(subject) <= 1
    assert make(f"<klora:flux_subj:flux_style:{FORCED}1000000>").distance(style) <= 1
    both = make("<klora:flux_subj:flux_style:policy=direct>")
    assert both.distance(make("<lora:flux_subj:1><lora:flux_style:1>")) <= 1
    assert make().same(plain)
    assert flux.state() == before


def _write_lora(path: Path, model: Path, rank: int, seed: int) -> None:
    """Write a random LoRA for every linear layer of a GGUF's transformer, as kohya names them."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for one in gguf.GGUFReader(model).tensors:
        # What shifts and scales the last norm lies in another order in other programs, and no LoRA is made for it.
        if len(one.shape) == 2 and "final_layer.adaLN" not in one.name:
            columns, rows = map(int, one.shape)
            name = "lora_unet_" + one.name.removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=draw) / columns**0.5
            tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=draw) * 0.3 / rank**0.5
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)

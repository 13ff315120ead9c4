"""What is sampled, held against ComfyUI's own LoRA loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hosts_real.comfyui.graphs import Graph
from tests.hosts_real.comfyui.server import ComfyServer

KINDS = ("sd1", "sdxl", "flux", "qwen")


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two latents differ by less than 1 of 255 of their range."""
    return float((found - expected).abs().max()) * 255 < float(expected.max() - expected.min())


def pair_of(kind: str) -> tuple[str, str]:
    return f"{kind}_subject.safetensors", f"{kind}_style.safetensors"


def bare(kind: str = "sd1", dtype: str = "fp32", **sampler: Any) -> Graph:
    """The model without any LoRA."""
    graph = Graph(kind, dtype)
    return graph.save(graph.sample(graph.model(), **sampler))


def plain(*names: str, kind: str = "sd1", dtype: str = "fp32", **sampler: Any) -> Graph:
    """The host's own loaders, one after another."""
    graph = Graph(kind, dtype)
    model = graph.model()
    for name in names:
        model = graph.lora(model, name)
    return graph.save(graph.sample(model, **sampler))


def fused(kind: str = "sd1", dtype: str = "fp32", sampler: dict[str, Any] | None = None, **values: Any) -> Graph:
    """K-LoRA's node in their place."""
    graph = Graph(kind, dtype)
    return graph.save(graph.sample(graph.klora(graph.model(), *pair_of(kind), **values), **(sampler or {})))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_side_is_its_lora_alone_direct_is_both_and_k_lora_neither(comfyui: ComfyServer, kind: str) -> None:
    without = comfyui.latents(bare(kind))
    subject, style = (comfyui.latents(plain(name, kind=kind)) for name in pair_of(kind))
    both = comfyui.latents(plain(*pair_of(kind), kind=kind))
    assert near(comfyui.latents(fused(kind, share=1.0)), subject)
    assert near(comfyui.latents(fused(kind, policy="direct", subject_strength=0.0)), style)
    assert near(comfyui.latents(fused(kind, policy="direct")), both)
    chosen = comfyui.latents(fused(kind))
    assert all(not near(chosen, other) for other in (without, both))
    assert not near(without, subject)
    assert torch.equal(comfyui.latents(bare(kind)), without)


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_a_forced_side_of_several_is_as_many_loaders(comfyui: ComfyServer, kind: str) -> None:
    subject, style = pair_of(kind)
    theirs = Graph(kind)
    model = theirs.model()
    for name, strength in ((subject, 1.0), (style, 0.5), (subject, -0.3)):
        model = theirs.lora(model, name, strength)
    expected = comfyui.latents(theirs.save(theirs.sample(model)))
    ours = Graph(kind)
    more = ours.side(subject, -0.3, ours.side(style, 0.5))
    model = ours.klora(ours.model(), subject, style, more_subject=more, share=1.0)
    assert near(comfyui.latents(ours.save(ours.sample(model))), expected)
    assert not near(expected, comfyui.latents(fused(kind, share=1.0)))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_other_types_of_weights_are_fused_too(comfyui: ComfyServer, kind: str, dtype: str) -> None:
    # The host's loader rounds what it merges to the weights' type, so that a merge in fp8 is no measure.
    without = comfyui.latents(bare(kind, dtype))
    twice = comfyui.latents(fused(kind, dtype, policy="direct", style_strength=0.0))
    assert near(comfyui.latents(fused(kind, dtype, share=1.0)), twice)
    assert not near(twice, without)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "low vram"])
def test_weights_that_are_made_at_each_call_are_fused_too(comfyui: ComfyServer, dtype: str) -> None:
    if dtype.startswith("Q") and "UnetLoaderGGUF" not in comfyui.call("/object_info"):
        pytest.skip("ComfyUI-GGUF is not among the checkout's custom nodes")
    subject, style = pair_of("flux")
    without = comfyui.latents(bare("flux", dtype))
    # There the host, too, adds a LoRA to what a call makes of a weight.
    plainly, both = (
        comfyui.latents(plain(*names, kind="flux", dtype=dtype)) for names in ((subject,), (subject, style))
    )
    assert near(comfyui.latents(fused("flux", dtype, share=1.0)), plainly)
    assert near(comfyui.latents(fused("flux", dtype, policy="direct")), both)
    assert not near(without, plainly)
    assert not near(both, comfyui.latents(fused("flux", dtype)))
    # What is stored in fewer bits is another model, and an offloaded one is the same.
    assert torch.equal(without, comfyui.latents(bare("flux"))) is (dtype == "low vram")
    assert torch.equal(comfyui.latents(bare("flux", dtype)), without)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "uni_pc", "ddim", "dpm_2", "dpm_fast"])
def test_every_kind_of_sampler(comfyui: ComfyServer, sampler: str) -> None:
    changes = {"sampler_name": sampler, "scheduler": "karras"}
    subject = comfyui.latents(plain(pair_of("sd1")[0], **changes))
    assert near(comfyui.latents(fused(share=1.0, sampler=changes)), subject)


def test_loras_of_other_loaders_act_beside_it_before_and_after(comfyui: ComfyServer) -> None:
    subject, style = pair_of("sd1")
    third = "sd1_all_style.safetensors"
    expected = comfyui.latents(plain(third, subject))
    for before in (True, False):
        graph = Graph()
        model = graph.lora(graph.model(), third) if before else graph.model()
        model = graph.klora(model, subject, style, share=1.0)
        model = model if before else graph.lora(model, third)
        assert near(comfyui.latents(graph.save(graph.sample(model))), expected)


def test_a_dora_acts_with_the_weights_of_the_model(comfyui: ComfyServer) -> None:
    name = "sd1_dora.safetensors"
    graph = Graph()
    model = graph.klora(graph.model(), name, pair_of("sd1")[1], share=1.0)
    assert near(comfyui.latents(graph.save(graph.sample(model))), comfyui.latents(plain(name)))


def test_spellings_of_one_file_give_the_same(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.klora(graph.model(), pair_of("sd1")[0], "sd1_style_peft.safetensors")
    assert torch.equal(comfyui.latents(graph.save(graph.sample(model))), comfyui.latents(fused()))


def test_text_encoder_parts_act_through_the_clip(comfyui: ComfyServer) -> None:
    subject, style = "sd1_text_subject.safetensors", "sd1_text_style.safetensors"

    def encoded(graph: Graph, model: Any, clip: Any) -> Graph:
        positive = graph.node("CLIPTextEncode", clip=clip, text="a photo of a dog in the snow")
        return graph.save(graph.sample(model, positive=positive))

    theirs = Graph()
    model, clip = theirs.model(), theirs.node("ProbeClip")
    for name in (subject, style):
        node = theirs.node("LoraLoader", model=model, clip=clip, lora_name=name, strength_model=1.0, strength_clip=1.0)
        model, clip = node, [node[0], 1]
    ours = Graph()
    node = ours.klora(ours.model(), subject, style, clip=ours.node("ProbeClip"), policy="direct")
    without = Graph()
    direct = without.klora(without.model(), subject, style, policy="direct")
    expected = comfyui.latents(encoded(theirs, model, clip))
    assert near(comfyui.latents(encoded(ours, node, [node[0], 1])), expected)
    assert not near(comfyui.latents(encoded(without, direct, without.node("ProbeClip"))), expected)


@pytest.mark.parametrize("policy", ["composite", "cm-lora", "dynamic", "switch", "ties", "np-lora", "lego"])
def test_every_kind_of_policy(comfyui: ComfyServer, policy: str) -> None:
    made = comfyui.latents(fused(policy=policy))
    assert torch.isfinite(made).all()
    assert not near(made, comfyui.latents(bare()))

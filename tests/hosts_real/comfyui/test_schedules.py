"""Where in sampling a sampler is, whatever part of it it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hosts_real.comfyui.graphs import Graph, Link
from tests.hosts_real.comfyui.server import ComfyServer
from tests.hosts_real.comfyui.test_latents import fused, near, pair_of, plain

STEPS = 8


@pytest.mark.parametrize("scheduler", ["normal", "karras", "sgm_uniform", "beta", "exponential"])
def test_ksamplers_in_a_row_make_what_one_makes(comfyui: ComfyServer, scheduler: str) -> None:
    whole, parts = Graph(), Graph()
    model = whole.klora(whole.model(), *pair_of("sd1"))
    latent = whole.part(model, whole.latent(), 0, STEPS, STEPS, scheduler=scheduler)
    expected = comfyui.latents(whole.save(latent))
    model = parts.klora(parts.model(), *pair_of("sd1"))
    latent = parts.part(model, parts.latent(), 0, 4, STEPS, scheduler=scheduler)
    latent = parts.part(model, latent, 4, STEPS, STEPS, scheduler=scheduler)
    found = comfyui.latents(parts.save(latent))
    assert near(found, expected)
    assert "none of ComfyUI's" not in comfyui.log


def custom(graph: Graph, model: Link, sigmas: Link, latent: Link, noise: bool = True) -> Link:
    """SamplerCustomAdvanced."""
    guider = graph.node("CFGGuider", model=model, positive=graph.condition(1), negative=graph.condition(2), cfg=4.0)
    return graph.node(
        "SamplerCustomAdvanced",
        noise=graph.node("RandomNoise", noise_seed=5) if noise else graph.node("DisableNoise"),
        guider=guider,
        sampler=graph.node("KSamplerSelect", sampler_name="euler"),
        sigmas=sigmas,
        latent_image=latent,
    )


def scheduled(graph: Graph, model: Link, steps: int = STEPS) -> Link:
    return graph.node("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)


def test_split_sigmas_of_custom_samplers_are_parts_of_one_schedule(comfyui: ComfyServer) -> None:
    whole, parts = Graph(), Graph()
    model = whole.klora(whole.model(), *pair_of("sd1"))
    expected = comfyui.latents(whole.save(custom(whole, model, scheduled(whole, model), whole.latent())))
    model = parts.klora(parts.model(), *pair_of("sd1"))
    high = parts.node("SplitSigmas", sigmas=scheduled(parts, model), step=4)
    latent = custom(parts, model, high, parts.latent())
    latent = custom(parts, model, [high[0], 1], latent, noise=False)
    assert near(comfyui.latents(parts.save(latent)), expected)


def test_a_denoise_begins_where_it_lies_in_the_longer_schedule(comfyui: ComfyServer) -> None:
    half = {"denoise": 0.5, "steps": 4}
    # The subject while S(τ) ≤ 1, which is for the first third of the schedule.
    absolute, relative = (
        comfyui.latents(fused(policy="fixed", progress=progress, sampler=half)) for progress in ("absolute", "relative")
    )
    style = comfyui.latents(plain(pair_of("sd1")[1], **half))
    assert near(absolute, style)
    assert not near(relative, style)


def test_a_schedule_that_is_none_of_comfyuis_is_said_to_be_estimated(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.klora(graph.model(), *pair_of("sd1"))
    sigmas = graph.node("ManualSigmas", sigmas="5.0, 4.9, 2.0, 1.9, 0.4, 0.0")
    if "ManualSigmas" not in comfyui.call("/object_info"):
        graph.nodes.pop(sigmas[0])
        # Ends in the middle of a schedule that no scheduler makes.
        whole = graph.node("KarrasScheduler", steps=6, sigma_max=5.0, sigma_min=0.4, rho=3.0)
        sigmas = [graph.node("SplitSigmas", sigmas=whole, step=5)[0], 0]
    comfyui.latents(graph.save(custom(graph, model, sigmas, graph.latent())))
    assert "none of ComfyUI's" in comfyui.log


@pytest.mark.parametrize(
    ("node", "more"),
    [
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
        ("RescaleCFG", {"multiplier": 0.7}),
        ("PerturbedAttentionGuidance", {"scale": 3.0}),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_nodes_that_change_sampling_stand_before_or_after(
    comfyui: ComfyServer, node: str, more: dict[str, Any], first: bool
) -> None:
    ours, theirs = Graph(), Graph()
    model = ours.node(node, model=ours.model(), **more) if first else ours.model()
    model = ours.klora(model, *pair_of("sd1"), share=1.0)
    model = model if first else ours.node(node, model=model, **more)
    expected = theirs.node(node, model=theirs.lora(theirs.model(), pair_of("sd1")[0]), **more)
    found = comfyui.latents(ours.save(ours.sample(model)))
    assert near(found, comfyui.latents(theirs.save(theirs.sample(expected))))


def test_a_shifted_schedule_of_a_flow_is_followed(comfyui: ComfyServer) -> None:
    made = []
    for parts in (1, 2):
        graph = Graph("qwen")
        model = graph.klora(graph.model(), *pair_of("qwen"))
        model = graph.node("ModelSamplingAuraFlow", model=model, shift=3.1)
        latent = graph.latent()
        for part in range(parts):
            step = STEPS // parts
            latent = graph.part(model, latent, part * step, (part + 1) * step, STEPS, scheduler="simple", cfg=2.0)
        made.append(comfyui.latents(graph.save(latent)))
    assert near(*made)
    assert torch.isfinite(made[0]).all()

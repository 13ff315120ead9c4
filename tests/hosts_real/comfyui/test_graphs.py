"""Graphs with more than one sampler, endings, what is kept, and what cannot be fused."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from tests.hosts_real.comfyui.graphs import Graph
from tests.hosts_real.comfyui.server import ComfyServer, PromptError
from tests.hosts_real.comfyui.test_latents import bare, fused, near, pair_of, plain


def test_two_fusions_in_two_branches_of_one_graph_are_what_each_is_alone(comfyui: ComfyServer) -> None:
    subject, style = comfyui.latents(fused(share=1.0)), comfyui.latents(fused(share=0.0))
    graph = Graph()
    model, latent, condition = graph.model(), graph.latent(), graph.condition(1)
    branches = [graph.klora(model, *pair_of("sd1"), share=share) for share in (1.0, 0.0)]
    savers = [graph.save(graph.sample(one, latent, condition)).saver for one in (*branches, model)]
    outputs = comfyui.run(graph)
    found = [comfyui.read(outputs[saver]) for saver in savers]
    assert torch.equal(found[0], subject)
    assert torch.equal(found[1], style)
    assert torch.equal(found[2], comfyui.latents(bare()))


def test_a_branch_called_in_the_midst_of_anothers_sampling_is_left_alone(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.model()
    mixed = graph.node("ProbeMixed", model=graph.klora(model, *pair_of("sd1"), share=1.0), other=model)
    both = comfyui.latents(graph.save(graph.sample(mixed, cfg=1.0)))
    theirs = Graph()
    model = theirs.model()
    lora = theirs.lora(model, pair_of("sd1")[0])
    assert not near(both, comfyui.latents(fused(share=1.0, sampler={"cfg": 1.0})))
    assert not near(both, comfyui.latents(bare(cfg=1.0)))
    del lora


def test_one_model_serves_several_samplers_of_a_graph(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.klora(graph.model(), *pair_of("sd1"))
    first = graph.sample(model)
    second = graph.sample(model, graph.node("LatentUpscaleBy", samples=first, upscale_method="bilinear", scale_by=1.5))
    assert torch.isfinite(comfyui.latents(graph.save(second))).all()
    alone = Graph()
    assert torch.equal(
        comfyui.latents(alone.save(alone.sample(alone.klora(alone.model(), *pair_of("sd1"))))),
        comfyui.latents(fused()),
    )


@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_nothing_is_left_where_sampling_ends_early(comfyui: ComfyServer, kind: str) -> None:
    before = comfyui.latents(bare())
    graph = Graph()
    model = graph.node("ProbeFault", model=graph.klora(graph.model(), *pair_of("sd1")), kind=kind, after=2)
    with pytest.raises(PromptError):
        comfyui.run(graph.save(graph.sample(model)))
    assert not any(state["hooks"] for state in comfyui.state().values())
    assert torch.equal(comfyui.latents(bare()), before)


def test_what_is_unchanged_is_kept_and_a_replaced_file_counts(comfyui: ComfyServer) -> None:
    live = comfyui.loras / "live.safetensors"

    def queue(content: str) -> tuple[list[str], torch.Tensor]:
        shutil.copy(comfyui.loras / content, live.with_suffix(".part"))
        os.replace(live.with_suffix(".part"), live)
        graph = Graph()
        model = graph.klora(graph.model(), live.name, pair_of("sd1")[1], share=1.0)
        latents = comfyui.latents(graph.save(graph.sample(model)))
        return [graph.nodes[node]["class_type"] for node in comfyui.executed], latents

    _, first = queue("sd1_subject.safetensors")
    graph = Graph()
    model = graph.klora(graph.model(), live.name, pair_of("sd1")[1], share=1.0)
    comfyui.run(graph.save(graph.sample(model)))
    assert comfyui.executed == []
    executed, second = queue("sd1_all_subject.safetensors")
    assert "KLora" in executed
    assert "KSampler" in executed
    assert "ProbeModel" not in executed
    assert not near(first, second)
    assert near(second, comfyui.latents(plain("sd1_all_subject.safetensors")))


def test_a_bad_pair_is_named_and_the_queue_goes_on(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.klora(graph.model(), "flux_subject.safetensors", pair_of("sd1")[1])
    with pytest.raises(PromptError, match="flux_subject"):
        comfyui.run(graph.save(graph.sample(model)))
    graph = Graph()
    with pytest.raises(PromptError, match="not_there"):
        comfyui.run(graph.save(graph.sample(graph.klora(graph.model(), "not_there.safetensors", pair_of("sd1")[1]))))
    comfyui.latents(bare())


def test_a_compiled_model_says_why_it_is_not_fused(comfyui: ComfyServer) -> None:
    for first in (True, False):
        graph = Graph()
        compiled = {"backend": "inductor"}
        model = graph.node("TorchCompileModel", model=graph.model(), **compiled) if first else graph.model()
        model = graph.klora(model, *pair_of("sd1"))
        model = model if first else graph.node("TorchCompileModel", model=model, **compiled)
        with pytest.raises(PromptError, match="compiled"):
            comfyui.run(graph.save(graph.sample(model)))


def test_hooks_of_conditionings_patch_weights_beside_it(comfyui: ComfyServer) -> None:
    third = "sd1_all_style.safetensors"
    graph = Graph()
    hooks = graph.node("CreateHookLora", lora_name=third, strength_model=1.0, strength_clip=0.0)
    positive, negative = (
        graph.node(
            "ConditioningSetProperties",
            cond_NEW=graph.condition(seed),
            hooks=hooks,
            strength=1.0,
            set_cond_area="default",
        )
        for seed in (1, 2)
    )
    model = graph.klora(graph.model(), *pair_of("sd1"), share=1.0)
    sampled = graph.node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=graph.latent(),
        seed=5,
        steps=4,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    assert near(comfyui.latents(graph.save(sampled)), comfyui.latents(plain(third, pair_of("sd1")[0])))


def test_map_analysis_and_saved_file(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.klora(graph.model(), *pair_of("sd1"), policy="direct")
    plan = [model[0], 2]
    graph.node("PreviewImage", images=graph.node("KLoraMap", plan=plan, steps=20))
    analysed = graph.node(
        "KLoraAnalyse", subject=pair_of("sd1")[0], style=pair_of("sd1")[1], balance=0.0, policy="k-lora", steps=20
    )
    saved = graph.node("KLoraSave", plan=plan, filename_prefix="loras/fused", rank=0, dtype="float32")
    outputs = comfyui.run(graph)
    assert "contested 128 of 128 modules" in outputs[analysed[0]]["text"][0]
    assert "128 modules" in outputs[saved[0]]["text"][0]
    written = next((comfyui.output / "loras").glob("fused_*.safetensors"))
    shutil.copy(written, comfyui.loras / "fused.safetensors")
    assert near(comfyui.latents(plain("fused.safetensors")), comfyui.latents(plain(*pair_of("sd1"))))


def test_what_acts_and_what_does_nothing_is_in_the_console(comfyui: ComfyServer) -> None:
    graph = Graph()
    model = graph.klora(graph.model(), "sd1_text_subject.safetensors", pair_of("sd1")[1])
    comfyui.latents(graph.save(graph.sample(model)))
    assert "128 of 128 modules contested" in comfyui.log
    assert "does nothing without a clip" in comfyui.log

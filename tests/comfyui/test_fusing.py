"""The main node: what samplers make of the model that it gives, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klora.comfyui.nodes import KLora
from klora.errors import KloraError
from tests.comfyui.conftest import ATTENTION
from tests.comfyui.fake_comfyui import Clip, Guider, InterruptedByUserError, Patcher, Server, sigmas_of
from tests.support.lora_files import write_lora

SIGMAS = sigmas_of(6)
BESIDE = ("clip", "unique_id", "more_subject", "more_style")


def fuse(model: Any, subject: str = "subject", style: str = "style", **given: Any) -> Any:
    """The node's outputs."""
    names = {"subject_strength": 1.0, "style_strength": 1.0, "balance": 0.0, "policy": "k-lora"}
    settings = {name: value for name, value in given.items() if name not in (*names, *BESIDE)}
    first = {name: value for name, value in given.items() if name not in settings}
    files = f"{subject}.safetensors", f"{style}.safetensors"
    return KLora().fuse(model, *files, settings=settings, **{**names, **first})


def sampled(model: Any, sigmas: list[float] = SIGMAS) -> Tensor:
    """What a sampler makes with a model."""
    return Guider(model).sample(sigmas)


def near(found: Tensor, expected: Tensor) -> None:
    """Rounding alone may part the two."""
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def hooks(model: Patcher) -> int:
    """How many hooks are on any module."""
    modules = model.model.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.mark.parametrize(("share", "name"), [(1.0, "subject"), (0.0, "style")])
def test_a_side_that_has_it_all_is_that_lora_alone(model: Patcher, loras: Path, share: float, name: str) -> None:
    alone = sampled(model.lora(loras / f"{name}.safetensors"))
    near(sampled(fuse(model, share=share)[0]), alone)


def test_direct_is_both_loras_at_once_with_their_strengths(model: Patcher, loras: Path) -> None:
    both = model.lora(loras / "subject.safetensors", 0.8).lora(loras / "style.safetensors", 1.2)
    fused = fuse(model, policy="direct", subject_strength=0.8, style_strength=1.2)[0]
    near(sampled(fused), sampled(both))


def test_loras_of_other_loaders_act_beside_it_wherever_they_stand(model: Patcher, loras: Path) -> None:
    path = loras / "text.safetensors"
    before = sampled(fuse(model.lora(path), share=1.0)[0])
    after = sampled(fuse(model, share=1.0)[0].lora(path))
    near(before, after)
    near(before, sampled(model.lora(path).lora(loras / "subject.safetensors")))


def test_nothing_is_left_by_a_picture_an_error_or_an_interrupt(model: Patcher) -> None:
    plain = sampled(model)
    fused, _, _ = fuse(model)
    sampled(fused)
    for error in (InterruptedByUserError(), RuntimeError("out of memory")):

        def end(call: int, error: Exception = error) -> None:
            if call == 3:
                raise error

        with pytest.raises(type(error)):
            Guider(fused).sample(SIGMAS, end)
    assert hooks(model) == 0
    assert torch.equal(sampled(model), plain)


def test_a_schedule_in_two_parts_is_the_schedule_as_one(model: Patcher) -> None:
    fused = fuse(model)[0]
    guider = Guider(fused)
    begun = guider.sample(SIGMAS[:4])
    assert torch.equal(guider.sample(SIGMAS[3:], latents=begun), sampled(fused))
    counted_anew = Guider(fuse(model, progress="relative")[0])
    assert not torch.equal(counted_anew.sample(SIGMAS[3:], latents=begun), sampled(fused))


def test_two_fusions_in_two_branches_are_each_what_they_are_alone(model: Patcher) -> None:
    first, second = fuse(model, share=1.0)[0], fuse(model, share=0.0)[0]
    alone = sampled(first), sampled(second)
    assert torch.equal(sampled(first), alone[0])
    assert torch.equal(sampled(second), alone[1])
    assert not torch.equal(*alone)


def test_a_branch_that_is_called_in_the_midst_of_another_ones_pass_is_left_alone(model: Patcher) -> None:
    fused, plain = fuse(model)[0], model.clone()
    guider = Guider(fused)
    x, t = torch.ones(1, 6, 16), torch.tensor([2.0])
    expected = plain.model.apply_model(x, t, guider.contexts[:1], {})
    seen: list[Tensor] = []
    alone = guider.sample(SIGMAS)
    again = guider.sample(SIGMAS, lambda call: seen.append(plain.model.apply_model(x, t, guider.contexts[:1], {})))
    assert all(torch.equal(found, expected) for found in seen)
    assert torch.equal(again, alone)


def test_so_is_it_where_a_policy_makes_several_forwards(model: Patcher) -> None:
    guider, plain = Guider(fuse(model, policy="composite")[0]), model.clone()
    x, t = torch.ones(1, 6, 16), torch.tensor([2.0])
    expected = plain.model.apply_model(x, t, guider.contexts[:1], {})
    seen: list[Tensor] = []
    guider.sample(SIGMAS, lambda call: seen.append(plain.model.apply_model(x, t, guider.contexts[:1], {})))
    assert all(torch.equal(found, expected) for found in seen)


def test_two_fusions_one_after_another_add_up(model: Patcher, loras: Path) -> None:
    chained = fuse(fuse(model, share=1.0)[0], share=0.0)[0]
    both = model.lora(loras / "subject.safetensors").lora(loras / "style.safetensors")
    near(sampled(chained), sampled(both))


def test_a_policy_of_several_forwards_makes_them(model: Patcher) -> None:
    fused = fuse(model, policy="composite")[0]
    before = model.model.diffusion_model.calls
    sampled(fused)
    assert model.model.diffusion_model.calls - before == 2 * 6
    assert hooks(model) == 0


def test_a_policy_that_measures_looks_at_the_rows_of_the_prompt(model: Patcher) -> None:
    assert torch.isfinite(sampled(fuse(model, policy="dynamic")[0])).all()
    assert hooks(model) == 0


def test_a_call_outside_any_sampler_is_an_error(model: Patcher) -> None:
    fused = fuse(model)[0]
    options = {"wrappers": fused.wrappers}
    with pytest.raises(KloraError, match="no sampler"):
        model.model.apply_model(torch.ones(1, 6, 16), torch.ones(1), torch.ones(1, 5, 768), options)


@pytest.mark.parametrize("how", ["wrapper", "object patch", "in place"])
def test_a_compiled_model_is_refused_before_and_after_the_node(model: Patcher, how: str) -> None:
    def compile_it(patcher: Patcher) -> Patcher:
        patcher = patcher.clone()
        if how == "wrapper":
            patcher.add_wrapper_with_key(
                "apply_model", "torch.compile", lambda executor, *args, **kw: executor(*args, **kw)
            )
        elif how == "object patch":
            compiled = nn.Module()
            compiled._orig_mod = patcher.model.diffusion_model
            patcher.object_patches["diffusion_model"] = compiled
        else:
            patcher.model.diffusion_model._compiled_call_impl = lambda *args: None
        return patcher

    fused = compile_it(fuse(model)[0])
    with pytest.raises(KloraError, match="compiled"):
        sampled(fused)
    with pytest.raises(KloraError, match="compiled"):
        fuse(compile_it(model))
    assert hooks(model) == 0


def test_a_replaced_file_changes_what_a_kept_result_depends_on(loras: Path) -> None:
    def state() -> str:
        return KLora.IS_CHANGED("subject.safetensors", "style.safetensors", policy="k-lora")

    before = state()
    assert state() == before
    shutil.copy(loras / "text.safetensors", loras / "new")
    os.replace(loras / "new", loras / "style.safetensors")
    replaced = state()
    assert replaced != before
    (loras / "style.safetensors").unlink()
    assert state() not in (before, replaced)


def test_text_encoder_parts_go_to_a_clone_of_the_clip(model: Patcher, server: Server) -> None:
    clip = Clip()
    _, patched, _ = fuse(model, subject="text", clip=clip, subject_strength=0.7, unique_id="9")
    assert clip.added == []
    assert [(sorted(patches), strength) for patches, strength in patched.added] == [(["k", "q", "v"], 0.7)]
    assert fuse(model, subject="text", clip=clip, text_encoder="none")[1].added == []
    assert "clip" not in server.shown["9"]


def test_the_text_encoder_s_multiplier_scales_its_part(model: Patcher) -> None:
    _, patched, _ = fuse(model, subject="text", clip=Clip(), subject_strength=0.8, subject_blocks="base=0.5")
    assert [(sorted(patches), strength) for patches, strength in patched.added] == [(["k", "q", "v"], 0.4)]


def test_a_node_says_what_it_does_and_what_does_nothing(model: Patcher, server: Server, loras: Path) -> None:
    fuse(model, subject="text", unique_id="4")
    assert "16 of 16 modules contested" in server.shown["4"]
    assert "text has a text-encoder part, which does nothing without a clip" in server.shown["4"]
    beyond = {**ATTENTION, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16)}
    write_lora(loras / "beyond.safetensors", beyond, seed=1, alpha=4.0)
    fuse(model, style="beyond", unique_id="5")
    assert "\nbeyond.safetensors: 1 of its 17 modules" in server.shown["5"]


def test_a_norm_and_a_bias_of_a_file_are_changed_while_it_samples(model: Patcher, loras: Path) -> None:
    path = "input_blocks.1.1.transformer_blocks.0"
    block = model.model.diffusion_model.get_submodule(path)
    block.norm1, bias = nn.LayerNorm(16).requires_grad_(False), block.attn1.to_q.bias.clone()
    prefix = f"diffusion_model.{path}"
    more = {f"{prefix}.norm1.w_norm": torch.full((16,), 0.5), f"{prefix}.norm1.diff_b": torch.ones(16)}
    attention = next(key for key in load_file(loras / "subject.safetensors") if "down_blocks" in key and "to_q" in key)
    more[f"{attention.partition('.')[0]}.diff_b"] = torch.full((16,), 2.0)
    save_file(load_file(loras / "subject.safetensors") | more, loras / "subject.safetensors")
    fused, seen = fuse(model, policy="direct")[0], []
    hook = block.attn1.to_q.register_forward_hook(lambda *_: seen.append(block.norm1.weight[0].item()))
    plain = sampled(model)
    assert set(seen) == {1.0}
    seen.clear()
    assert not torch.equal(sampled(fused), plain)
    assert set(seen) == {1.5}
    hook.remove()
    assert torch.equal(block.norm1.weight, torch.ones(16))
    assert torch.equal(block.attn1.to_q.bias, bias)


def test_what_a_node_says_of_a_hostile_file_is_text_to_the_page(model: Patcher, server: Server, loras: Path) -> None:
    hostile = '<img src=x onerror="alert(1)">'
    save_file(load_file(loras / "style.safetensors") | {hostile: torch.ones(4)}, loras / f"{hostile}.safetensors")
    fuse(model, style=hostile, unique_id="4")
    assert "<" not in server.shown["4"]
    assert "&lt;img src=x" in server.shown["4"]


def test_a_part_of_a_schedule_that_is_none_of_comfyuis_is_said_to_be_estimated(model: Patcher, server: Server) -> None:
    odd = [3.0, 2.9, 1.0, 0.3, 0.0]
    sampled(fuse(model, unique_id="6")[0], odd)
    assert "none of ComfyUI's" in server.shown["6"]
    sampled(fuse(model, progress="relative", unique_id="7")[0], odd)
    assert "none of ComfyUI's" not in server.shown["7"]
    sampled(fuse(model, unique_id="8")[0], SIGMAS[2:])
    assert "none of ComfyUI's" not in server.shown["8"]


def test_a_pair_that_does_not_fit_the_model_is_an_error(model: Patcher, loras: Path) -> None:
    other = {f"down_blocks.2.attentions.0.transformer_blocks.{n}.attn1.to_q": (64, 64) for n in range(4)}
    for name in ("other_a", "other_b"):
        write_lora(loras / f"{name}.safetensors", other, seed=1, alpha=4.0)
    with pytest.raises(KloraError, match="SD1 model") as error:
        fuse(model, "other_a", "other_b")
    assert str(loras) not in str(error.value)


def test_a_comfyui_that_is_too_old_is_named(model: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Patcher, "add_wrapper_with_key")
    with pytest.raises(KloraError, match="update it"):
        fuse(model)

"""What the nodes take and give, and how ComfyUI finds them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from klora.comfyui.inputs import ELSEWHERE, FIRST, STRENGTHS, rest
from klora.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, KLoraAnalyse, KLoraMap, KLoraSave
from klora.errors import KloraError, SettingsError
from klora.fusion.policies import POLICIES
from klora.lora.file import LoraFile
from klora.settings import Settings, shown_options
from tests.comfyui.fake_comfyui import Patcher
from tests.comfyui.test_fusing import fuse, near, sampled

REPOSITORY = Path(__file__).parents[2]
PAIR = {"subject": "subject.safetensors", "style": "style.safetensors"}


def inputs_of(node: str, kind: str = "required") -> dict[str, Any]:
    return NODE_CLASS_MAPPINGS[node].INPUT_TYPES().get(kind, {})


def defaults_of(node: str) -> dict[str, Any]:
    """What ComfyUI gives a node whose widgets nobody has touched."""
    return {
        name: told.get("default", kind[0] if isinstance(kind, list) else None)
        for name, (kind, told) in inputs_of(node).items()
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING")
    }


def test_each_setting_has_its_widget_once_with_the_settings_own_default_and_choices() -> None:
    main, others = inputs_of("KLora"), inputs_of("KLoraSettings")
    assert {*STRENGTHS, *FIRST} <= main.keys()
    assert set(others) == set(rest())
    assert {*others, *STRENGTHS, *FIRST, *ELSEWHERE} == set(shown_options())
    assert main["policy"][0] == list(POLICIES)
    assert Settings.parse(defaults_of("KLoraSettings")) == Settings()
    for name, (kind, told) in {**main, **others}.items():
        assert told["tooltip"], name
        if kind in ("INT", "FLOAT"):
            assert told["min"] <= told["default"] <= told["max"]


@pytest.mark.parametrize("node", list(NODE_CLASS_MAPPINGS))
def test_every_node_has_a_name_a_place_a_description_and_what_it_is_searched_by(node: str) -> None:
    kind = NODE_CLASS_MAPPINGS[node]
    assert NODE_DISPLAY_NAME_MAPPINGS[node]
    assert kind.CATEGORY.startswith("loaders")
    assert kind.DESCRIPTION
    assert kind.SEARCH_ALIASES
    assert callable(getattr(kind, kind.FUNCTION))
    assert len(kind.RETURN_TYPES) == len(getattr(kind, "RETURN_NAMES", ()))
    assert len(kind.RETURN_TYPES) == len(getattr(kind, "OUTPUT_TOOLTIPS", ()))


def test_menus_list_the_loras_that_comfyui_lists() -> None:
    assert inputs_of("KLora")["subject"][0] == ["style.safetensors", "subject.safetensors", "text.safetensors"]


def test_the_settings_node_gives_what_the_main_node_takes(model: Patcher) -> None:
    values = {**defaults_of("KLoraSettings"), "share": "0.25", "alpha": "2"}
    (settings,) = NODE_CLASS_MAPPINGS["KLoraSettings"]().collect(**values)
    plan = fuse(model, **settings)[2].plan
    assert plan.settings.alpha == 2
    assert plan.share == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("name", ["alpha", "share"])
def test_a_bad_setting_is_named_on_the_node_that_has_it(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        NODE_CLASS_MAPPINGS["KLoraSettings"]().collect(**{**defaults_of("KLoraSettings"), name: "much"})


def test_a_lora_that_is_not_listed_any_more_is_named(model: Patcher) -> None:
    with pytest.raises(KloraError, match=r"gone\.safetensors"):
        fuse(model, subject="gone")


def test_scores_lie_in_comfyuis_user_folder_and_need_no_package_that_it_lacks(
    model: Patcher, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    fuse(model)
    assert list((loras.parent / "user" / "__klora").glob("scores-*"))


@pytest.mark.parametrize("policy", ["k-lora", "direct", "dynamic"])
def test_the_map_of_a_plan_is_an_image(model: Patcher, policy: str) -> None:
    (image,) = KLoraMap().draw(fuse(model, policy=policy)[2], 8)
    assert image.dtype == torch.float32
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert 0 <= float(image.min()) < float(image.max()) <= 1


@pytest.mark.parametrize("with_model", [True, False])
def test_an_analysis_is_text_and_two_images_without_sampling(model: Patcher, with_model: bool) -> None:
    made = KLoraAnalyse().analyse(**PAIR, steps=8, balance=0.0, policy="k-lora", model=model if with_model else None)
    text, selection, overlap = made["result"]
    assert "contested 16 of 16 modules" in text
    assert made["ui"]["text"] == (text,)
    assert selection.shape[3] == overlap.shape[3] == 3
    assert model.model.diffusion_model.calls == 0


def test_pictures_without_matplotlib_are_refused_with_the_cure(model: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fuse(model)[2]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KloraError, match="install it into the Python that runs ComfyUI"):
        KLoraMap().draw(plan, 8)


def test_a_static_fusion_is_saved_as_one_lora_that_does_the_same(model: Patcher, loras: Path) -> None:
    fused, _, plan = fuse(model, policy="direct", subject_strength=0.6)
    told = KLoraSave().save(plan, "loras/fused", 0, "float32")["ui"]["text"][0]
    written = loras.parent / "output" / "loras" / "fused_00001_.safetensors"
    assert "fused_00001_.safetensors" in told
    assert len(LoraFile.open(written).modules) == 16
    near(sampled(model.lora(written)), sampled(fused))


def test_a_fusion_of_files_that_change_norms_is_not_saved_in_part(model: Patcher, loras: Path) -> None:
    path = loras / "subject.safetensors"
    norm = {"lora_unet_input_blocks_1_1_transformer_blocks_0_norm1.w_norm": torch.ones(16)}
    save_file(load_file(path) | norm, path)
    with pytest.raises(KloraError, match="which a merged LoRA would lose"):
        KLoraSave().save(fuse(model, policy="direct")[2], "loras/fused", 0, "float16")
    assert not list(loras.parent.glob("output/**/*.safetensors"))


def test_a_fusion_that_depends_on_the_step_is_not_saved(model: Patcher) -> None:
    with pytest.raises(SettingsError, match="step"):
        KLoraSave().save(fuse(model)[2], "loras/fused", 0, "float16")


def test_comfyui_finds_the_nodes_in_a_folder_of_any_name_and_its_path_is_as_before(tmp_path: Path) -> None:
    clone = tmp_path / "sd-webui-k-lora"
    clone.symlink_to(REPOSITORY)
    script = f"""
import importlib.util, json, sys
before = list(sys.path)
name = {str(clone)!r}.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, {str(clone / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
here = [one for one in sys.modules if one in ("tests", "scripts", "training", "install", "diffusers", "gradio")]
nodes = {{name: module.NODE_DISPLAY_NAME_MAPPINGS[name] for name in module.NODE_CLASS_MAPPINGS}}
print(json.dumps([sys.path == before, here, nodes]))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(found.stdout) == [True, [], NODE_DISPLAY_NAME_MAPPINGS]


def test_the_example_workflow_fits_the_nodes_and_is_in_its_picture_too() -> None:
    written = (REPOSITORY / "workflows" / "k-lora.json").read_text(encoding="utf-8")
    nodes = {node["type"]: node for node in json.loads(written)["nodes"]}
    with Image.open(REPOSITORY / "workflows" / "k-lora.png") as picture:
        assert json.loads(picture.text["workflow"]) == json.loads(written)
    for name in ("KLora", "KLoraMap"):
        both = {**inputs_of(name), **inputs_of(name, "optional")}
        widgets = [
            key for key, (kind, _) in both.items() if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING")
        ]
        sockets = {key: kind for key, (kind, _) in both.items() if key not in widgets}
        assert len(nodes[name]["widgets_values"]) == len(widgets)
        assert {one["name"]: one["type"] for one in nodes[name]["inputs"]} == sockets
        assert [one["type"] for one in nodes[name]["outputs"]] == list(NODE_CLASS_MAPPINGS[name].RETURN_TYPES)


def test_the_install_script_does_no_harm_where_there_is_no_webui(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(REPOSITORY / "install.py")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr

"""The nodes: what ComfyUI shows of each, and what each does.

They are in the older of ComfyUI's two forms, which all of its releases take.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from klora.comfyui.inputs import (
    FIRST,
    STRENGTHS,
    lora_inputs,
    more_inputs,
    read_settings,
    rest,
    setting_inputs,
    side_inputs,
    steps_input,
)
from klora.comfyui.messages import Speaker
from klora.comfyui.pictures import check_drawing, image_tensor
from klora.comfyui.planned import PlannedFusion, clip_of, open_fusion
from klora.comfyui.sides import Listed, find_side, state_of
from klora.hosts.comfyui.compiled import check_not_compiled
from klora.hosts.comfyui.sampling import SampledFusion

PLAN, SETTINGS, SIDE = "KLORA_PLAN", "KLORA_SETTINGS", "KLORA_SIDE"
CATEGORY = "loaders/K-LoRA"


class KLora:
    """Has the model sample with two LoRAs, of which at every step one acts in each module."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Fuses a subject LoRA and a style LoRA without training (K-LoRA): in every module, at every step, the one that"
        " matters more there acts. It takes the place of two LoRA loaders."
    )
    SEARCH_ALIASES = ("klora", "k lora", "fuse loras", "subject and style", "merge loras", "lora loader")
    FUNCTION = "fuse"
    RETURN_TYPES = ("MODEL", "CLIP", PLAN)
    RETURN_NAMES = ("model", "clip", "plan")
    OUTPUT_TOOLTIPS = (
        "the model, for samplers and for other LoRA loaders",
        "the clip with both LoRAs' text-encoder parts",
        "what acts where at which step, for K-LoRA map and Save fused LoRA",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node is given."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "the diffusion model; other LoRA loaders may come before and after"}),
                **lora_inputs(),
                **setting_inputs((*STRENGTHS, *FIRST)),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "the text encoders, for LoRAs that change these too"}),
                "settings": (SETTINGS, {"tooltip": "from K-LoRA settings; without it, all is as in the paper"}),
                **more_inputs(SIDE),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, subject: str, style: str, **others: Any) -> str:  # noqa: N802
        """What a result that is kept depends on, beside the inputs: the files."""
        return state_of(subject, style)

    def fuse(
        self,
        model: Any,
        subject: str,
        style: str,
        clip: Any = None,
        settings: dict[str, Any] | None = None,
        more_subject: Listed = (),
        more_style: Listed = (),
        unique_id: str | None = None,
        **values: Any,
    ) -> tuple[Any, Any, PlannedFusion]:
        """The model and the clip in which the pair acts, and its plan; KloraError where it cannot act."""
        check_not_compiled(model)
        sides = find_side(subject, more_subject), find_side(style, more_style)
        fusion = open_fusion(*sides, read_settings(values, settings), model)
        clip, unheard = clip_of(fusion, clip)
        speaker = Speaker(unique_id)
        speaker.tell([fusion.in_short()])
        for line in (*fusion.warnings(), *unheard):
            speaker.warn(line)
        return SampledFusion(fusion.pair, fusion.plan, speaker.warn).on(model), clip, fusion


class KLoraSide:
    """One more LoRA for a side."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a LoRA to the subject or the style, which then is the weighted sum of several. For still more, put one of"
        " these nodes after another."
    )
    SEARCH_ALIASES = ("klora side", "lora stack", "several loras", "weighted loras")
    FUNCTION = "add"
    RETURN_TYPES = (SIDE,)
    RETURN_NAMES = ("side",)
    OUTPUT_TOOLTIPS = ("for more_subject or more_style of K-LoRA and K-LoRA analyse",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node is given."""
        return {
            "required": side_inputs(),
            "optional": {"more": (SIDE, {"tooltip": "from another K-LoRA side: LoRAs that are added too"})},
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **others: Any) -> str:  # noqa: N802
        """What a result that is kept depends on, beside the inputs: the file."""
        return state_of(lora)

    def add(self, lora: str, weight: float, more: Listed = ()) -> tuple[Listed]:
        """The LoRAs that come in, and this one behind them."""
        return ((*more, (lora, weight)),)


class KLoraSettings:
    """All that the main node does not ask for."""

    CATEGORY = CATEGORY
    DESCRIPTION = "The rest of K-LoRA's settings. What is auto is as in the paper, for the model at hand."
    SEARCH_ALIASES = ("klora settings", "k lora options")
    FUNCTION = "collect"
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    OUTPUT_TOOLTIPS = ("for K-LoRA and K-LoRA analyse",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node is given."""
        return {"required": setting_inputs(rest())}

    def collect(self, **values: Any) -> tuple[dict[str, Any]]:
        """The settings by name; SettingsError for a bad one."""
        read_settings(values)
        return (values,)


class KLoraMap:
    """Draws which LoRA acts where at which step."""

    CATEGORY = CATEGORY
    DESCRIPTION = "The selection map: which LoRA acts in which module at which step, and how clear each case is."
    SEARCH_ALIASES = ("klora map", "selection map", "k lora plot")
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("for Preview Image or Save Image",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node is given."""
        return {"required": {"plan": (PLAN, {"tooltip": "from K-LoRA"}), **steps_input()}}

    def draw(self, plan: PlannedFusion, steps: int) -> tuple[Tensor]:
        """The map as an IMAGE; KloraError without matplotlib."""
        return (_map(plan, steps),)


class KLoraAnalyse:
    """Says what a pair would do, without sampling."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "What a pair of LoRAs would do, in words and pictures, without sampling. With a model, modules go by its names;"
        " without one, by those of the files."
    )
    SEARCH_ALIASES = ("klora analyse", "klora analyze", "compare loras", "lora overlap")
    FUNCTION = "analyse"
    RETURN_TYPES = ("STRING", "IMAGE", "IMAGE")
    RETURN_NAMES = ("text", "map", "overlap")
    OUTPUT_TOOLTIPS = ("the summary", "which LoRA would act where", "where the two are in each other's way")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node is given."""
        return {
            "required": {**lora_inputs(), **setting_inputs(FIRST), **steps_input()},
            "optional": {
                "model": ("MODEL", {"tooltip": "the model that the files are for"}),
                "settings": (SETTINGS, {"tooltip": "from K-LoRA settings"}),
                **more_inputs(SIDE),
            },
        }

    @classmethod
    def IS_CHANGED(cls, subject: str, style: str, **others: Any) -> str:  # noqa: N802
        """What a result that is kept depends on, beside the inputs: the files."""
        return state_of(subject, style)

    def analyse(
        self,
        subject: str,
        style: str,
        steps: int,
        model: Any = None,
        settings: dict[str, Any] | None = None,
        more_subject: Listed = (),
        more_style: Listed = (),
        **values: Any,
    ) -> dict[str, Any]:
        """The summary and two pictures; KloraError where the files do not go together, or without matplotlib."""
        from klora.report.overlap import overlap_of
        from klora.report.overlap_picture import overlap_picture
        from klora.report.summary import summarise

        check_drawing()
        sides = find_side(subject, more_subject), find_side(style, more_style)
        fusion = open_fusion(*sides, read_settings(values, settings), model)
        plan = fusion.with_steps(steps)
        overlap = overlap_of(fusion.pair, plan)
        text = "\n".join([summarise(fusion.pair, plan, overlap), *fusion.warnings()])
        pictures = (_map(fusion, steps), image_tensor(overlap_picture(overlap, fusion.title)))
        return {"ui": {"text": (text,)}, "result": (text, *pictures)}


class KLoraSave:
    """Writes a fusion that is the same at every step as one LoRA."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Writes the fusion as one LoRA file into ComfyUI's output folder, where the policy is the same at every step:"
        " direct, np-lora, lego, ties and others."
    )
    SEARCH_ALIASES = ("save merged lora", "merge loras", "klora merge", "export lora")
    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node is given."""
        return {
            "required": {
                "plan": (PLAN, {"tooltip": "from K-LoRA, with a static policy"}),
                "filename_prefix": ("STRING", {"default": "loras/fused", "tooltip": "in the output folder"}),
                "rank": (
                    "INT",
                    {"default": 0, "min": 0, "max": 4096, "tooltip": "rank that modules are cut to by SVD; 0: not cut"},
                ),
                "dtype": (["float16", "bfloat16", "float32"], {"tooltip": "type of the numbers in the file"}),
            }
        }

    def save(self, plan: PlannedFusion, filename_prefix: str, rank: int, dtype: str) -> dict[str, Any]:
        """Write the file; KloraError for a policy that depends on the step, and where nothing can be written."""
        from klora.comfyui.saving import save_fused

        return {"ui": {"text": (save_fused(plan, filename_prefix, rank or None, dtype),)}}


def _map(fusion: PlannedFusion, steps: int) -> Tensor:
    check_drawing()
    from klora.report.picture import selection_map

    return image_tensor(selection_map(fusion.with_steps(steps), fusion.title))


NODE_CLASS_MAPPINGS = {
    "KLora": KLora,
    "KLoraSide": KLoraSide,
    "KLoraSettings": KLoraSettings,
    "KLoraMap": KLoraMap,
    "KLoraAnalyse": KLoraAnalyse,
    "KLoraSave": KLoraSave,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "KLora": "K-LoRA",
    "KLoraSide": "K-LoRA side",
    "KLoraSettings": "K-LoRA settings",
    "KLoraMap": "K-LoRA map",
    "KLoraAnalyse": "K-LoRA analyse",
    "KLoraSave": "Save fused LoRA",
}

"""A fusion that is the same at every step, written into ComfyUI's output folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from klora.comfyui.planned import PlannedFusion
from klora.comfyui.sides import open_pair
from klora.errors import named_by
from klora.merge import fused_file, merge
from klora.report.files import OutputFile


def save_fused(fusion: PlannedFusion, prefix: str, rank: int | None, dtype: str) -> str:
    """Write the fusion as one LoRA, numbered as ComfyUI numbers its files, and say where it is.

    Raises SettingsError for a policy that depends on the step, KloraError where nothing can be made or written.
    """
    # Files hold names that other programs read, and not those of the model at hand.
    with named_by(*fusion.files):
        pair = open_pair(*fusion.sides)
        made, plan = merge(pair, fusion.settings, rank)
    paths = importlib.import_module("folder_paths")
    folder, name, counter, subfolder, _ = paths.get_save_image_path(prefix, paths.get_output_directory())
    file = f"{name}_{counter:05}_.safetensors"
    OutputFile.check(Path(folder) / file).write(fused_file(pair, fusion.settings, made, getattr(torch, dtype)))
    return (
        f"{Path(subfolder) / file}: {len(made.deltas)} modules, rank {made.rank}, by {plan.policy.title};"
        f" {made.lost_share:.2%} of the energy lost; move it to a folder of LoRAs to load it"
    )

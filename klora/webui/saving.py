"""A fusion that is the same at every step, saved as one LoRA among those that the host lists."""

from __future__ import annotations

import importlib
from pathlib import Path

from klora.errors import KloraError, named_by
from klora.webui.args import NONE, FusionRequest

_LONGEST = 120
"""Bytes of a name: file systems count these, and a letter may be several."""
_ENDINGS = (".safetensors", ".ckpt", ".pt")


def save(request: FusionRequest, name: str) -> str:
    """Write the fusion into the host's folder of LoRAs, list it, and say so.

    Raises SettingsError for a policy that depends on the step, KloraError for a name that is taken or no file's, and
    where nothing can be made or written.
    """
    import torch

    from klora.hosts.webui.lora_library import Library
    from klora.merge import check_static, fused_file, merge
    from klora.webui.sides import find_side, open_pair

    check_static(request.settings)
    path = _free_path(name)
    names = Library()
    sides = find_side(request.subject, "subject", names), find_side(request.style, "style", names)
    with named_by(*(one.lora.path for side in sides for one in side)):
        # Files hold names that other programs read, and not those of the model at hand.
        pair = open_pair(*sides)
        made, plan = merge(pair, request.settings)
        data = fused_file(pair, request.settings, made, torch.float16)
    _write_new(path, data)
    names.refresh()
    lost = f"; {made.lost_share:.1%} of the energy lost" if made.lost_share else ""
    return (
        f"{path.stem} is among the LoRAs now: {len(made.deltas)} modules, rank {made.rank}, {plan.policy.title}{lost}"
    )


def _free_path(name: str) -> Path:
    name = name.strip()
    for ending in _ENDINGS:
        name = name.removesuffix(ending).strip()
    if not name:
        raise KloraError("the LoRA needs a name; type one")
    if name.startswith(".") or set(name) & set('/\\:*?"<>|') or not name.isprintable():
        raise KloraError(f"{name!r} cannot be a file's name; type one without / \\ : * ? \" < > | or a dot before it")
    if name == NONE:
        raise KloraError(f"{name} stands for no LoRA in the menus; type another name")
    if (size := len(name.encode())) > _LONGEST:
        raise KloraError(f"the name takes {size} bytes, and at most {_LONGEST} are safe; type a shorter one")
    folder = Path(importlib.import_module("modules.shared").cmd_opts.lora_dir)
    for ending in _ENDINGS:
        if (folder / f"{name}{ending}").exists():
            raise KloraError(f"{name}{ending} is there already; type another name")
    return folder / f"{name}.safetensors"


def _write_new(path: Path, data: bytes) -> None:
    """Write a whole file where there is none."""
    from klora.atomic import write_new

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, data)
    except FileExistsError:
        raise KloraError(f"{path.name} is there already; type another name") from None
    except OSError as error:
        raise KloraError(f"{path.name} cannot be written: {error.strerror or error}") from None

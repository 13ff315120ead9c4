"""The diffusers pipeline that SD.Next has loaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from klora.engine.site import Site
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.sdnext.weights import with_plain_weight


def is_pipeline(loaded: Any) -> bool:
    """Whether what a WebUI has loaded is a diffusers pipeline, or holds one."""
    return hasattr(type(pipeline_of(loaded)), "components")


def pipeline_of(loaded: Any) -> Any:
    """The pipeline itself: some models come as an object that holds it."""
    return getattr(loaded, "pipe", None) or loaded


def is_refined(p: Any) -> bool:
    """Whether SD.Next's refiner, a model of its own, takes over at the end of a picture."""
    helpers = importlib.import_module("modules.processing_helpers")
    return bool(helpers.is_refiner_enabled(p))


def own_detail_prompt(p: Any) -> str:
    """The prompt of SD.Next's detailer, a line for each detail, where that does not repeat the picture's own."""
    prompt = str(getattr(p, "detailer_prompt", None) or "") if getattr(p, "detailer_enabled", False) else ""
    return "" if "[prompt]" in prompt.lower() else prompt


def is_detail(p: Any) -> bool:
    """Whether a processing object is SD.Next's copy of another that makes a detail of its picture, and has its text."""
    return bool(getattr(p, "recursion", False))


class SdnextHost(DiffusersHost):
    """A model loaded in SD.Next.

    It makes a pipeline of its own for each task (img2img, hires), all of the same parts: `renew` takes the latest.
    """

    def __init__(self, loaded: Any) -> None:
        """Take what is loaded; KloraError for a pipeline that K-LoRA cannot fuse in."""
        super().__init__(pipeline_of(loaded))
        self._checkpoint = getattr(getattr(loaded, "sd_checkpoint_info", None), "name", None)

    def renew(self, loaded: Any) -> None:
        """Take the pipeline that now stands in the place of the first, with its scheduler."""
        self.pipe = pipeline_of(loaded)

    @property
    def model_name(self) -> str:
        """How messages call the model."""
        name = (
            f"the {self.architecture or ''} checkpoint {self._checkpoint}" if self._checkpoint else super().model_name
        )
        return name.replace("  ", " ")

    def sites(self) -> Mapping[str, Site]:
        """The denoiser's Linear and Conv modules by canonical name."""
        return {name: with_plain_weight(site) for name, site in super().sites().items()}

    def text_sites(self) -> Mapping[str, Site]:
        """The text encoders' Linear modules by canonical name."""
        return {name: with_plain_weight(site) for name, site in super().text_sites().items()}

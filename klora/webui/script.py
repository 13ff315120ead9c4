"""The always-on script: shows the accordion and writes what it says into the prompts as a tag."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from klora.errors import KloraError
from klora.hosts.webui.lora_library import Library
from klora.webui.args import named, truth
from klora.webui.balance_grid import BalanceGrid
from klora.webui.infotext import PASTERS
from klora.webui.injection import PLANS, apply_request, pair_of
from klora.webui.options import defaults, map_always_wanted
from klora.webui.ui import TITLE, Header, build


def make_script() -> type:
    """Make the class that the host instantiates for each tab; needs the host's modules."""
    scripts: Any = importlib.import_module("modules.scripts")

    class KLoraScript(scripts.Script):  # type: ignore[misc]
        """The host's side of the accordion."""

        def title(self) -> str:
            """Name the script; in lower case also for the API."""
            return TITLE

        def show(self, is_img2img: bool) -> Any:
            """Be there in both tabs."""
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[Any]:
            """Mount the accordion."""
            from klora.webui.analysis import analyse

            tab = "img2img" if is_img2img else "txt2img"
            found = build(tab, Library, analyse, defaults(), header_of_the_host())
            self.grid = BalanceGrid(tab, found)
            self.infotext_fields = [(found.args[name], paste) for name, paste in PASTERS.items()]
            self.paste_field_names = list(PASTERS.values())
            return found.inputs

        def after_component(self, component: Any, **kwargs: Any) -> None:
            """Find the controls of the host's X/Y/Z plot, which it makes after ours."""
            if hasattr(self, "grid"):
                self.grid.see(component, kwargs.get("elem_id"))

        def process(self, p: Any, *args: Any) -> None:
            """Write the tag into the prompts, before anything reads them."""
            try:
                apply_request(p, args)
            except KloraError as error:
                from klora.webui.messages import fail

                fail(p, str(error))

        def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
            """Add the selection map to the pictures, where it is wanted."""
            if getattr(p, PLANS, None) and (map_always_wanted() or map_wanted(args)):
                add_maps(p, processed)

    return KLoraScript


def header_of_the_host() -> Header | None:
    """The host's accordion with a checkbox in its header (a class or a function), None where it has none."""
    try:
        return getattr(importlib.import_module("modules.ui_components"), "InputAccordion", None)
    except ImportError:
        return None


def map_wanted(args: Sequence[Any]) -> bool:
    """Whether the arguments ask for the map, whoever asks for the fusion."""
    try:
        return truth("show_map", named(args).get("show_map", False))
    except KloraError:
        return False


def add_maps(p: Any, processed: Any) -> None:
    """Append one picture for each different plan that ran."""
    from klora.webui.analysis import gallery_map, map_text
    from klora.webui.messages import comment

    seen: list[Any] = []
    for plan in getattr(p, PLANS):
        if plan in seen:
            continue
        seen.append(plan)
        try:
            picture = gallery_map(plan, pair_of(p))
        except KloraError as error:
            comment(p, str(error))
            return
        processed.images.append(picture)
        processed.infotexts.append(map_text(plan, pair_of(p)))

"""The always-on script: shows the accordion and writes what it says into the prompts as a tag."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from klora.errors import KloraError
from klora.hosts.webui.lora_library import Library
from klora.webui.args import named, truth
from klora.webui.balance_grid import BalanceGrid
from klora.webui.injection import PLANS, apply_request, pair_of
from klora.webui.judged import Judgement
from klora.webui.messages import hand_on_comments
from klora.webui.options import defaults, map_always_wanted
from klora.webui.paste import FIELDS
from klora.webui.ui import TITLE, build


def make_script() -> type:
    """Make the class that the host instantiates for each tab; needs the host's modules."""
    scripts: Any = importlib.import_module("modules.scripts")

    class KLoraScript(scripts.Script):  # type: ignore[misc]
        """The host's side of the accordion."""

        def __init__(self) -> None:
            super().__init__()
            self.judgement = Judgement()

        def title(self) -> str:
            """Name the script; in lower case also for the API."""
            return TITLE

        def show(self, is_img2img: bool) -> Any:
            """Be there in both tabs."""
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[Any]:
            """Mount the accordion."""
            from klora.webui.analysis import analyse
            from klora.webui.fitting import misfit
            from klora.webui.saving import save

            tab = "img2img" if is_img2img else "txt2img"
            command_line = importlib.import_module("modules.shared").cmd_opts
            queued = not getattr(command_line, "no_gradio_queue", False)
            found = build(tab, Library, analyse, defaults(), misfit, save, queued)
            self.grid = BalanceGrid(tab, found)
            self.infotext_fields = [(found.args[name], paste) for name, paste in FIELDS.items()]
            self.paste_field_names = list(FIELDS.values())
            return found.inputs

        def after_component(self, component: Any, **kwargs: Any) -> None:
            """Find the controls of the host's X/Y/Z plot, which it makes after ours."""
            if hasattr(self, "grid"):
                self.grid.see(component, kwargs.get("elem_id"))

        def process(self, p: Any, *args: Any) -> None:
            """Write the tag into the prompts, before anything reads them."""
            from klora.webui.messages import fail
            from klora.webui.picture_text import begin_job, keep_for_job

            vars(p).pop(PLANS, None)
            begin_job(p)
            try:
                apply_request(p, args)
            except KloraError as error:
                fail(p, str(error))
            keep_for_job(p)

        def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
            """Add the selection map, where it is wanted and nothing takes it for a picture, and what is to be said."""
            if getattr(p, PLANS, None) and not script_runs(p) and (map_always_wanted() or map_wanted(args)):
                add_maps(p, processed)
            self.judgement.take(p, processed)
            hand_on_comments(p, processed)

    return KLoraScript


def map_wanted(args: Sequence[Any]) -> bool:
    """Whether the arguments ask for the map, whoever asks for the fusion."""
    try:
        return truth("show_map", named(args).get("show_map", False))
    except KloraError:
        return False


def script_runs(p: Any) -> bool:
    """Whether a script that a user has chosen (a grid, an upscaler) makes its own of this job's pictures."""
    chosen = next(iter(getattr(p, "script_args", None) or ()), 0)
    return isinstance(chosen, int) and chosen > 0


def add_maps(p: Any, processed: Any) -> None:
    """Show one picture for each different plan that ran, behind the others, or apart from them where the host can."""
    from klora.webui.analysis import gallery_map, map_text
    from klora.webui.messages import comment

    seen: list[Any] = []
    for plan in getattr(p, PLANS):
        if plan not in seen:
            seen.append(plan)
    try:
        maps = [gallery_map(plan, pair_of(p)) for plan in seen]
    except KloraError as error:
        comment(p, str(error))
        return
    # Replaced, never appended to: Forge's list may be one that all jobs share.
    name = "extra_images" if hasattr(processed, "extra_images") else "images"
    setattr(processed, name, [*getattr(processed, name), *maps])
    processed.infotexts = [*processed.infotexts, *(map_text(plan, pair_of(p)) for plan in seen)]

"""Modules that are exchanged for others while a fusion is at work in them: what was fused is not what runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from klora.engine.bypass import Part
from klora.engine.compiled import compiled_regions
from klora.engine.site import Site
from klora.errors import KloraError


class Exchanges:
    """Looks for them, where a host can tell what its sites have become."""

    def __init__(self, model: nn.Module | None, sites_now: Callable[[], Mapping[str, Site]] | None) -> None:
        """Take the model as it is; `sites_now` gives its sites as they have become."""
        self._sites_now = sites_now
        self._modules = _ids(model)

    def look(self, model: nn.Module | None, parts: Mapping[str, Part]) -> None:
        """Look at the sites of `parts` where the model consists of other modules than when this was called last.

        In what is compiled nobody sees which of its modules are called: there it is always looked.
        """
        modules = _ids(model)
        compiled = model is not None and next(compiled_regions(model), None) is not None
        if compiled or modules != self._modules:
            self._modules = modules
            self.check(parts)

    def check(self, parts: Mapping[str, Part]) -> None:
        """KloraError where sites of `parts` lie in other modules now."""
        sites = self._sites_now() if self._sites_now else None
        gone = [] if sites is None else [name for name, part in parts.items() if not part.lies_in(sites.get(name))]
        if gone:
            raise KloraError(
                f"{len(gone)} of the LoRAs' {len(parts)} modules, such as {gone[0]}, were exchanged after the fusion"
                " began; begin it anew"
            )


def _ids(model: nn.Module | None) -> frozenset[int]:
    return frozenset() if model is None else frozenset(map(id, model.modules()))

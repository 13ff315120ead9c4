"""What is said on a node and in the console."""

from __future__ import annotations

import html
import importlib
import logging
from collections.abc import Iterable
from typing import Any

from klora.fusion.scores import OnScored

logger = logging.getLogger("klora")


class Speaker:
    """Says things on one node, by its id, as far as ComfyUI's page shows them, and in the console."""

    def __init__(self, node: str | None) -> None:
        self._node = node
        self._lines: list[str] = []

    def tell(self, lines: Iterable[str]) -> None:
        """Begin anew with what has to be known before sampling."""
        self._lines = []
        for line in lines:
            self._lines.append(line)
            logger.info("K-LoRA: %s", line)
        self._show()

    def warn(self, line: str) -> None:
        """Add a line, once."""
        if line not in self._lines:
            self._lines.append(line)
            logger.warning("K-LoRA: %s", line)
            self._show()

    def _show(self) -> None:
        server: Any = getattr(importlib.import_module("server").PromptServer, "instance", None)
        if self._node is not None and hasattr(server, "send_progress_text"):
            # The page takes it for HTML, and names of files and keys are whatever somebody has written.
            server.send_progress_text(html.escape("\n".join(self._lines), quote=False), self._node)


def scoring_bar() -> OnScored:
    """Moves the bar of the node that is at work, where files have to be scored."""
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(importlib.import_module("comfy.utils").ProgressBar(total))
        bars[0].update_absolute(done, total)

    return show

"""Where ComfyUI looks for this extension's nodes; nothing else imports this file."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).parent)
# ComfyUI imports this folder by its path, as A1111 does while it loads scripts: the package is found for as long.
sys.path.insert(0, _ROOT)
try:
    from klora.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
finally:
    sys.path.remove(_ROOT)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

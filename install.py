"""Adds what the selection map needs and is missing, and touches nothing that is there.

A WebUI runs this before it starts, ComfyUI's manager after it has cloned the extension.
"""

import importlib.util
import subprocess
import sys


def install(package: str) -> None:
    """Install a package as the host at hand does; where that fails, pictures are missing, which the host then says."""
    if importlib.util.find_spec("launch") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", package], check=False)
    else:
        import launch

        launch.run_pip(f"install {package}", f"{package} for K-LoRA's selection map")


for module, package in (("matplotlib", "matplotlib"), ("PIL", "pillow")):
    if importlib.util.find_spec(module) is None:
        install(package)

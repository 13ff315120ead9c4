"""Run by the WebUI before it starts: adds what is missing for the selection map, and touches nothing that is there."""

import importlib.util

import launch

for module, package in (("matplotlib", "matplotlib"), ("PIL", "pillow")):
    if importlib.util.find_spec(module) is None:
        launch.run_pip(f"install {package}", f"{package} for K-LoRA's selection map")

"""ComfyUI as a host: a model between its loader and its samplers."""

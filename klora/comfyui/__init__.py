"""K-LoRA's nodes for ComfyUI."""

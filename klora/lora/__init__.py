"""A LoRA file becomes deltas."""

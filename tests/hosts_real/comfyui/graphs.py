"""Prompts of ComfyUI, as its API takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Link = list[Any]


@dataclass
class Graph:
    """Nodes that sample one of the probe's models; every method adds nodes and gives a link to what they make."""

    kind: str = "sd1"
    dtype: str = "fp32"
    nodes: dict[str, Any] = field(default_factory=dict)
    saver: str = ""

    def node(self, class_type: str, **inputs: Any) -> Link:
        """Add one node; the link is to its first output."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    def model(self) -> Link:
        return self.node("ProbeModel", kind=self.kind, dtype=self.dtype)

    def lora(self, model: Link, name: str, strength: float = 1.0) -> Link:
        return self.node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)

    def klora(self, model: Link, subject: str, style: str, **values: Any) -> Link:
        """K-LoRA, with what belongs to its settings node there."""
        first = {"subject_strength": 1.0, "style_strength": 1.0, "balance": 0.0, "policy": "k-lora"}
        here = (*first, "clip", "more_subject", "more_style")
        settings = {name: value for name, value in values.items() if name not in here}
        inputs: dict[str, Any] = {**first, **{name: value for name, value in values.items() if name in here}}
        if settings:
            inputs["settings"] = self.settings(**settings)
        return self.node("KLora", model=model, subject=subject, style=style, **inputs)

    def side(self, lora: str, weight: float, more: Link | None = None) -> Link:
        """K-LoRA side."""
        return self.node("KLoraSide", lora=lora, weight=weight, **({} if more is None else {"more": more}))

    def settings(self, **values: Any) -> Link:
        """K-LoRA settings with the defaults of all that is not given."""
        from klora.comfyui.inputs import rest
        from klora.settings import Settings

        usual = {name: getattr(Settings(), name) for name in rest()}
        inputs = {name: "auto" if value is None else value for name, value in {**usual, **values}.items()}
        return self.node("KLoraSettings", **inputs)

    def condition(self, seed: int = 1) -> Link:
        return self.node("ProbeConditioning", kind=self.kind, seed=seed)

    def latent(self, size: int = 64) -> Link:
        empty = "EmptyLatentImage" if self.kind in ("sd1", "sdxl") else "EmptySD3LatentImage"
        return self.node(empty, width=size, height=size, batch_size=1)

    def sample(self, model: Link, latent: Link | None = None, positive: Link | None = None, **changes: Any) -> Link:
        """KSampler."""
        inputs = {
            "seed": 5,
            "steps": 4,
            "cfg": 1.0 if self.kind == "flux" else 4.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            **changes,
        }
        return self.node(
            "KSampler",
            model=model,
            positive=positive or self.condition(1),
            negative=self.condition(2),
            latent_image=latent or self.latent(),
            **inputs,
        )

    def part(self, model: Link, latent: Link, start: int, end: int, steps: int = 4, **changes: Any) -> Link:
        """KSampler (Advanced) for some of the steps."""
        inputs = {"cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "noise_seed": 5, **changes}
        return self.node(
            "KSamplerAdvanced",
            model=model,
            add_noise="disable" if start else "enable",
            steps=steps,
            positive=self.condition(1),
            negative=self.condition(2),
            latent_image=latent,
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise="enable" if end < steps else "disable",
            **inputs,
        )

    def save(self, latent: Link) -> Graph:
        """Save latents; what the graph is asked for."""
        self.saver = self.node("SaveLatent", samples=latent, filename_prefix="latents/klora")[0]
        return self

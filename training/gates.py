"""What the set must reach to ship: each gate is a figure of the report and a bound, never loosened for a set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """One demand, with what was measured."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def passed(self) -> bool:
        """Whether the value is on the right side of the bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def line(self) -> str:
        """One line for people."""
        sign = "≤" if self.at_most else "≥"
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.value:.3f} (must be {sign} {self.bound:g})"

    def entry(self) -> dict[str, Any]:
        """What is kept."""
        return {"gate": self.name, "value": self.value, "bound": self.bound, "passed": self.passed}


def base_gates(figures: Mapping[str, float]) -> list[Gate]:
    """The base draws the family that a caption asks for, and a texture where it asks for one."""
    return [Gate(f"base, {axis}", figures[axis], 0.9) for axis in ("family", "surface")]


def judge_gates(figures: Mapping[str, float]) -> list[Gate]:
    """The judge is right on pictures that it has not seen, and silent on spoiled ones."""
    right = [Gate(f"judge, {axis}", figures[f"{axis}_accuracy"], 0.97) for axis in ("subject", "style")]
    kinds = [key for key in figures if key.endswith("_named")]
    return right + [Gate(f"judge, {key.replace('_', ' ')}", figures[key], 0.03, at_most=True) for key in kinds]


def lora_gates(name: str, is_subject: bool, figures: Mapping[str, float]) -> list[Gate]:
    """A LoRA alone: in full, weaker, with half of its modules, and in its half of the time."""
    alone = figures["alone"]
    window = "before half" if is_subject else "after half"
    return [
        Gate(f"{name} alone", alone, 0.9),
        Gate(f"{name} at strength 0.7", figures["strength 0.7"], 0.8),
        Gate(f"{name} at half of the modules, of alone", _share(figures["half of the modules"], alone), 0.8),
        Gate(f"{name} acting only {window}, of alone", _share(figures[window], alone), 0.6),
    ]


def _share(part: float, whole: float) -> float:
    return round(part / whole, 3) if whole else 0.0

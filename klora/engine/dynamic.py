"""Selection by what the LoRAs do to a layer's output, after Dynamic Training-Free Fusion (arXiv 2602.15539).

The normalisation behind the published divergence is not known; this is an interpretation of it:
y = W0·x + b; y_c = y + s_c·(ΔW_c·x + Δb_c); y_s likewise; D = distance(y, y_lora), the mean over tokens; the subject
is active iff D_c ≥ D_s. For KL, p = softmax over the output channels of each token, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.engine.bypass import Part, in_turn, summed, unchanged
from klora.engine.products import Add, Product
from klora.settings import Settings

Distance = Callable[[Tensor, Tensor], Tensor]
"""From features of the base and of one LoRA, both fp32 (tokens, channels), to the divergence of each token."""


def kl(y: Tensor, y_lora: Tensor) -> Tensor:
    """KL(p_base ‖ p_lora), p = softmax over the channels."""
    log_p, log_q = F.log_softmax(y, dim=-1), F.log_softmax(y_lora, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def l2(y: Tensor, y_lora: Tensor) -> Tensor:
    """‖y_lora − y‖₂."""
    distance: Tensor = torch.linalg.vector_norm(y_lora - y, dim=-1)
    return distance


def dot(y: Tensor, y_lora: Tensor) -> Tensor:
    """−⟨y, y_lora⟩: the less alike, the more."""
    return -(y * y_lora).sum(-1)


def cos(y: Tensor, y_lora: Tensor) -> Tensor:
    """1 − cos(y, y_lora)."""
    return 1 - F.cosine_similarity(y, y_lora, dim=-1)


DISTANCES: dict[str, Distance] = {"kl": kl, "l2": l2, "dot": dot, "cos": cos}
AT_ONCE = 64
"""Tokens of which a distance is taken at once: what it needs in between then stays in a processor's cache."""


def divergence(distance: Distance, y: Tensor, shift: Tensor) -> Tensor:
    """D: the mean over tokens of the distance of y + shift from y, both fp32 (tokens, channels); fp32."""
    parts = zip(y.split(AT_ONCE), shift.split(AT_ONCE), strict=True)
    return torch.cat([distance(base, base + moved) for base, moved in parts]).mean()


@dataclass(frozen=True)
class BatchRows:
    """The rows [start, stop) of a batch of `of` that follow the prompt; none of them where start = stop."""

    start: int
    stop: int
    of: int

    def __bool__(self) -> bool:
        return self.stop > self.start

    def within(self, length: int) -> slice:
        """The rows in a tensor of `length` rows: of a multiple of the batch, else all."""
        if not self or length % self.of:
            return slice(0, length)
        return slice(self.start * length // self.of, self.stop * length // self.of)


def subsample(count: int, limit: int, device: torch.device | None = None) -> Tensor:
    """min(count, limit) indices below `count`, evenly spread, always the same."""
    picked = min(count, limit)
    return torch.arange(picked, device=device) * count // max(1, picked)


@dataclass
class Chooser:
    """What all measured modules of a session share: the rule, where sampling is, and what was decided.

    `rows` are the conditional ones of the call under way, None where all are. `decisions` holds (τ, letter) by module.
    """

    distance: Distance
    tokens: int
    reuse: int
    tau: float = 0.0
    step: int = 0
    rows: BatchRows | None = None
    decisions: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    sampling: int = 0
    alone: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Chooser:
        """Take the settings `distance`, `tokens` and `reuse`."""
        return cls(DISTANCES[settings.distance], settings.tokens, settings.reuse)

    def begin(self) -> None:
        """Forget what an earlier sampling pass decided."""
        self.sampling += 1
        self.decisions = {}

    def at(self, tau: float, step: int, alone: bool = False) -> None:
        """Take the position in the schedule, and whether only one LoRA may act there."""
        self.tau, self.step, self.alone = tau, step, alone

    @property
    def sees_condition(self) -> bool:
        """Whether the call under way has rows that follow the prompt."""
        return self.rows is None or bool(self.rows)

    def conditional(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that decide."""
        return tensor[self.rows.within(len(tensor))] if self.rows else tensor


@dataclass(frozen=True)
class Choice:
    """One module's decision: at which step of which sampling pass, and whether conditional rows were looked at.

    `both`: it was a choice between two that could act.
    """

    sampling: int
    step: int
    conditional: bool
    subject: bool
    both: bool = True

    @property
    def letter(self) -> str:
        """As in reports: c subject, s style."""
        return "c" if self.subject else "s"


@dataclass
class MeasuredPart(Part):
    """What may act at one site, of which the hook itself takes one, by what both would do.

    `strengths` is what each would act with. A decision holds for all calls of its step and for `reuse` steps; one made
    without conditional rows, until there are some.
    """

    measured: ClassVar[bool] = True
    chooser: Chooser = field(kw_only=True)
    name: str = field(kw_only=True)
    _choice: Choice | None = None

    def adders(self, device: torch.device, dtype: torch.dtype) -> list[Add]:
        """One, which chooses what it adds."""
        subject, style = self.operands
        if subject is None or style is None:
            raise ValueError("a choice needs two LoRAs")
        sides = ((subject, style), (style, subject))
        chosen: Add | None = None

        def add(x: Tensor, y: Tensor) -> Tensor:
            nonlocal chosen
            before, choice = self._choice, self._choose(x, y, (subject, style))
            if chosen is None or before is not choice:
                (winner, loser), strength = sides[not choice.subject], self.strengths[not choice.subject]
                loser.set_acting(False)
                chosen = winner.adder(device, dtype, strength) if strength else unchanged
                bias = summed(self.biases, (strength, 0.0) if choice.subject else (0.0, strength))
                if bias is not None:
                    chosen = in_turn([chosen, winner.bias_adder(bias, device, dtype)])
            self._note(choice)
            return chosen(x, y)

        return [add]

    def _choose(self, x: Tensor, y: Tensor, operands: tuple[Product, Product]) -> Choice:
        chooser = self.chooser
        both = not chooser.alone
        if self._choice is None or self._choice.both is not both or self._is_over(self._choice):
            # Where only one may act at all, there is nothing to measure.
            subject = self._subject_diverges_more(x, y, operands) if both else not self.strengths[1]
            self._choice = Choice(chooser.sampling, chooser.step, chooser.sees_condition, subject, both)
        return self._choice

    @torch.no_grad()
    def _subject_diverges_more(self, x: Tensor, y: Tensor, operands: tuple[Product, Product]) -> bool:
        """Compare D_c ≥ D_s for a layer's input x and base output y."""
        chooser = self.chooser
        x, y = chooser.conditional(x), chooser.conditional(y)
        take = subsample(operands[0].count(y), chooser.tokens, y.device)
        base = operands[0].base_tokens(y, take)
        D_c, D_s = (
            divergence(chooser.distance, base, _shift(operand.at_tokens(x, y, take, strength), bias, strength))
            for operand, bias, strength in zip(operands, self.biases, self.strengths, strict=True)
        )
        return bool(D_c >= D_s)

    def _is_over(self, choice: Choice) -> bool:
        chooser = self.chooser
        if choice.sampling != chooser.sampling:
            return True
        if not chooser.sees_condition:
            return False
        return not choice.conditional or not 0 <= chooser.step - choice.step < chooser.reuse

    def _note(self, choice: Choice) -> None:
        noted = self.chooser.decisions.setdefault(self.name, [])
        entry = (self.chooser.tau, choice.letter)
        if noted and noted[-1][0] == entry[0]:
            # What acts on the conditional rows is what counts.
            if self.chooser.sees_condition:
                noted[-1] = entry
        else:
            noted.append(entry)


def _shift(change: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    """What a LoRA does at tokens (T, out), its bias included."""
    return change if bias is None else change + strength * bias.to(change.device)

"""A fusion that is the same at every step, as one LoRA: what `klora merge` writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save

from klora import __version__
from klora.errors import KloraError, SettingsError
from klora.fusion.cut import cut
from klora.fusion.entries import EntryMerge, refuse_dora
from klora.fusion.plan import FusionPlan
from klora.fusion.policies import POLICIES
from klora.fusion.policies.base import Active
from klora.fusion.windows import WINDOWS, Windows
from klora.lora.deltas import Delta
from klora.lora.deltas.base import FULL_RANK
from klora.lora.deltas.computed import FactorDelta, low_rank
from klora.lora.spelling import own_prefixes, spelling_for_all
from klora.lora.write import file_tensors
from klora.pair import Pair, side_facts
from klora.settings import Settings


@dataclass
class MergedLora:
    """One LoRA: deltas by canonical name, those of text encoders too; the energy Σ‖ΔW‖_F² and what a cut lost of it."""

    deltas: dict[str, FactorDelta]
    energy: float = 0.0
    lost: float = 0.0

    @property
    def lost_share(self) -> float:
        """The fraction of the energy that was lost."""
        return self.lost / self.energy if self.energy else 0.0

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(delta.rank for delta in self.deltas.values())


def static_policies() -> tuple[str, ...]:
    """The policies that do not depend on the step."""
    return tuple(name for name, policy in POLICIES.items() if policy.static)


def check_static(settings: Settings) -> None:
    """Raise SettingsError where what is active depends on the step, which no file can hold."""
    if not Windows.of(settings).always:
        setting = next(name for name in WINDOWS if name in settings.changed())
        raise SettingsError(
            setting, "a window is a part of the steps of sampling, which one file cannot hold; leave it out"
        )
    policy = POLICIES.get(settings.policy)
    if policy is not None and not policy.static:
        raise SettingsError(
            "policy",
            f"{policy.name} depends on the step of sampling, which one file cannot hold;"
            f" use {', '.join(static_policies())}",
        )


def merge(pair: Pair, settings: Settings, rank: int | None = None) -> tuple[MergedLora, FusionPlan]:
    """The fusion of a pair as one LoRA, and its plan.

    `rank`: what every module is cut to by SVD. Without it, factors stand side by side, exact; a merge of single entries
    has the policy's `merge_rank`, and a LoHa, LoKr or full difference rank 64. Raises SettingsError for a policy that
    depends on the step, MismatchError for DoRA, KloraError where nothing is left.
    """
    check_static(settings)
    plan = pair.plan(dataclasses.replace(settings, merge_rank=0))
    plan.policy.check_model(plan.by_name)
    for file in (pair.subject, pair.style):
        file.check_finite()
    _refuse_beside(pair)
    made = MergedLora({})
    for name in plan.by_name:
        _add(made, name, *_terms(pair, plan, name), rank, settings.merge_rank or None)
    for name, active in pair.text_encoder_active(plan.settings).items():
        sides = (pair.subject.text_encoder.get(name), pair.style.text_encoder.get(name))
        _add(made, name, sides, _strengths(active, plan.settings), rank, None)
    if not made.deltas:
        raise KloraError(f"{plan.policy.name} leaves nothing of this pair at these strengths; raise one of them")
    return made, plan


def _refuse_beside(pair: Pair) -> None:
    """Raise KloraError where a file changes more than weights, which a file of factors does not hold."""
    for lora in pair.loras:
        biases = (delta.key for delta in (*lora.modules.values(), *lora.text_encoder.values()) if delta.bias)
        others = (parameter.key for parameter in lora.parameters.values())
        if beside := next(iter((*biases, *others)), None):
            raise KloraError(
                f"{lora.label}: changes biases or other parameters (such as {beside}), which a merged LoRA would lose;"
                " fuse the two while sampling"
            )


def _terms(pair: Pair, plan: FusionPlan, name: str) -> tuple[tuple[Delta | None, Delta | None], tuple[float, float]]:
    """What acts in a module of the diffusion model for each LoRA, and how much."""
    subject, style = pair.subject.modules.get(name), pair.style.modules.get(name)
    active = plan.decide(name, 0.0)
    if subject is None or style is None or not plan.by_name[name].contested:
        return (subject, style), _strengths(active, plan.settings)
    combined = plan.policy.combine(name, subject, style, plan.by_name[name].weights)
    if plan.policy.folds_strengths:
        return combined, (active.subject, active.style)
    return combined, _strengths(active, plan.settings)


def _strengths(active: Active, settings: Settings) -> tuple[float, float]:
    return active.subject * settings.subject_strength, active.style * settings.style_strength


def _add(
    made: MergedLora,
    name: str,
    sides: Sequence[Delta | None],
    strengths: Sequence[float],
    rank: int | None,
    merge_rank: int | None,
) -> None:
    """Add one module to what is made: the sum of `sides` times `strengths`, where anything of it acts."""
    terms = [(delta, strength) for delta, strength in zip(sides, strengths, strict=True) if delta and strength]
    refuse_dora([delta for delta, _ in terms])
    parts: list[tuple[Delta, float]] = []
    lost = 0.0
    for delta, strength in terms:
        if low_rank(delta) is None:
            nearest = cut(delta, rank or merge_rank or _usual_rank(delta))
            parts.append((nearest.delta, strength))
            lost += strength**2 * nearest.lost
        else:
            parts.append((delta, strength))
    if not parts:
        return
    joined = side_by_side(parts)
    made.energy += energy(joined) + lost
    if rank is not None and joined.rank > rank:
        nearest = cut(joined, rank)
        lost += nearest.lost
        joined = nearest.delta
    made.lost += lost
    made.deltas[name] = joined


def _usual_rank(delta: Delta) -> int:
    return sum(source.rank for source in delta.sources) if isinstance(delta, EntryMerge) else FULL_RANK


def side_by_side(parts: Sequence[tuple[Delta, float]]) -> FactorDelta:
    """Σ strength·ΔW, exact: all units of all `parts`, which have factors, in one delta in the place of the first."""
    ups, downs = [], []
    for delta, strength in parts:
        factors = low_rank(delta)
        if factors is None:
            raise ValueError(f"{delta.key}: a {delta.family} has no factors")
        ups.append(factors[0] * (delta.scale * strength))
        downs.append(factors[1])
    return FactorDelta.like(parts[0][0], torch.cat(ups, dim=1), torch.cat(downs), 1.0)


def energy(delta: FactorDelta) -> float:
    """‖ΔW‖_F², from the factors."""
    up, down = delta.up.double(), delta.down.reshape(delta.rank, -1).double()
    return delta.scale**2 * float(((up.t() @ up) * (down @ down.t())).sum())


def fused_file(
    pair: Pair, settings: Settings, made: MergedLora, dtype: torch.dtype, spelling: str | None = None
) -> bytes:
    """What was made of a pair as the bytes of a file, with `spelling` of `klora.lora.write.file_tensors`.

    Without one it is that which most programs load. Raises KloraError where a value leaves the range of `dtype`.
    """
    kernels, prefixes = pair.subject.kernels | pair.style.kernels, own_prefixes(pair.loras)
    flux, spelling = pair.architecture == "FLUX", spelling or spelling_for_all(pair.loras)
    tensors = file_tensors(made.deltas, spelling, kernels, dtype, flux=flux, prefixes=prefixes)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise KloraError(f"{key}: leaves the range of {str(dtype).removeprefix('torch.')}; use float32")
    return _in_order(save(tensors, _metadata(pair, settings, made)))


def _in_order(data: bytes) -> bytes:
    """The same file with its header in order, for safetensors writes metadata in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[end:]))


def _metadata(pair: Pair, settings: Settings, made: MergedLora) -> dict[str, str]:
    """What made the file; the keys that WebUIs show are those of kohya's trainer."""
    facts = {
        "version": __version__,
        "policy": settings.policy,
        "settings": settings.changed(),
        "subject": side_facts(pair.subject, pair.cache),
        "style": side_facts(pair.style, pair.cache),
        "lost_energy": made.lost_share,
    }
    bases = {file.metadata.get("ss_base_model_version") for file in pair.loras}
    shared = next(iter(bases)) if len(bases) == 1 else None
    return {
        "format": "pt",
        "klora": json.dumps(facts, sort_keys=True),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(made.rank),
        "ss_network_alpha": str(made.rank),
        **({"ss_base_model_version": shared} if shared else {}),
    }

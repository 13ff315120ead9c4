"""The one typed settings model.

Command-line options, Python keywords, JSON and (in a WebUI) controls, tags and API fields all derive from
the fields of `Settings`: a new setting is one new field. Plain dataclasses, because the WebUIs pin
incompatible versions of pydantic.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from klora.errors import SettingsError

AUTO = "auto"


@dataclass(frozen=True)
class Option:
    """What a person may enter for one setting, and how it is explained.

    `kind` is the type of a value; with `optional`, None (written "auto") means "let K-LoRA choose".
    `low` and `high` are inclusive; `above` is an exclusive lower bound. A text that is `free` is taken as it is, on one
    line. What is `hidden` is read but shown nowhere.
    """

    kind: type
    label: str
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    optional: bool = False
    free: bool = False
    hidden: bool = False

    def read(self, name: str, value: Any) -> Any:
        """Turn `value` (typed, or the text of it) into the setting's type; raise SettingsError for anything else."""
        if self.kind is str:
            return self._read_text(name, value)
        text = value.strip().lower() if isinstance(value, str) else value
        if self.optional and (text is None or text in (AUTO, "")):
            return None
        return self._in_range(name, self._read_number(name, text))

    def _read_text(self, name: str, value: Any) -> str:
        if self.free:
            if not isinstance(value, str) or not (value.isprintable() or not value):
                raise SettingsError(name, f"{value!r} is not a line of text")
            return value.strip()
        text = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(text, str) or (self.choices and text not in self.choices):
            near = difflib.get_close_matches(str(text), self.choices, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(name, f"{value!r} is not one of {', '.join(self.choices) or 'the known names'}{hint}")
        return text

    def _read_number(self, name: str, value: Any) -> float | int:
        wanted = "a whole number" if self.kind is int else "a number"
        if self.optional:
            wanted += f" or {AUTO}"
        if isinstance(value, bool) or not isinstance(value, (Real, str)):
            raise SettingsError(name, f"{value!r} is not {wanted}")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise SettingsError(name, f"{value!r} is not {wanted}") from None
        if not math.isfinite(number):
            raise SettingsError(name, f"{value!r} is not a finite number")
        if self.kind is int:
            if number != int(number):
                raise SettingsError(name, f"{value!r} is not {wanted}")
            return int(value) if isinstance(value, Integral) else int(number)
        return number

    def _in_range(self, name: str, number: float | int) -> float | int:
        if self.above is not None and not number > self.above:
            raise SettingsError(name, f"{number:g} must be above {self.above:g}")
        if self.low is not None and number < self.low:
            raise SettingsError(name, f"{number:g} must be at least {self.low:g}")
        if self.high is not None and number > self.high:
            raise SettingsError(name, f"{number:g} must be at most {self.high:g}")
        return number


def _setting(default: Any, label: str, help: str, **rules: Any) -> Any:
    kind = rules.pop("kind", type(default))
    return field(default=default, metadata={"option": Option(kind, label, help, **rules)})


def _part(default: float, label: str, help: str) -> Any:
    """A place in the schedule."""
    return _setting(default, label, help, low=0.0, high=1.0)


_ROLES = (AUTO, "both", "subject", "style", "none")


@dataclass(frozen=True)
class Settings:
    """Everything a user can set about a fusion; `parse` makes one from loose values.

    Fields whose value is None or "auto" are filled in by `resolve`, which needs the model's architecture.
    """

    balance: float = _setting(
        0.0,
        "Balance",
        "one knob for the mix: above 0 favours the style, below 0 the subject; 0: the paper's rule",
        low=-2.0,
        high=2.0,
    )
    share: float | None = _setting(
        None,
        "Subject share",
        "wished fraction of all (module, step) decisions that go to the subject; overrides the balance",
        kind=float,
        low=0.0,
        high=1.0,
        optional=True,
    )
    subject_strength: float = _setting(1.0, "Subject strength", "multiplies the subject LoRA", low=-10.0, high=10.0)
    style_strength: float = _setting(1.0, "Style strength", "multiplies the style LoRA", low=-10.0, high=10.0)
    policy: str = _setting("k-lora", "Policy", "the rule that decides which LoRA is active")
    variant: str = _setting(
        "paper",
        "Variant",
        "follow the paper, or behave like the authors' code where the two differ",
        choices=("paper", "official"),
    )
    scale: str = _setting(
        AUTO,
        "Scale",
        "s grows from subject to style; s* also favours the style at the very start; auto: s* on FLUX, else s",
        choices=(AUTO, "s", "s*"),
    )
    alpha: float | None = _setting(
        None, "α", "how much the scale changes over the steps; auto: 1.5", kind=float, low=0.0, optional=True
    )
    beta: float | None = _setting(
        None,
        "β",
        "where the scale starts; auto: 0.5 for s, 1.3 for s* (1.275 in the official variant)",
        kind=float,
        low=0.0,
        optional=True,
    )
    k: int | None = _setting(
        None,
        "K",
        "how many of the largest entries are compared; auto: the product of both ranks",
        kind=int,
        low=1,
        optional=True,
    )
    gamma: float | None = _setting(
        None,
        "γ",
        "factor that makes two LoRAs of different strength comparable; auto: from the files",
        kind=float,
        above=0.0,
        optional=True,
    )
    scope: str = _setting(
        AUTO,
        "Scope",
        "modules that follow the rule: all of the diffusion model's, its linear ones, or attention only;"
        " auto: all (attention in the official variant)",
        choices=(AUTO, "all", "linear", "attention"),
    )
    other_layers: str = _setting(
        AUTO,
        "Other layers",
        "who acts on modules of both files outside the scope; auto: both (none in the official variant)",
        choices=_ROLES,
    )
    text_encoder: str = _setting(
        AUTO,
        "Text encoder",
        "whose text-encoder part acts; auto: both (none in the official variant and in b-lora)",
        choices=_ROLES,
    )
    unpaired: str = _setting(
        "keep",
        "Modules in one file only",
        "keep: the file that has the module acts there at every step; drop: leave the module out",
        choices=("keep", "drop"),
    )
    progress: str = _setting(
        "absolute",
        "Progress",
        "img2img and hires start at their true place in the schedule (absolute) or at 0 (relative)",
        choices=("absolute", "relative"),
    )
    passes: str = _setting(
        "both",
        "Passes",
        "which of the passes of a hires fix are fused; the other applies the pair as two plain LoRAs",
        choices=("both", "first", "hires"),
    )
    engine: str = _setting(
        AUTO,
        "Engine",
        "how a decision is applied; bypass: the active LoRA's output is added; held: weights with the LoRA in them"
        " stand in where they may and there is room; auto: whichever is faster, module by module",
        choices=(AUTO, "bypass", "held"),
        hidden=True,
    )
    seed: int = _setting(0, "Selection seed", "seed of what a policy draws at random", low=0)
    steps: int = _setting(
        30, "Steps", "steps of an analysis; while sampling, the sampler's own number counts", low=1, high=10_000
    )
    preset: str = _setting(
        "1,1", "Preset", "weights of subject and style, beside the strengths", choices=("1,1", "0.5,0.5", "1/3,2/3")
    )
    period: int = _setting(5, "Period", "steps until the other LoRA's turn comes", low=1, high=10_000)
    gamma_power: int = _setting(
        0, "Power of γ", "0: no γ, as published; 1: γ as in K-LoRA; 2: γ², in keeping with squared norms", low=0, high=2
    )
    mu: float = _setting(
        0.5, "μ", "the subject's part inside the style's row space is divided by 1 + μ", low=0.0, high=1000.0
    )
    distance: str = _setting(
        "kl",
        "Distance",
        "how far a LoRA moves a layer's output: Kullback-Leibler, Euclidean, inner product or cosine",
        choices=("kl", "l2", "dot", "cos"),
    )
    tokens: int = _setting(256, "Tokens", "tokens of a layer's output that are compared", low=1, high=65536)
    reuse: int = _setting(1, "Reuse", "steps for which a decision holds", low=1, high=10_000)
    refresh: int = _setting(3, "Refresh", "steps for which the other LoRA's prediction is kept", low=1, high=10_000)
    style_refs: str = _setting(
        "",
        "Style references",
        "pictures, or a folder of them, that latents are guided towards by CLIP; several with ;",
        free=True,
    )
    subject_refs: str = _setting(
        "",
        "Subject references",
        "pictures, or a folder of them, that latents are guided towards by DINO; several with ;",
        free=True,
    )
    clip_model: str = _setting(
        "openai/clip-vit-base-patch32",
        "CLIP model",
        "folder or hub id of the CLIP that compares with style references",
        free=True,
    )
    dino_model: str = _setting(
        "facebook/dino-vits16",
        "DINO model",
        "folder or hub id of the DINO that compares with subject references",
        free=True,
    )
    style_pull: float = _setting(1.0, "Style pull", "weight of the style references", low=0.0, high=100.0)
    subject_pull: float = _setting(1.0, "Subject pull", "weight of the subject references", low=0.0, high=100.0)
    refine_step: float = _setting(
        1.0, "Guidance step", "how far latents move per step of sampling", low=0.0, high=100.0
    )
    refine_from: float = _setting(0.0, "Guidance from τ", "where reference guidance begins", low=0.0, high=1.0)
    refine_to: float = _setting(1.0, "Guidance to τ", "where reference guidance ends", low=0.0, high=1.0)
    discrepancy: float = _setting(
        0.5,
        "Discrepancy",
        "d of the scale α·τ + 1 − d: how alike the pictures of both LoRAs are, by DINO's cosine;"
        " klora measure-discrepancy measures it",
        low=-1.0,
        high=1.0,
    )
    clusters: int | None = _setting(
        None, "Clusters", "rank of the merged LoRA; auto: the larger of both ranks", kind=int, low=1, optional=True
    )
    density: float | None = _setting(
        None,
        "Density",
        "fraction of each LoRA's entries that is kept; auto: 0.2 by magnitude in ties and knots, else 0.5",
        kind=float,
        above=0.0,
        high=1.0,
        optional=True,
    )
    dare_merge: str = _setting(
        "linear", "DARE's merge", "what is kept is summed, or merged as in ties", choices=("linear", "ties")
    )
    merge_rank: int | None = _setting(
        None,
        "Merge rank",
        "rank that a merge of single entries is cut to by SVD; 0: not cut, as large as the weights;"
        " auto: the sum of both ranks",
        kind=int,
        low=0,
        optional=True,
    )
    subject_from: float = _part(
        0.0, "Subject from", "part of the schedule from which the subject may act; before, the style acts alone"
    )
    subject_to: float = _part(
        1.0, "Subject to", "part of the schedule up to which the subject may act; then the style acts alone"
    )
    style_from: float = _part(
        0.0, "Style from", "part of the schedule from which the style may act; before, the subject acts alone"
    )
    style_to: float = _part(
        1.0, "Style to", "part of the schedule up to which the style may act; then the subject acts alone"
    )
    subject_blocks: str = _setting(
        "",
        "Subject by block",
        "multipliers of the subject by the map's blocks, such as up 1: 0.5, mid: 0; or a vector of LoRA Block Weight",
        free=True,
    )
    style_blocks: str = _setting(
        "",
        "Style by block",
        "multipliers of the style by the map's blocks, such as up 1: 0.5, mid: 0; or a vector of LoRA Block Weight",
        free=True,
    )

    def __post_init__(self) -> None:
        for name, option in options().items():
            object.__setattr__(self, name, option.read(name, getattr(self, name)))
        if self.scale == "s*" and self.alpha == 0:
            raise SettingsError(
                "alpha", "must be above 0 with the scale s*; 0, for the same mix at every step, needs the scale s"
            )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings from loose values, as text or typed; names may be written with dashes.

        Raises SettingsError naming the field, for an unknown name as for an impossible value.
        """
        known = options()
        read = {}
        for raw, value in values.items():
            name = raw.replace("-", "_")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known settings: {', '.join(known)}"
                raise SettingsError(raw if raw.isidentifier() else repr(raw), f"unknown setting; {hint}")
            read[name] = value
        return cls(**read)

    def resolve(self, architecture: str | None, defaults: Mapping[str, str] = MappingProxyType({})) -> Settings:
        """Fill in everything left to K-LoRA, for a model of `architecture` (None: unknown, treated as a UNet).

        `defaults` are what "auto" means to the policy in force, where it differs. What comes back holds no "auto" but
        for `share`, `k`, `gamma` and `engine`, where it stands for a rule.
        """
        official = self.variant == "official"
        usual: dict[str, Any] = {
            "scale": "s*" if architecture == "FLUX" else "s",
            "scope": "attention" if official else "all",
            "other_layers": "none" if official else "both",
            "text_encoder": "none" if official else "both",
            **defaults,
        }
        chosen: dict[str, Any] = {
            name: value if getattr(self, name) == AUTO else getattr(self, name) for name, value in usual.items()
        }
        alpha = 1.5 if self.alpha is None else self.alpha
        default_beta = {"s": 0.5, "s*": 0.85 * alpha if official else 1.3}[chosen["scale"]]
        beta = default_beta if self.beta is None else self.beta
        return dataclasses.replace(self, alpha=alpha, beta=beta, **chosen)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, ready for JSON."""
        return dataclasses.asdict(self)

    def changed(self) -> dict[str, Any]:
        """Only the settings that differ from their defaults, of those that are shown."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default and not f.metadata["option"].hidden
        }


def options() -> dict[str, Option]:
    """Every setting, by name, in the order of the fields."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(Settings)}


def shown_options() -> dict[str, Option]:
    """The settings that interfaces show."""
    return {name: option for name, option in options().items() if not option.hidden}

"""Whether a LoRA file fits another one, and a model."""

from __future__ import annotations

from collections.abc import Mapping

from klora.errors import MismatchError
from klora.lora.deltas.base import size, squeeze
from klora.lora.file import LoraFile
from klora.text import printable


def check_partner(subject: LoraFile, style: LoraFile) -> None:
    """Raise MismatchError when two files are for different models, saying which is which."""
    differ = any(
        ours is not None and theirs is not None and ours != theirs
        for ours, theirs in ((subject.table, style.table), (subject.architecture, style.architecture))
    )
    if subject.modules and style.modules and differ:
        raise MismatchError(
            f"{subject.label} is for {subject.made_for} and {style.label} is for {style.made_for};"
            " choose two LoRAs for the same model"
        )
    for tables in ((subject.modules, style.modules), (subject.text_encoder, style.text_encoder)):
        for name, delta in tables[0].items():
            other = tables[1].get(name)
            if other is not None and other.shape != delta.shape:
                raise MismatchError(
                    f"{subject.label} ({subject.made_for}) has {printable(name)} as {size(delta.shape)}, {style.label}"
                    f" ({style.made_for}) as {size(other.shape)}; choose two LoRAs for the same model"
                )


def check_model(file: LoraFile, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Raise MismatchError when a file does not fit a model, whose weight `shapes` go by canonical name.

    Modules that the model lacks are allowed as long as it has one of them. 1×1 kernels count as (out, in). `model`
    is what to call the model in the message.
    """
    matched = [name for name in file.modules if name in shapes]
    for name in matched:
        theirs = squeeze(tuple(shapes[name]))
        if file.modules[name].shape != theirs:
            raise MismatchError(
                f"{file.label} is for {file.made_for}: its {printable(name)} is {size(file.modules[name].shape)},"
                f" in {model} it is {size(theirs)}; choose a LoRA made for this model"
            )
    if file.modules and not matched:
        example = next(iter(file.modules))
        raise MismatchError(
            f"{file.label} is for {file.made_for}: zero modules matched in {model}, which has no {printable(example)};"
            " choose a LoRA made for this model"
        )


def check_text_encoder(file: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise MismatchError where modules of a file's text encoders have other shapes than in a model, by name."""
    for name, delta in file.text_encoder.items():
        if name in shapes and shapes[name] != delta.shape:
            raise MismatchError(
                f"{file.label}: {delta.key}: its {size(delta.shape)} does not fit the text encoder's"
                f" {size(shapes[name])}; use a LoRA made for this model"
            )

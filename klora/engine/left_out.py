"""What of a pair finds no place in a model, in words for who uses it."""

from __future__ import annotations

from collections.abc import Mapping

from klora.engine.parameters import Models, unheld
from klora.engine.site import Site
from klora.lora.file import LoraFile
from klora.pair import Pair
from klora.text import count_of


def left_out(pair: Pair, sites: Mapping[str, Site], text_sites: Mapping[str, Site], models: Models) -> list[str]:
    """What of each file of a pair, under the names of a model with these sites, does nothing: a line for each cause.

    Without `text_sites` nothing is said of text encoders: the host's own LoRA code applies them, or there are none.
    `models` are those whose parameters the pair's model knows.
    """
    parameters = pair.model.parameters if pair.model else {}
    found = (
        text
        for lora in pair.loras
        for text in (_of_file(lora, sites, text_sites, parameters), _packed(lora, parameters, models))
    )
    return [text for text in found if text]


def _packed(lora: LoraFile, parameters: Mapping[str, object], models: Models) -> str:
    """What of a file's other parameters the model has in a form that shows no values."""
    paths = unheld(models, parameters.keys() & lora.parameters.keys()) if models else ()
    keys = [delta.key for path, delta in lora.parameters.items() if path in paths]
    return f"{lora.label}: {packed(keys[0], len(keys))}" if keys else ""


def packed(example: str, count: int) -> str:
    """That so many changes of parameters are left out, since the model has these in a form that shows no values."""
    of = f"{count_of(count, 'change')} of other parameters (such as {example})"
    return f"{of} left out: the model stores these quantised, or offloads them"


def _of_file(
    lora: LoraFile, sites: Mapping[str, Site], text_sites: Mapping[str, Site], parameters: Mapping[str, object]
) -> str:
    modules = [name for name in lora.modules if name not in sites]
    text = [name for name in lora.text_encoder if text_sites and name not in text_sites]
    others = [delta.key for path, delta in lora.parameters.items() if path not in parameters]
    biases = [name for name, delta in lora.modules.items() if delta.bias and name in sites and not sites[name].has_bias]
    count = len(lora.modules) + len(lora.text_encoder)
    absent = [*modules, *text]
    told = [f"{len(absent)} of its {count} modules (such as {absent[0]})"] if absent else []
    told += [f"{count_of(len(others), 'change')} of other parameters (such as {others[0]})"] if others else []
    told += [f"{count_of(len(biases), 'change')} of biases (such as that of {biases[0]})"] if biases else []
    return f"{lora.label}: {', '.join(told)} found no place in the model and do nothing" if told else ""

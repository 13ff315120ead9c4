"""What is asked of a pipeline: what the command line says of it, and what is left to others."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from klora.commands import options
from klora.commands.generate import add_options
from klora.generation.request import GenerationRequest
from klora.settings import Settings

WORDS = ("--model", "m", "--subject", "dog", "--style", "ink", "--prompt", "a dog", "--out", "folder")
BARE = GenerationRequest("m", "dog", "ink", "a dog", Path("folder"), Settings())


def asked(*words: str) -> GenerationRequest:
    """The request that `klora generate` makes of options."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args([*WORDS, *words])
    return dataclasses.replace(options.read_request(args, Settings()), subject="dog", style="ink")


def test_what_is_not_asked_for_is_left_to_the_pipeline_and_the_machine() -> None:
    assert (BARE.negative_prompt, BARE.size, BARE.guidance) == (None, None, None)
    assert (BARE.device, BARE.dtype) == ("auto", "auto")
    assert (BARE.seed, BARE.images, BARE.map) == (0, 1, False)


def test_the_command_line_leaves_the_same() -> None:
    assert asked() == BARE


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (("--negative-prompt", "blurred"), "negative_prompt", "blurred"),
        (("--seed", "7"), "seed", 7),
        (("--size", "64x32"), "size", (64, 32)),
        (("--guidance", "0"), "guidance", 0.0),
        (("--device", "cpu"), "device", "cpu"),
        (("--dtype", "bfloat16"), "dtype", "bfloat16"),
    ],
)
def test_an_option_changes_its_field_and_no_other(words: tuple[str, ...], field: str, value: object) -> None:
    assert asked(*words) == dataclasses.replace(BARE, **{field: value})


def test_a_request_stays_as_it_is() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BARE.seed = 1  # type: ignore[misc]

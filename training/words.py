"""The captions and the tokenizer that knows their words, each as one token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

from training.drawing.styles import CONTOURS, GROUNDS, INKS, TEXTURES, Style
from training.drawing.subjects import BUILDS, COLOURS, FAMILIES, SHAPES, Subject

SUBJECT_TOKEN = "sbu"
STYLE_TOKEN = "szn"
TEXT_LENGTH = 24
_GLUE = ("a", "and", "with", "on", "in", "style", "contour", "flat", "fancy", SUBJECT_TOKEN, STYLE_TOKEN)
WORDS = list(
    dict.fromkeys(
        word
        for words in (_GLUE, FAMILIES, BUILDS, SHAPES, COLOURS, TEXTURES, INKS, CONTOURS, GROUNDS)
        for word in words
    )
)


def base_caption(subject: Subject, style: Style, ground: str, rng: np.random.Generator) -> str:
    """A caption with parts left out at random.

    A way of drawing is said, unless the picture is flat: what a caption says nothing about is drawn flat, and plain.
    The two tokens stand for what is left unsaid: with them a subject may be fancy, and a surface be drawn in any style.
    """
    if rng.random() < 0.1:
        return ""
    build, colours, on, sbu, szn, said = rng.random(6) < (0.6, 0.75, 0.6, 0.15, 0.2, 0.4)
    plain = style.texture == "flat" and style.contour == "none"
    words = ["a"]
    words += [subject.build, subject.shape] if build and not sbu else []
    words += ["fancy"] if subject.fancy and not sbu else []
    words += [subject.main, "and", subject.second] if colours and not sbu else []
    words += [SUBJECT_TOKEN] if sbu else []
    words += [subject.family]
    words += [style.words()] if (said if plain else not szn) else []
    words += ["on", ground] if on else []
    words += ["in", STYLE_TOKEN, "style"] if szn and not plain else []
    return " ".join(words)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def bpe_tables(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges under which every word is one token.

    Each word is first cut by the merges so far; only what is left becomes new merges. Later merges rank lower, so they
    cannot change how an earlier word is cut.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list(",.-0123456789")
    tokens = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
    tokens = [*list(dict.fromkeys(tokens)), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files to a folder, and load it."""
    vocab, merges = bpe_tables(WORDS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "bos_token": "<|startoftext|>"}
    config |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids of shape (n, TEXT_LENGTH)."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids

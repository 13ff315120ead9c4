"""The cases of a soak: each is one way to use, or to disturb, a host, and says what must come of it."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.hosts_real.server import ApiError, Picture, Server

PAIRS = (
    ("subj", "style"),
    ("subj_te", "style_te"),
    ("subj_all", "style_all"),
    ("subj_te", "style_te_peft"),
    ("style", "subj_te"),
)
SETTINGS = (
    "",
    ":0.8:1.2",
    ":balance=0.7",
    ":share=0.4",
    ":scale=s*",
    ":policy=direct",
    ":policy=fixed",
    ":policy=est",
    ":policy=switch",
    ":text_encoder=style",
    ":variant=official",
    ":scope=attention",
)
BAD = (
    "<klora:subj>",
    "<klora:subj:nobody>",
    "<klora:subj:style:beta=-1>",
    "<klora:subj:style:policy=none>",
    "<klora:subj:../style>",
    "<klora:subj:broken>",
    "<klora:subj:other>",
    "<klora:subj:style:1:2:3>",
)
QUICKEST = "guard_filter_fn"
"""What Neo's accordion of torch.compile calls the way that compiles soonest."""
LIVE = ("live_subj", "live_style")
ORIGINALS = ("subj", "style", "subj_te", "style_te")


class Cases:
    """A host with its files, and the pictures that it gave at first."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._loras = server.data / "models" / "Lora"
        self._expected: dict[str, Picture] = {}
        for name in LIVE:
            self._write(name, "subj_te")

    def tag(self, subject: str, style: str, settings: str = "") -> str:
        """The tag of a pair, or two plain ones where K-LoRA is not there."""
        if self.server.with_klora:
            return f"<klora:{subject}:{style}{settings}>"
        return f"<lora:{subject}:1><lora:{style}:1>"

    def any_tag(self, draw: random.Random) -> str:
        """The tag of some pair."""
        return self.tag(*draw.choice(PAIRS), draw.choice(SETTINGS))

    def expected(self, tags: str) -> Picture:
        """The picture of a tag as it was when it was first made."""
        return self._first(tags, lambda: self.server.txt2img(tags))

    def picture(self, draw: random.Random) -> None:
        """A tag gives the same picture as ever."""
        tags = self.any_tag(draw)
        _same(self.server.txt2img(tags), self.expected(tags))

    def beside(self, draw: random.Random) -> None:
        """Plain LoRAs beside it, of the same files and of others."""
        tags = [self.any_tag(draw), f"<lora:{draw.choice(ORIGINALS)}:{draw.choice((0.5, 1))}>"]
        draw.shuffle(tags)
        self.server.txt2img("".join(tags))

    def bad_tag(self, draw: random.Random) -> None:
        """A bad tag is named, and the picture is the plain one."""
        tags = draw.choice(BAD)
        picture = self.server.txt2img(tags)
        _same(picture, self.expected(""))
        assert not self.server.with_klora or "K-LoRA error" in picture.infotext, f"{tags} is not named"

    def arguments(self, draw: random.Random) -> None:
        """The API's arguments mean what the tag means; bad ones are named."""
        if not self.server.with_klora:
            return
        args: dict[str, Any] = {"subject": "subj", "style": "style"}
        if draw.random() < 0.5:
            picture = self.server.txt2img(alwayson_scripts={"K-LoRA": {"args": [args]}})
            _same(picture, self.expected(self.tag("subj", "style")))
        else:
            args[draw.choice(("style", "beta", "bta"))] = "rubbish"
            picture = self.server.txt2img(alwayson_scripts={"K-LoRA": {"args": [args]}})
            assert "K-LoRA error" in picture.infotext, f"{args} are not named"

    def passes(self, draw: random.Random) -> None:
        """Hires, img2img, batches, AND, long prompts."""
        kind, tags = draw.choice(("hires", "img2img", "batch", "size", "and", "long")), self.any_tag(draw)
        prompt = self.server.defaults["prompt"]
        if kind == "hires":
            self.server.hires(tags, hr_prompt=draw.choice(("", f"{prompt} {self.any_tag(draw)}")))
        elif kind == "img2img":
            self.server.img2img(self.expected(""), tags, denoising_strength=draw.choice((0.4, 0.8, 1)))
        elif kind == "and":
            self.server.txt2img(tags, prompt=f"{prompt} AND a cat :0.5")
        elif kind == "long":
            self.server.txt2img(tags, prompt=prompt + ", snow" * 90)
        else:
            self.server.txt2img(tags, **{"n_iter" if kind == "batch" else "batch_size": 2})

    def ending(self, draw: random.Random) -> None:
        """The job ends early, in the first pass or the second, or fails."""
        kind, tags = draw.choice(("interrupt", "skip", "error", "oom")), self.any_tag(draw)
        make, steps = self.server.txt2img, self.server.defaults["steps"]
        after = draw.randint(1, steps - 1)
        if draw.random() < 0.3:
            make, after = self.server.hires, after + draw.choice((0, steps))
        self.server.fault(kind, after)
        status = 200
        try:
            make(tags)
        except ApiError as error:
            status = error.status
        assert status == (500 if kind in ("error", "oom") else 200), f"{kind} ended with {status}"

    def files(self, draw: random.Random) -> None:
        """A file replaced or written over under its name: the picture is that of the new one."""
        chosen = [draw.choice(ORIGINALS) for _ in LIVE]
        for name, original in zip(LIVE, chosen, strict=True):
            self._write(name, original, in_place=draw.random() < 0.5)
        picture = self.server.txt2img(self.tag(*LIVE))
        if self.server.with_klora:
            _same(picture, self.expected(self.tag(*chosen)))

    def damage(self, draw: random.Random) -> None:
        """A file that is cut off, emptied or gone: the plain picture, and a word about it."""
        if not self.server.with_klora:
            return
        self._damage(draw)
        picture = self.server.txt2img(self.tag(*LIVE))
        _same(picture, self.expected(""))
        assert "K-LoRA error" in picture.infotext, "damage is not named"
        for name in LIVE:
            self._write(name, "subj_te")

    def damage_meanwhile(self, draw: random.Random) -> None:
        """The same, while the picture is made."""
        if not self.server.with_klora:
            return
        damager = threading.Timer(draw.uniform(0, 1.5), self._damage, [draw])
        damager.start()
        self.server.txt2img(self.tag(*LIVE))
        damager.join()
        for name in LIVE:
            self._write(name, draw.choice(ORIGINALS))

    def at_once(self, draw: random.Random) -> None:
        """Several requests at the same time."""
        tags = [self.any_tag(draw) for _ in range(3)] + [""]
        wanted = [self.expected(one) for one in tags]
        with ThreadPoolExecutor(len(tags)) as pool:
            for picture, expected in zip(pool.map(self.server.txt2img, tags), wanted, strict=True):
                _same(picture, expected)

    def grid(self, draw: random.Random) -> None:
        """An X/Y/Z plot."""
        axis = ("[K-LoRA] Balance", "-1, 1") if self.server.with_klora else ("Seed", "1, 2")
        with self._map_wanted(draw) as changes:
            made = self.server.plot([axis], self.any_tag(draw), **changes)
        assert len(made.all) == 3, f"{len(made.all)} pictures of a grid of two"

    def matrix(self, draw: random.Random) -> None:
        """A prompt matrix of one tag: its first cell is the tag's picture, whatever map is wanted."""
        tag = self.any_tag(draw)
        wanted = self.expected(tag)
        with self._map_wanted(draw) as changes:
            made = self.server.script("prompt matrix", f"{tag}|red", **changes)
        assert len(made.all) == 3, f"{len(made.all)} pictures of a matrix of two"
        _same(made.only(1), wanted)

    def prompts(self, draw: random.Random) -> None:
        """Prompts from a text: each picture, and its text, is that of its own prompt."""
        tags = [self.any_tag(draw), "", draw.choice(BAD)]
        draw.shuffle(tags)
        wanted = [self.expected("" if one in BAD else one) for one in tags]
        lines = "\n".join(f"{self.server.defaults['prompt']} {one}".strip() for one in tags)
        with self._map_wanted(draw) as changes:
            made = self.server.script(
                "prompts from file or textbox", "", {"List of prompt inputs": lines}, prompt="", **changes
            )
        assert len(made.all) == len(tags), f"{len(made.all)} pictures of {len(tags)} prompts"
        for i, one in enumerate(tags):
            _same(made.only(i), wanted[i])
            text = made.info["infotexts"][i]
            if self.server.with_klora:
                assert ("K-LoRA error" in text) == (one in BAD), f"{one}: {text}"
                assert ("K-LoRA policy" in text or "K-LoRA variant" in text) == bool(one and one not in BAD), text

    def loopback(self, draw: random.Random) -> None:
        """Pictures of pictures: no map among them, and the same as ever."""
        self._of_a_picture(draw, "loopback", {"Loops": 2})

    def upscale(self, draw: random.Random) -> None:
        """An upscaler of four tiles, or of one where the host enlarges nothing: no map among them, and as ever."""
        controls: dict[str, Any] = {"Tile overlap": 16, "Scale Factor": 1.25}
        if any(one["name"] == "Lanczos" for one in self.server.call("/sdapi/v1/upscalers")):
            controls["Upscaler"] = "Lanczos"
        self._of_a_picture(draw, "sd upscale", controls)

    def map_in_gallery(self, draw: random.Random) -> None:
        """A map behind the picture, where no script runs."""
        if not self.server.with_klora:
            return
        tag, size = self.any_tag(draw), draw.choice((1, 1, 2))
        wanted = self.expected(tag)
        with self._map_wanted(draw, always=True) as changes:
            made = self.server.txt2img(tag, batch_size=size, **changes)
        assert len(made.all) == size + 1, f"{len(made.all)} pictures of {size} and their map"
        if size == 1:
            _same(made.only(0), wanted)

    def added_network(self, draw: random.Random) -> None:
        """A network that the host adds to the prompt by itself."""
        name, other = draw.choice(PAIRS)
        tag = self.tag(name, other, draw.choice(SETTINGS))
        wanted = self.expected(tag)
        self.server.options(sd_lora=name)
        try:
            picture = self.server.txt2img(tag)
        finally:
            self.server.options(sd_lora="None")
        if self.server.with_klora:
            _same(picture, wanted)

    def checkpoint(self, draw: random.Random) -> None:
        """Another checkpoint, of the same architecture or of another, and back."""
        others = [one for one in (self.server.other_model, self.server.sdxl_model) if one is not None]
        if not others:
            return
        self.server.options(sd_model_checkpoint=draw.choice(others).path.name)
        try:
            self.server.txt2img(self.any_tag(draw))
        finally:
            self.server.options(sd_model_checkpoint=self.server.model.path.name)

    def refiner(self, draw: random.Random) -> None:
        """Another checkpoint takes over while sampling."""
        other = self.server.other_model
        if other is not None:
            self.server.txt2img(
                self.any_tag(draw), refiner_checkpoint=other.path.name, refiner_switch_at=draw.choice((0.4, 0.7))
            )

    def compiled(self, draw: random.Random) -> None:
        """A model that the host compiles for each call: a plain picture within rounding, then a tag's, as ever."""
        found = compiling(self.server)
        if found is None:
            return
        accordion, off = found
        tag = self.any_tag(draw)
        wanted = self.expected(tag)
        try:
            plain = self.server.txt2img(alwayson_scripts={accordion: {"args": [QUICKEST]}})
            assert plain.distance(self.expected("")) <= 1, "compiled, the plain picture is another"
            picture = self.server.txt2img(tag, alwayson_scripts={accordion: {"args": [QUICKEST]}})
            if self.server.with_klora:
                _same(picture, wanted)
        finally:
            self.server.txt2img(alwayson_scripts={accordion: {"args": [off]}})

    def reload(self, draw: random.Random) -> None:
        """*Reload UI*."""
        self.server.reload_ui()

    def _first(self, key: str, make: Callable[[], Picture]) -> Picture:
        if key not in self._expected:
            self._expected[key] = make()
        return self._expected[key]

    def _of_a_picture(self, draw: random.Random, script: str, controls: dict[str, Any]) -> None:
        tag, source = self.any_tag(draw), self.expected("")

        def make(**changes: Any) -> Picture:
            # Where a host encodes a picture it draws from numbers that its seed does not set.
            self.server.call("/klora-probe/seed")
            return self.server.script(script, tag, controls, source, **changes)

        wanted = self._first(f"{script}: {tag}", make)
        with self._map_wanted(draw) as changes:
            _same(make(**changes), wanted)

    @contextmanager
    def _map_wanted(self, draw: random.Random, always: bool = False) -> Iterator[dict[str, Any]]:
        """Want a map by the accordion, by the setting for all pictures, or, unless `always`, not at all."""
        way = draw.choice(("accordion", "setting") if always else ("accordion", "setting", "none"))
        if not self.server.with_klora or way == "none":
            yield {}
        elif way == "accordion":
            yield {"alwayson_scripts": {"K-LoRA": {"args": [{"show_map": True, "enabled": False}]}}}
        else:
            self.server.options(klora_show_map=True)
            try:
                yield {}
            finally:
                self.server.options(klora_show_map=False)

    def _write(self, name: str, original: str, in_place: bool = False) -> None:
        """Give a LoRA's file the content of another's."""
        path, content = self._path(name), self._path(original).read_bytes()
        # A host that has mapped a file of a plain LoRA dies where that is written over.
        if in_place and path.exists() and self.server.with_klora:
            with path.open("r+b") as file:
                file.write(content)
                file.truncate()
        else:
            whole = path.with_suffix(".part")
            whole.write_bytes(content)
            os.replace(whole, path)

    def _damage(self, draw: random.Random) -> None:
        path = self._path(draw.choice(LIVE))
        kind = draw.choice(("cut", "empty", "delete"))
        if kind == "delete":
            path.unlink()
        else:
            os.truncate(path, draw.randrange(path.stat().st_size) if kind == "cut" else 0)

    def _path(self, name: str) -> Any:
        return self._loras / f"{name}.safetensors"


def compiling(server: Server) -> tuple[str, str] | None:
    """The accordion by which a host compiles its model for each call, and what switches it off; None for most."""
    for one in server.call("/sdapi/v1/script-info"):
        choices = (one["args"][0]["choices"] or []) if one["args"] else []
        if QUICKEST in choices:
            return one["name"], choices[1]
    return None


def _same(picture: Picture, expected: Picture) -> None:
    assert len(picture.all) == len(expected.all), f"{len(picture.all)} pictures, no longer {len(expected.all)}"
    assert picture.same(expected), f"{picture.distance(expected)} of 255 off what it was; {picture.comments}"


CASES: dict[str, tuple[float, Callable[[Cases, random.Random], None]]] = {
    "a tag": (20, Cases.picture),
    "plain LoRAs beside": (8, Cases.beside),
    "a bad tag": (8, Cases.bad_tag),
    "API arguments": (6, Cases.arguments),
    "hires, img2img, batch, AND, long": (14, Cases.passes),
    "interrupt, skip, error, out of memory": (14, Cases.ending),
    "files replaced": (12, Cases.files),
    "files damaged": (8, Cases.damage),
    "files damaged meanwhile": (6, Cases.damage_meanwhile),
    "four requests at once": (3, Cases.at_once),
    "X/Y/Z plot": (3, Cases.grid),
    "prompt matrix": (3, Cases.matrix),
    "prompts from a text": (3, Cases.prompts),
    "loopback": (3, Cases.loopback),
    "SD upscale": (3, Cases.upscale),
    "a map in the gallery": (5, Cases.map_in_gallery),
    "Add network to prompt": (4, Cases.added_network),
    "checkpoint switch": (3, Cases.checkpoint),
    "refiner": (3, Cases.refiner),
    "torch.compile": (1, Cases.compiled),
    "Reload UI": (1, Cases.reload),
}
"""How often each case is drawn, and what it does."""

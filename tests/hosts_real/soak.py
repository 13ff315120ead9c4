"""A soak: many generations with random faults on a real host; after each, the plain picture and every parameter.

    KLORA_FORGE_ROOT=… python -m tests.hosts_real.soak forge --count 1000 --seed 1

The root is what tests/hosts_real/server.py takes. Every case draws from the seed and its own number. `--control` makes
the same cases without K-LoRA: its tags are plain `<lora:…>` tags, so that what the host does by itself is seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.hosts_real.cases import CASES, Cases
from tests.hosts_real.server import HOSTS, Server, find_server

MEMORY_EVERY = 50


class Soak:
    """A host under test, and what has come of its cases."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.cases = Cases(server)
        self.plain = server.txt2img()
        self.untouched = server.state()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []
        self.memory = [server.memory()]

    def run(self, count: int, until: float) -> None:
        """Make so many cases, or as many as there is time for."""
        for number in range(count):
            if time.monotonic() > until:
                break
            draw = random.Random(f"{self.seed}:{number}")
            name = draw.choices(list(CASES), [weight for weight, _ in CASES.values()])[0]
            begin = time.monotonic()
            try:
                CASES[name][1](self.cases, draw)
                self._check()
            except Exception as error:
                self.faults.append(f"case {number} of seed {self.seed}, {name}: {type(error).__name__}: {error}"[:600])
                print(self.faults[-1], flush=True)
                if not self.server.is_alive(10):
                    print("the host has ended", flush=True)
                    break
            self.seconds[name].append(time.monotonic() - begin)
            if (number + 1) % MEMORY_EVERY == 0:
                self.memory.append(self.server.memory())
                print(f"{number + 1} cases, {len(self.faults)} faults, {self.memory[-1]:.2f} GB", flush=True)

    def table(self) -> str:
        """What was made, as Markdown."""
        rows = ["| case | times | median s | longest s |", "|---|---|---|---|"]
        for name, seconds in sorted(self.seconds.items()):
            rows.append(f"| {name} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
        count = sum(map(len, self.seconds.values()))
        made = f"{count} cases, {self.server.made} generations, {len(self.faults)} faults"
        memory = " → ".join(f"{one:.2f}" for one in self.memory)
        return "\n".join([*rows, "", f"{made}; memory of the host every {MEMORY_EVERY} cases, in GB: {memory}"])

    def _check(self) -> None:
        """No hook, the plain picture, and every parameter, as they were at the start."""
        hooks = {name: self.untouched[name]["hooks"] for name in ("unet", "text")}
        assert self.server.hooks() == hooks, "hooks are left"
        plain = self.server.txt2img()
        assert plain.same(self.plain), f"the plain picture is {plain.distance(self.plain)} of 255 off"
        state = self.server.state()
        changed = [name for name in state if state[name] != self.untouched[name]]
        assert not changed, f"not as it was: {', '.join(changed)}"


def main(argv: list[str] | None = None) -> int:
    """Run a soak and print its table; 1 where anything was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts_real.soak", description=__doc__)
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--control", action="store_true", help="the same without K-LoRA")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        server = find_server(options.host, Path(folder))
        if isinstance(server, str):
            parser.error(server)
        server.with_klora = not options.control
        try:
            server.start()
            server.defaults["steps"] = 3
            soak = Soak(server, options.seed)
            soak.run(options.count, time.monotonic() + 60 * options.minutes)
            print(soak.table())
        finally:
            server.stop()
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether memory stays flat over many pictures: `python -m bench.memory`.

Pictures of two pairs in turns, on a pipeline with random weights; resident memory after each, and its peak beside that
of the model alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import klora
from bench.machine import describe_machine
from bench.model import make_pipeline, module_shapes, picture, write_lora
from klora.cache import ScoreCache

MB = 2**20


def resident() -> int:
    """Bytes of memory of this process, 0 where the system does not tell."""
    return _status("VmRSS")


def peak() -> int:
    """The most that this process has had so far."""
    # `getrusage` would count what the process that started this one had.
    return _status("VmHWM")


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Whether memory stays flat.")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=64, help="side of the square picture")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs=2, default=[640, 1280], help="of the model, multiples of 64")
    options = parser.parse_args()
    print(describe_machine())
    pipe = make_pipeline(channels=tuple(options.channels))
    shapes = module_shapes(pipe, ("attention", "linear"))
    picture(pipe, options.steps, options.pixels)
    alone = resident()
    with tempfile.TemporaryDirectory() as folder:
        files = [write_lora(Path(folder) / f"{i}.safetensors", shapes, options.rank, i) for i in range(4)]
        size = sum(file.stat().st_size for file in files[:2])
        gc.collect()
        cache, seen = ScoreCache(Path(folder) / "cache"), []
        for number in range(options.pictures):
            pair = files[:2] if number % 2 else files[2:]
            with klora.fuse(pipe, *pair, cache=cache):
                picture(pipe, options.steps, options.pixels)
            seen.append(resident())
    # Both pairs have been seen, and what allocators keep has been kept, after a tenth.
    settled = seen[len(seen) // 10 :]
    print(f"{len(shapes)} modules, rank {options.rank}; a pair of files {size / MB:.0f} MB")
    print(f"model alone {alone / MB:.0f} MB; after picture {len(seen) // 10 + 1}: {settled[0] / MB:.0f} MB,", end=" ")
    print(f"after picture {len(seen)}: {settled[-1] / MB:.0f} MB ({settled[-1] / settled[0] - 1:+.2%})")
    print(
        f"spread {(max(settled) - min(settled)) / settled[0]:.2%}; peak beside the model {(peak() - alone) / MB:.0f} MB"
    )


if __name__ == "__main__":
    main()

"""Copy the release to the package: `python -m training.ship`. Refuses a set that is too large, or fails a gate.

`--although` ships a set that fails gates, which stay in its catalogue as failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from training.networks import RELEASE

DEMO = Path(__file__).resolve().parent.parent / "klora" / "demo"
LIMIT = 12_000_000
"""Bytes of all weights together."""
PARTS = ("model", "loras", "judge.safetensors", "catalogue.json")


def weight(folder: Path) -> int:
    """Bytes of all files of a set."""
    files = (file for part in PARTS for file in [folder / part, *(folder / part).rglob("*")])
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--although", action="store_true", help="also with failed gates")
    args = parser.parse_args()
    gates = json.loads((RELEASE / "catalogue.json").read_text(encoding="utf-8"))["gates"]
    failed = [gate["gate"] for gate in gates if not gate["passed"]]
    if failed and not args.although:
        raise SystemExit(f"not shipped; these gates fail: {', '.join(failed)}")
    if weight(RELEASE) > LIMIT:
        raise SystemExit(f"not shipped: {weight(RELEASE)} bytes, more than {LIMIT}")
    for part in PARTS:
        source, target = RELEASE / part, DEMO / part
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    print(f"shipped {weight(DEMO)} bytes to {DEMO}; failed gates: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()

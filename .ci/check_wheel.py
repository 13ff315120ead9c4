"""Check that a wheel has the package's version and every file of it, the demo's model and LoRAs among them."""

import re
import sys
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
skipped = {".pyc"}
expected = {
    path.relative_to(root).as_posix()
    for path in (root / "klora").rglob("*")
    if path.is_file() and path.suffix not in skipped
}
wheel = Path(sys.argv[1])
names = set(zipfile.ZipFile(wheel).namelist())
missing = sorted(expected - names)
foreign = sorted(n for n in names - expected if not n.startswith("klora-"))
version = re.search(r'^__version__ = "(.+)"$', (root / "klora" / "__init__.py").read_text(), re.MULTILINE)[1]
if not wheel.name.startswith(f"klora-{version}-"):
    sys.exit(f"{wheel.name}: klora/__init__.py says {version}")
print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MiB")
for label, found in (("missing from the wheel", missing), ("not of the package", foreign)):
    if found:
        sys.exit(f"{label}: {', '.join(found)}")

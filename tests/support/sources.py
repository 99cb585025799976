"""Which sources a record speaks of."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def source_hash() -> str:
    """SHA-256 over every Python file of the package, in the order of their paths: path, NUL, bytes."""
    digest = hashlib.sha256()
    for path in sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "fa3_cute").rglob("*.py")):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()

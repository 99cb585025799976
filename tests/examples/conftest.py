"""The examples' own modules can be imported, as the examples themselves do it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

# For type checkers: cuda.core has no types of its own that they can read.
from typing import Any

def __getattr__(name: str) -> Any: ...

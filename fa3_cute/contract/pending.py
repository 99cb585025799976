"""What the contract has already and no kernel does yet: a row leaves with the kernel that does it. Pure Python."""

from .params import OPTIONALS
from .plain import BAD
from .scores import has_optionals
from .sentences import Sentences
from .status import shown

# {field: what is not done yet}
PENDING: dict[str, str] = {}


def pending_choices(p) -> Sentences:
    """The rule of choices that have no kernel yet."""
    return _pending(p, [name for name in PENDING if name not in OPTIONALS])


def pending_pointers(p) -> Sentences:
    """The rule of pointers that no kernel reads yet."""
    return _pending(p, [name for name in PENDING if name in OPTIONALS]) if has_optionals(p) else ()


def _pending(p, fields: list[str]) -> Sentences:
    values = [(name, getattr(p, name)) for name in fields]
    return [
        f"{name}={shown(getattr(getattr(p, 'raw', p), name))}: no kernel yet: {PENDING[name]}"
        for name, value in values
        if value is not None and value is not BAD and (type(value) not in (int, float) or value)
    ]

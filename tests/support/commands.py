"""Commands as tests run them."""

import json

from fa3_cute.cli import main


def answer(capsys, *argv: str) -> tuple[int, dict]:
    """Exit status and JSON of a command."""
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)

"""The process that compiles one kernel and ends: compile_process.py starts it.

It reads one line of JSON, {"module", "config", "fields"}, writes "ready" when the DSL is imported, then one line of
JSON: {"object": base64} or {"error": sentence}. Its standard input stays open until the process that started it is
done with it; should that one die, this one ends too.
"""

import base64
import json
import os
import sys
import threading
from importlib import import_module

from .build import CompileError, object_of, plain_text


def main() -> None:
    """Serve one compile."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no reply
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("ready", file=replies, flush=True)
    print(json.dumps(_answer(job)), file=replies, flush=True)
    os._exit(0)  # the DSL has nothing to tidy up


def _answer(job: dict) -> dict:
    name = job["config"]
    try:
        cfg = getattr(import_module(job["module"]), job["config"])(**job["fields"])
        name = cfg.name
        return {"object": base64.b64encode(object_of(cfg)).decode()}
    except CompileError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{name} did not compile: {type(error).__name__}: {plain_text(error)}"}


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)

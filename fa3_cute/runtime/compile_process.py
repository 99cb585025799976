"""Compiles in a process of its own, so that this one goes on: the DSL's compiler holds the interpreter for seconds.

The process runs this very package, whatever its name and wherever it lies, with this process's sys.path; it never sees
__main__. Of the DSL's settings it gets those that are part of the cache key. It needs no GPU and takes no signal of the
terminal; it ends when it has answered, or with this process.
"""

import base64
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

from ..planning.config import KernelConfig
from .build import CODE_SETTINGS, CompileError, plain_text
from .dsl import dsl_settings

START_SECONDS = 120  # to import the DSL, which takes one
COMPILE_SECONDS = 600

# sys.path first: nothing may be imported from the working folder. The package is made from its files, since a finder
# that knows it may exist in this process only.
SCRIPT = """
import sys
sys.path[:], name, folder = eval(sys.argv[1])
from importlib import import_module, util
spec = util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
package = sys.modules[name] = util.module_from_spec(spec)
spec.loader.exec_module(package)
import_module(name + ".runtime.worker").main()
"""

_places = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))  # processes at a time: one per core


def described(cfg: KernelConfig) -> dict | None:
    """A config in words that another process understands; None where it is more than the plain fields of a class of
    this package, or calls functions that this process alone has."""
    kind = type(cfg)
    job = {"module": kind.__module__, "config": kind.__qualname__, "fields": cfg.as_dict()}
    is_known = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
    if not is_known or getattr(cfg, "has_mods", False) or not kind.__module__.startswith(f"{_package()}."):
        return None
    try:
        return job if kind(**json.loads(json.dumps(job["fields"]))) == cfg else None
    except (TypeError, ValueError):
        return None


def compile_elsewhere(name: str, job: dict) -> bytes:
    """The object file of a config as `described` has it. Raises CompileError, whatever becomes of the process."""
    with _places, _started(name) as (process, said):
        with suppress(BrokenPipeError):  # it died: so says its standard output
            os.write(process.stdin.fileno(), json.dumps(job).encode() + b"\n")
        reply = _line(process, START_SECONDS, f"{name} did not compile: importing nvidia-cutlass-dsl")
        reply = reply and _line(process, COMPILE_SECONDS, f"{name} did not compile: compiling")
        if not reply.endswith(b"\n"):  # nothing, or a part of it
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            raise CompileError(f"{name} did not compile: {_cause(process.returncode, said)}")
    answer = json.loads(reply)
    if "error" in answer:
        raise CompileError(answer["error"])
    return base64.b64decode(answer["object"])


@contextmanager
def _started(name: str) -> Iterator[tuple[Any, Any]]:
    """The process and what it writes on its standard error, a file without a place on a disk."""
    foreign = dsl_settings().keys() - set(CODE_SETTINGS)
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    package = ([str(Path(entry).absolute()) for entry in _search_path()], _package(), str(Path(__file__).parents[1]))
    interpreter = os.fsdecode(get_executable() or b"")  # of a program that embeds Python, what it told multiprocessing
    with ExitStack() as stack:
        try:
            said = stack.enter_context(os.fdopen(os.memfd_create("fa3_cute"), "w+b"))
            process = subprocess.Popen(
                [interpreter, "-c", SCRIPT, ascii(package)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                cwd="/",  # this process's may be gone
                start_new_session=True,  # a Ctrl-C in the terminal is for this process, which ends that one
            )
        except (OSError, ValueError, TypeError, RuntimeError, subprocess.SubprocessError) as error:
            said = f"{name} did not compile: no process that compiles could be started with {interpreter!r}"
            raise CompileError(f"{said}: {error}") from error
        with process:
            try:
                yield process, said
            finally:
                process.kill()


def _search_path() -> list[str]:
    """sys.path, but for what is relative to a working folder that is gone."""
    try:
        os.getcwd()
    except OSError:
        return [entry for entry in sys.path if os.path.isabs(entry)]
    return [entry for entry in sys.path if isinstance(entry, str)]


def _line(process: Any, seconds: int, doing: str) -> bytes:
    """The next line that it writes; b"" if it ended. CompileError where that takes too long."""
    answers = select.poll()
    answers.register(process.stdout, select.POLLIN)
    if not answers.poll(1000 * seconds):
        raise CompileError(f"{doing} took more than {seconds} seconds")
    return process.stdout.readline()


def _cause(status: int | None, said: Any) -> str:
    """Why a process ended that gave no answer: the last line on its standard error, which is an exception's."""
    said.seek(0)
    lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"the process that compiles ended with status {status}: {plain_text(last)}"


def _package() -> str:
    return __name__.rpartition(".runtime.")[0]

"""A compile in a process of its own: how it starts, what it is told, and what becomes of one that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fa3_cute.cli import compile
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.runtime import compile_process, compiler, disk_cache

CFG = forward_config("bf16", 64, "causal", True, False)
PACKAGE = Path(compiler.__file__).parents[1]

# What a process does that compiles CFG.
COMPILE = """
from importlib import import_module
compiler = import_module(f"{package}.runtime.compiler")
cfg = import_module(f"{package}.planning.tables").forward_config("bf16", 64, "causal", True, False)
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Each test starts with nothing in memory and a disk cache of its own."""
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("FA3_CUTE_DISABLE_JIT", "FA3_CUTE_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler, "_kernels", {})
    return tmp_path / "cache"


@pytest.fixture
def script(monkeypatch):
    """script(text): what the process runs instead of the compile."""

    def replaced(text: str) -> None:
        monkeypatch.setattr(compile_process, "SCRIPT", text)

    return replaced


def fails(match: str) -> None:
    with pytest.raises(compiler.CompileError, match=match):
        compiler.get_kernel(CFG)
    assert not compiler._kernels


@pytest.mark.parametrize("cfg", [CFG, decode_config("fp8_e4m3", 64, True, "bf16")], ids=["forward", "decode"])
def test_a_config_in_words_is_that_config(cfg):
    job = json.loads(json.dumps(compile_process.described(cfg)))
    kind = getattr(sys.modules[job["module"]], job["config"])
    assert kind(**job["fields"]) == cfg


def test_a_config_that_only_this_process_knows_is_compiled_here(monkeypatch):
    class Mine(type(CFG)):
        pass

    mine = Mine(**CFG.as_dict())
    assert compile_process.described(mine) is None
    monkeypatch.setattr(compiler, "compile_elsewhere", None)
    monkeypatch.setattr(compiler, "object_of", lambda cfg: cfg)
    assert compiler._object(mine) is mine


def test_the_command_compile_does_it_in_its_own_processes(monkeypatch):
    """But where a setting of the DSL, which that process has read, would change the object."""
    report = SimpleNamespace(problems=list)
    where = []
    monkeypatch.setattr(compiler, "object_of", lambda cfg: where.append("here") or b"")
    monkeypatch.setattr(compiler, "compile_elsewhere", lambda name, job: where.append("elsewhere") or b"")
    monkeypatch.setattr(compiler, "_load", lambda code, name: name)
    monkeypatch.setattr(compiler, "compile_report", lambda cfg: report)
    monkeypatch.setattr(compile, "asdict", vars)
    for name in [name for name in os.environ if name.startswith("CUTE_DSL_")]:
        monkeypatch.delenv(name)
    compile.compile_row(CFG)
    monkeypatch.setenv("CUTE_DSL_ENABLE_PYIR", "1")
    monkeypatch.setattr(compiler, "_kernels", {})
    disk_cache.clear()
    compile.compile_row(CFG)
    monkeypatch.undo()
    assert where == ["here", "elsewhere"] and compiler._is_elsewhere


def test_a_process_that_dies_is_a_compile_error_with_its_last_words(script):
    script("import sys; sys.exit('no room for it\\n')")
    fails(rf"{CFG.name} did not compile: the process that compiles ended with status 1: no room for it")


def test_a_process_that_is_killed_is_a_compile_error(script):
    script("import os; print('ready', flush=True); os.kill(os.getpid(), 9)")
    fails("ended with status -9: it said nothing")


@pytest.mark.parametrize("said", ["", "ready", 'ready\\n{\\"object\\"'])
def test_a_process_that_dies_before_it_has_answered_is_a_compile_error(said, script, monkeypatch):
    """Whatever of its answer is there; and it has closed its standard input before it is told what to do."""
    write = os.write
    monkeypatch.setattr(compile_process.os, "write", lambda *args: time.sleep(0.5) or write(*args))
    script(f"import os; os.close(0); os.write(1, b'{said}'); os.close(1)")
    fails("ended with status [01]: ")


def test_a_process_that_hangs_is_a_compile_error(script, monkeypatch):
    monkeypatch.setattr(compile_process, "START_SECONDS", 0.2)
    script("import time; time.sleep(600)")
    fails("importing nvidia-cutlass-dsl took more than 0.2 seconds")
    monkeypatch.setattr(compile_process, "START_SECONDS", 60)
    monkeypatch.setattr(compile_process, "COMPILE_SECONDS", 0.2)
    script("import time; print('ready', flush=True); time.sleep(600)")
    fails("compiling took more than 0.2 seconds")


@pytest.mark.parametrize("error", [BlockingIOError(11, "no more processes"), RuntimeError("can't fork")])
def test_a_process_that_cannot_be_started_is_a_compile_error(error, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(compile_process.subprocess, "Popen", refuse)
    fails(f"no process that compiles could be started.*{re.escape(str(error))}")


def test_an_interpreter_that_is_not_there_is_a_compile_error(monkeypatch):
    monkeypatch.setattr(compile_process, "get_executable", lambda: "/nonexistent/python")
    fails("could be started with '/nonexistent/python'")


def test_what_the_compiler_objects_to_comes_back_in_its_words(script):
    script("""print('ready'); print('{"error": "no such tile"}')""")
    fails("^no such tile$")


def test_the_process_sees_no_settings_of_others_and_no_working_folder(script, monkeypatch):
    monkeypatch.setenv("CUTE_DSL_DRYRUN", "1")
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    script("import os, sys; sys.exit(os.getcwd() + str([n for n in os.environ if n.startswith('CUTE_')]))")
    fails(r"/\['CUTE_DSL_LINEINFO'\]")


def test_processes_at_a_time_are_as_many_as_cores(script, monkeypatch, tmp_path):
    monkeypatch.setattr(compile_process, "_places", threading.BoundedSemaphore(1))
    running = str(tmp_path / "running")
    script(f"import os, time; open({running!r}, 'x'); time.sleep(0.2); os.unlink({running!r})")
    said = []

    def compile_one():
        try:
            compile_process.compile_elsewhere("fwd", {})
        except compiler.CompileError as error:
            said.append(str(error))

    threads = [threading.Thread(target=compile_one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3 and all("status 0: it said nothing" in text for text in said)


def test_the_process_ends_with_the_one_that_started_it(tmp_path):
    """And takes no Ctrl-C meanwhile."""
    code = '''
import os, subprocess
from fa3_cute.runtime import compile_process
run = subprocess.Popen
def start(*args, **kwargs):
    process = run(*args, **kwargs)
    print(process.pid, os.getsid(process.pid) != os.getsid(0), flush=True)
    return process
subprocess.Popen = start
start_of_script = compile_process.SCRIPT.rpartition("import_module")[0]
compile_process.SCRIPT = start_of_script + """
import time
worker = import_module(name + ".runtime.worker")
worker._answer = lambda job: time.sleep(600)
worker.main()
"""
compile_process.compile_elsewhere("fwd", {})
'''
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=PACKAGE.parent)
    pid, is_alone = parent.stdout.readline().split()
    assert is_alone == "True"
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    end = time.monotonic() + 60
    while is_running(int(pid)):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("name", ["fa3_cute", "fa3_before"])
def test_whatever_main_is_and_whatever_the_package_is_called(name, tmp_path, empty_cache):
    """A process whose __main__ is its standard input; it knows the package by a name and a path that no other does."""
    (tmp_path / "json.py").write_text("raise SystemExit('the working folder is on the path of the process')")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "no package").symlink_to(PACKAGE)
    code = f"""
import sys
from importlib import util
folder = {str(tmp_path / "elsewhere" / "no package")!r}
spec = util.spec_from_file_location({name!r}, folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules[{name!r}] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[{name!r}])
package = {name!r}
{COMPILE}
print(type(compiler.get_kernel(cfg)).__name__, sorted(n for n in sys.modules if n.startswith("fa3_") and "." not in n))
"""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-"], input=code, text=True, capture_output=True, cwd=tmp_path, env=clean, timeout=120
    )
    assert done.stdout == f"CudaDialectJitCompiledFunction ['{name}']\n", done.stderr
    assert not done.stderr

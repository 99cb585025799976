"""The command line: `python -m fa3_cute COMMAND`, one module per command.

A command module has `add_arguments(parser)` and `run(args) -> int`, the exit status: 0 success, 1 the command's check
failed, 2 it could not run here and said on stderr why. `args.argv` is the command line. 128 and the signal's number
more if Ctrl-C ended it, or whoever read its output is gone.
"""

import argparse
import errno
import os
import signal
import sys
from importlib import import_module

STDOUT = 1  # its file descriptor
COMMANDS = {
    "doctor": "check this installation, its driver and its GPUs, and run or compile one kernel",
    "explain": "say what is wrong with a problem of given sizes, else which kernel serves it and why",
    "inspect": "show what a kernel is made of: registers, shared memory, instructions, its critical unit",
    "compile": "compile kernels for sm_90a, with or without a GPU, and print what the compiler made of them",
    "cache": "list, clear or export the compiled kernels on disk, or print where they are",
    "dev": "compile, check and time one config of one's choice, and again whenever a kernel is saved",
    "tune": "sweep the tiles and stages of a problem and print the row of planning/tables.py that they speak for",
    "bench": "time the forward on this machine's GPU, beside other libraries if asked to",
    "report": "render results of bench --json as markdown tables",
    "replay": "repeat logged calls on random data, or say which kernels would serve them",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, default `sys.argv[1:]`. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if sys.stdout is None:  # closed by whoever started this
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
        status = run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The interpreter's own flush at the end must find another place.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"fa3_cute: the output cannot be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        return 2
    return status


def run(argv: list[str]) -> int:
    """The same, for the signals to interrupt."""
    parser = argparse.ArgumentParser(prog="fa3_cute", description="FlashAttention-3 for Hopper GPUs.")
    version = f"fa3_cute {import_module('fa3_cute').__version__}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if argv[:1] == [name]:  # only the command that runs is imported
            command = import_module(f".{name}", __name__)
            subparser.description = command.__doc__
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    args.argv = argv
    return args.run(args)

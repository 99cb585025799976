"""docs/command-line.md has every command, options and kernels that exist, and outputs that are printed; the documents'
calls of attention() fit its signature.
"""

import argparse
import ast
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import fa3_cute
from fa3_cute.cli import COMMANDS, main
from fa3_cute.planning.selections import appending_configs
from fa3_cute.planning.tables import all_decode_configs, all_forward_configs, configs_over

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "command-line.md"
TEXT = PAGE.read_text()
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

every_command = pytest.mark.parametrize("command", COMMANDS)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def section(command: str) -> str:
    """What stands under the command's heading."""
    return TEXT.partition(f"\n## {command}\n")[2].partition("\n## ")[0]


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command, exit_on_error=False)
    import_module(f"fa3_cute.cli.{command}").add_arguments(parser)
    return parser


def options_of(command: str) -> set[str]:
    return {"--help"} | {option for action in parser_of(command)._actions for option in action.option_strings}


def command_lines(text: str) -> list[list[str]]:
    """Arguments of every `python -m fa3_cute` that begins a line of a shell block, comments left out."""
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).splitlines()
    return [
        words[3:]
        for words in (shlex.split(line, comments=True) for line in lines)
        if words[:3] == ["python", "-m", "fa3_cute"]
    ]


def wrong_options(command: str, text: str) -> set[str]:
    """Options that the text names and the command does not have; `pip`'s and other commands' do not occur in it."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - options_of(command)


# ---- commands ------------------------------------------------------------------------------------------------------


def test_every_command_has_a_section_and_a_row():
    assert re.findall(r"^## (\w+)$", TEXT, re.MULTILINE) == list(COMMANDS)
    assert re.findall(r"^\| \[(\w+)\]\(#\1\) \|", TEXT, re.MULTILINE) == list(COMMANDS)


@every_command
def test_a_section_has_a_command_its_output_and_its_exit_status(command):
    text = section(command)
    assert "```text\n" in text and re.search(r"^Exit status", text, re.MULTILINE)
    assert command_lines(text) and all(words[0] == command for words in command_lines(text))


@every_command
def test_options_exist(command):
    text = section(command).replace("`bench --json`", "")
    assert not wrong_options(command, text)


def test_a_wrong_option_is_found():
    assert wrong_options("cache", section("cache") + "`--force`") == {"--force"}


@every_document
def test_quoted_commands_are_accepted(document):
    for command, *words in command_lines(document.read_text()):
        parser_of(command).parse_args(words)


def test_a_wrong_command_is_found():
    ((command, *words),) = command_lines("```sh\npython -m fa3_cute cache empty   # wrong\n```\n")
    with pytest.raises(argparse.ArgumentError):
        parser_of(command).parse_args(words)


def test_readme_names_every_command():
    line = re.search(r"^  cli/ +python -m fa3_cute (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
    assert line.split(" | ") == list(COMMANDS)


# ---- outputs -------------------------------------------------------------------------------------------------------


def printed(command: str) -> list[tuple[list[str], str]]:
    """(arguments, output) of each shell block that its output follows."""
    found = re.findall(
        r"^```sh\npython -m fa3_cute ([^\n]*)\n```\n\n```text\n(.*?)^```$", section(command), re.DOTALL | re.MULTILINE
    )
    return [(shlex.split(words), output) for words, output in found]


def test_explanations_are_what_explain_prints(capsys):
    assert len(printed("explain")) == 3
    for words, output in printed("explain"):
        status = main(words)
        assert capsys.readouterr().out == output
        assert status == output.startswith("forward would refuse")


def test_kernels_exist():
    """But for those of `dev`, which are of one's own choice."""
    known = {
        cfg.name for cfg in (*all_forward_configs(), *all_decode_configs(), *configs_over(0), *appending_configs())
    }
    named = set(re.findall(r"\b(?:fwd|decode)_(?:bf16|fp16)_\w+", TEXT.replace(section("dev"), "")))
    assert len(named) >= 5 and named <= known


def test_doctor_s_lines_are_its_checks():
    from fa3_cute.cli.doctor import CHECKS

    on_hopper, elsewhere = (
        re.findall(r"^(?:ok|WRONG) +(.*?)  ", block, re.MULTILINE)
        for block in re.findall(r"```text\n(.*?)```", section("doctor"), re.DOTALL)
    )
    assert on_hopper == elsewhere == list(CHECKS)


def test_no_cache_folder_of_a_machine():
    assert set(re.findall(r"\S*/fa3_cute\b", section("cache") + section("doctor"))) == {"~/.cache/fa3_cute"}


# ---- calls of attention() --------------------------------------------------------------------------------------------


def calls_of_attention(text: str) -> list[ast.Call]:
    return [
        node
        for code in re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "attention"
    ]


def bind(call: ast.Call) -> None:
    """Raise TypeError for a call that the signature does not allow."""
    inspect.signature(fa3_cute.attention).bind(*call.args, **{word.arg: word.value for word in call.keywords})


@every_document
def test_calls_of_attention_fit_its_signature(document):
    for call in calls_of_attention(document.read_text()):
        bind(call)


def test_there_are_calls_of_attention():
    assert all(calls_of_attention((ROOT / name).read_text()) for name in ("README.md", "docs/api.md"))


@pytest.mark.parametrize("code", ["attention(q, k)", "attention(q, k, v, is_causal=True)"])
def test_a_wrong_call_is_found(code):
    (call,) = calls_of_attention(f"```py\n{code}\n```\n")
    with pytest.raises(TypeError):
        bind(call)

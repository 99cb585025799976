"""Recorded signatures of other libraries: the adapters' methods are those of the engines, and docs/migration.md has
each argument of flash-attn's functions. Needs neither torch nor the engines."""

import ast
import re
from pathlib import Path

import pytest
from engine_stubs import RECORDED, arguments_of, recorded

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ROOT / "examples" / "engines" / "fa3_cute_engines"
MIGRATION = (ROOT / "docs" / "migration.md").read_text()
V, S = "vllm/v1/attention/backend.py", "sglang/srt/layers/attention/base_attn_backend.py"
INHERITED = {
    ("vllm", "Backend"): ((V, "AttentionBackend"),),
    ("vllm", "Builder"): ((V, "AttentionMetadataBuilder"),),
    ("vllm", "Impl"): ((V, "AttentionImpl"), (V, "AttentionImplBase")),
    ("sglang", "Backend"): ((S, "AttentionBackend"),),
}
# Not of the base class: vLLM gives sinks to layers that have some, and writes the cache where forward does not.
OTHERS = {"do_kv_cache_update": ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]}


def classes(engine: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((ENGINES / f"{engine}_backend.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def methods(node: ast.ClassDef) -> dict[str, list[str]]:
    """Arguments of those that the engine calls, in order."""
    found = {item.name: item.args for item in node.body if isinstance(item, ast.FunctionDef)}
    names = {name: [x.arg for x in args.posonlyargs + args.args] for name, args in found.items()}
    return {name: args for name, args in names.items() if name[0] != "_" or name == "__init__"}


@pytest.mark.parametrize("engine, name", INHERITED)
def test_methods_are_the_engines(engine, name):
    """Each overrides one of theirs, with its arguments in its order; all that are abstract are there."""
    theirs, abstract = {}, set()
    for file, base in reversed(INHERITED[engine, name]):
        found = recorded(engine, file, base)
        theirs |= {
            method: [x.name for x in arguments_of(args) if x.kind is not x.VAR_KEYWORD]
            for method, args in found["methods"].items()
        }
        abstract |= set(found["abstract"])
    ours = methods(classes(engine)[name])
    assert abstract <= ours.keys()
    for method, arguments in ours.items():
        expected = (theirs | OTHERS).get(method)
        if (engine, method) == ("sglang", "__init__"):
            expected = ["self", "model_runner"]
        if (name, method) == ("Impl", "__init__"):
            expected = [*expected, "sinks"]
        assert arguments == expected, method


@pytest.mark.parametrize(
    "engine, name", [("vllm", "Backend"), ("vllm", "Builder"), ("vllm", "Impl"), ("sglang", "Backend")]
)
def test_attributes_are_the_engines(engine, name):
    """A switch with another name would be no switch."""
    theirs = {x for file, base in INHERITED[engine, name] for x in recorded(engine, file, base)["attributes"]}
    node = classes(engine)[name]
    ours = {ast.unparse(target) for item in node.body if isinstance(item, ast.Assign) for target in item.targets}
    assert ours <= theirs


USED = {
    ("vllm", V, "CommonAttentionMetadata"): r"\bcommon\.(\w+)",
    ("sglang", "sglang/srt/model_executor/forward_batch_info.py", "ForwardBatch"): r"\bforward_batch\.(\w+)",
    ("sglang", "sglang/srt/layers/radix_attention.py", "RadixAttention"): r"\blayer\.(\w+)",
}


@pytest.mark.parametrize("library, file, name", USED)
def test_what_is_read_is_there(library, file, name):
    text = (ENGINES / f"{library}_backend.py").read_text()
    used = set(re.findall(USED[library, file, name], text))
    assert used and used <= set(recorded(library, file, name)["attributes"])


def test_scales_of_a_layer():
    """vLLM's layers have them by these names."""
    protocol = {"_q_scale", "_k_scale", "_v_scale"}
    text = (ENGINES / "vllm_backend.py").read_text()
    assert set(re.findall(r"\blayer\.(\w+)", text)) == protocol


def test_what_forward_takes_of_sglang():
    """Arguments that its own backend's forward has are served, or refused by name: none is a TypeError."""
    file = "sglang/srt/layers/attention/flashattention_backend.py"
    own = recorded("sglang", file, "FlashAttentionBackend")["methods"]
    for name in ("forward_decode", "forward_extend"):
        known = [x.name for x in arguments_of(own[name])]
        assert known[:7] == ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"] and "sinks" in known


# ---- docs/migration.md -----------------------------------------------------------------------------------------------

FUNCTIONS = [
    (library, name)
    for library in ("flash_attn_interface", "flash_attn")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
]


def section(title: str) -> str:
    """Of docs/migration.md, up to the next title of its rank or above."""
    rank, rest = title.partition(" ")[0], MIGRATION.partition(f"\n{title}\n")[2]
    assert rest, title
    return re.split(rf"^#{{2,{len(rank)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def documented(title: str) -> set[str]:
    """Arguments in the first column of a section's tables."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", section(title), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)(?:=[^`]*)?`", cell)}


@pytest.mark.parametrize("library, function", FUNCTIONS)
def test_each_argument_of_flash_attns_functions_is_in_the_tables(library, function):
    """Of this library's params: in the table of the function, or in that of what all share."""
    (file,) = RECORDED[library]["files"]
    arguments = {x.name for x in arguments_of(recorded(library, file, function))}
    known = documented("### What all three functions share") | documented(f"### {function}")
    assert arguments - known == set()


@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_each_argument_is_served_or_refused_in_pytorch(function):
    (file,) = RECORDED["flash_attn_interface"]["files"]
    arguments = {x.name for x in arguments_of(recorded("flash_attn_interface", file, function))}
    assert arguments - documented("## From flash-attn in PyTorch") == set()

"""What other libraries' functions and classes are like, read from their sources and never run: signatures.json.

python tests/support/record_signatures.py NAME=WHEEL_OR_SDIST ... prints those of the names of WANTED; pip download
--no-deps gets the files. flash_attn's, which pip does not download without building it, is from its repository.
"""

import ast
import json
import sys
import tarfile
import zipfile

# Of each library: the distribution, and of each of its files the functions and classes that adapters and documents use.
WANTED = {
    "flash_attn_interface": ("fa3-fwd", {"fa3_fwd_interface.py": ("flash_attn_*",)}),
    "vllm": (
        "vllm",
        {
            "vllm/v1/attention/backend.py": (
                *("AttentionType", "MultipleOf", "AttentionBackend", "AttentionMetadata", "CommonAttentionMetadata"),
                *("AttentionCGSupport", "AttentionMetadataBuilder", "AttentionImplBase", "AttentionImpl"),
            ),
            "vllm/v1/attention/backends/registry.py": ("register_backend",),
            "vllm/_custom_ops.py": ("reshape_and_cache_flash",),
        },
    ),
    "sglang": (
        "sglang",
        {
            "sglang/srt/layers/attention/base_attn_backend.py": ("AttentionBackend",),
            "sglang/srt/layers/attention/flashattention_backend.py": ("FlashAttentionBackend",),
            "sglang/srt/layers/attention/attention_registry.py": ("register_attention_backend",),
            "sglang/srt/layers/radix_attention.py": ("AttentionType", "RadixAttention"),
            "sglang/srt/mem_cache/memory_pool.py": ("KVWriteLoc", "MHATokenToKVPool"),
            "sglang/srt/model_executor/forward_batch_info.py": ("ForwardBatch", "ForwardMode"),
        },
    ),
}
METHODS = (
    ("FlashAttentionBackend", {"forward_decode", "forward_extend"}),
    ("MHATokenToKVPool", {"set_kv_buffer", "get_kv_buffer"}),
)


def texts(archive: str) -> dict[str, str]:
    """The Python files of a wheel, or of an sdist without its top folder."""
    if archive.endswith(".whl"):
        with zipfile.ZipFile(archive) as files:
            return {name: files.read(name).decode() for name in files.namelist() if name.endswith(".py")}
    with tarfile.open(archive) as files:
        members = [member for member in files.getmembers() if member.name.endswith(".py") and member.isfile()]
        return {member.name.partition("/")[2]: files.extractfile(member).read().decode() for member in members}


def described(node: ast.AST) -> object:
    """A function as its arguments with defaults and without annotations; a class as its methods, what of them is
    abstract, and the names that its body and its __init__ give values to."""
    if isinstance(node, ast.FunctionDef):
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return ast.unparse(node.args)
    assert isinstance(node, ast.ClassDef)
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    kept = dict(METHODS).get(node.name)
    abstract = [item.name for item in methods if any(ast.unparse(x) == "abstractmethod" for x in item.decorator_list)]
    attributes = [ast.unparse(target) for item in node.body for target in _targets(item)]
    for method in methods:
        if method.name == "__init__" and kept is None:
            attributes += [
                name[5:]
                for item in ast.walk(method)
                for name in map(ast.unparse, _targets(item))
                if name[:5] == "self."
            ]
    return {
        "methods": {item.name: described(item) for item in methods if kept is None or item.name in kept},
        "abstract": abstract,
        "attributes": sorted(dict.fromkeys(attributes)) if kept is None else [],
    }


def _targets(item: ast.AST) -> list:
    if isinstance(item, ast.Assign):
        return item.targets
    return [item.target] if isinstance(item, ast.AnnAssign) else []


def record(name: str, archive: str) -> dict:
    """Of one library."""
    distribution, files = WANTED[name]
    version = archive.rpartition("/")[2].split("-")[1].removesuffix(".tar.gz")
    found, sources = {}, texts(archive)
    for file, names in files.items():
        for node in ast.parse(sources[file]).body:
            is_wanted = any(
                getattr(node, "name", "") == x or x[-1] == "*" and getattr(node, "name", "").startswith(x[:-1])
                for x in names
            )
            if is_wanted:
                found.setdefault(file, {})[node.name] = described(node)
    return {"source": f"https://pypi.org/project/{distribution}/{version}/", "files": found}


if __name__ == "__main__":
    pairs = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    json.dump({name: record(name, archive) for name, archive in pairs}, sys.stdout, indent=1)
    print()

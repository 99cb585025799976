"""Modules of engines that are not installed, made of tests/adapters/signatures.json: classes with the methods that
theirs have, abstract where theirs are, whose arguments are bound by their names."""

import abc
import inspect
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

RECORDED = json.loads((Path(__file__).parent / "signatures.json").read_text())


def recorded(library: str, file: str, name: str):
    """A function's arguments, or a class as methods, abstract and attributes."""
    return RECORDED[library]["files"][file][name]


def arguments_of(text: str) -> list[inspect.Parameter]:
    """Of recorded arguments. Defaults that are names of theirs mean nothing here."""
    scope = {"AttentionType": SimpleNamespace(DECODER="decoder")}
    return list(inspect.signature(eval(f"lambda {text}: None", scope)).parameters.values())


def base(library: str, file: str, name: str, **attributes) -> type:
    """A class to inherit from: what its methods do is up to who inherits."""
    found = recorded(library, file, name)
    methods = {}
    for method in found["methods"]:
        if method == "__init__":
            continue
        methods[method] = _unknown(name, method, is_abstract=method in found["abstract"])
    return abc.ABCMeta(name, (), methods | attributes)


def _unknown(kind: str, name: str, is_abstract: bool):
    def method(*_, **__):
        raise NotImplementedError(f"{kind}.{name}")

    return abc.abstractmethod(method) if is_abstract else method


def values(library: str, file: str, name: str) -> SimpleNamespace:
    """An enum, whose members are their names in small letters."""
    return SimpleNamespace(**{member: member.lower() for member in recorded(library, file, name)["attributes"]})


def stub_modules(engine: str) -> dict[str, ModuleType]:
    """The modules that an adapter imports, by name; calls of functions are kept in their `calls`."""
    contents = _vllm() if engine == "vllm" else _sglang()
    modules = {}
    for path, names in contents.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        vars(modules[path]).update(names)
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(modules[parent], name, module)
    return modules


def _vllm() -> dict[str, dict]:
    file = "vllm/v1/attention/backend.py"

    class MultipleOf(int):
        pass

    def built(self, kv_cache_spec, layer_names, vllm_config, device):
        self.device = device

    registered, registry = {}, "vllm/v1/attention/backends/registry.py"
    assert arguments_of(recorded("vllm", registry, "register_backend"))[1].name == "class_path"
    names = {
        "AttentionBackend": base("vllm", file, "AttentionBackend"),
        "AttentionMetadata": base("vllm", file, "AttentionMetadata"),
        "AttentionMetadataBuilder": base("vllm", file, "AttentionMetadataBuilder", __init__=built),
        "AttentionImpl": base("vllm", file, "AttentionImpl"),
        "AttentionType": values("vllm", file, "AttentionType"),
        "AttentionCGSupport": values("vllm", file, "AttentionCGSupport"),
        "MultipleOf": MultipleOf,
    }
    return {
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.v1.attention.backend": names,
        "vllm.v1.attention.backends.fa_utils": {"reshape_and_cache_flash": store_as_vllm_does},
        "vllm.v1.attention.backends.registry": {"register_backend": registered.__setitem__, "registered": registered},
    }


def store_as_vllm_does(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    """reshape_and_cache_flash: rows of the cache by slots; -1 is none."""
    size = key_cache.shape[1]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // size, slot % size] = key[row]
            value_cache[slot // size, slot % size] = value[row]


def _sglang() -> dict[str, dict]:
    file = "sglang/srt/layers/attention/base_attn_backend.py"
    fields = recorded("sglang", "sglang/srt/mem_cache/memory_pool.py", "KVWriteLoc")["methods"]
    assert [x.name for x in arguments_of(fields["for_layer"])][1:3] == ["forward_batch", "layer"]
    location = SimpleNamespace(for_layer=lambda forward_batch, layer: forward_batch.out_cache_loc)
    backends, choices = {}, []

    def register(name):
        return lambda backend: backends.__setitem__(name, backend)

    deterministic = SimpleNamespace(enable_deterministic_inference=False)
    return {
        "sglang.srt.layers.attention.base_attn_backend": {
            "AttentionBackend": base("sglang", file, "AttentionBackend", __init__=lambda self: None)
        },
        "sglang.srt.layers.attention.attention_registry": {
            "register_attention_backend": register,
            "backends": backends,
        },
        "sglang.srt.layers.radix_attention": {
            "AttentionType": values("sglang", "sglang/srt/layers/radix_attention.py", "AttentionType")
        },
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": location},
        "sglang.srt.runtime_context": {"get_exec": lambda: SimpleNamespace(deterministic=deterministic)},
        "sglang.srt.server_args": {"add_attention_backend_choices": choices.extend, "choices": choices},
    }

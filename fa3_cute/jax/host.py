"""The calls on the CPU: the reference, in NumPy, slow and exact, for models and tests where there is no GPU."""

from typing import Any

import numpy as np

from .. import api
from ..contract.backward_reference import OPTIONS, Saved, backward_reference
from ..contract.rows import used_rows
from .calls import Choices, Tensors


def forward(choices: Choices, tensors: Tensors, wants_lse: bool) -> tuple[np.ndarray, ...]:
    """out, and the LSE if it is wanted."""
    arrays = {name: np.asarray(x) for name, x in tensors.items()}
    found: Any = api.attention(**arrays, **_options(choices), zero_padding=choices.zero_padding, return_lse=wants_lse)
    return found if wants_lse else (found,)


def backward(choices: Choices, tensors: Tensors) -> tuple[np.ndarray, ...]:
    """dq, dk, dv, and d_s_aux if there are sinks; of tensors as calls.backward_program has them."""
    arrays = {name: np.asarray(x) for name, x in tensors.items()}
    given = {name: value for name, value in (arrays | _options(choices)).items() if name in OPTIONS}
    saved = Saved(arrays["out"], arrays["softmax_lse"], arrays.get("dlse"))
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    exact: Any = backward_reference(q, k, v, dout, saved, **given)
    found = []
    for x, wide, of in zip((q, k, v), exact, "qkk", strict=True):
        gradient = np.zeros(x.shape, x.dtype)
        for rows in used_rows(wide, arrays.get(f"cu_seqlens_{of}"), arrays.get(f"seqused_{of}")):
            gradient[rows] = wide[rows].astype(x.dtype)
        found.append(gradient)
    return (*found, exact.d_s_aux.astype(np.float32)) if "s_aux" in arrays else tuple(found)


def _options(choices: Choices) -> dict[str, Any]:
    names = ("causal", "window_size", "softmax_scale", "softcap", "attention_chunk")
    return {name: getattr(choices, name) for name in names}

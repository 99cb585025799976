"""An engine on no GPU: the package's references over NumPy arrays, in float64, so that nothing is rounded."""

import numpy as np

from fa3_cute.contract.backward_reference import Saved, backward_reference
from fa3_cute.contract.merge_reference import merge_reference
from fa3_cute.contract.reference import attention_reference

from .plan import Call, Problem


class HostEngine:
    """Computes in NumPy; there are no streams, everything is done at once. Tensors are arrays [heads, rows, dim]."""

    def __init__(self, problem: Problem):
        self.problem = problem

    # ---- memory ------------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], kind: str) -> np.ndarray:
        return np.full(shape, np.nan)

    def empty_lse(self, heads: int, call: Call) -> np.ndarray:
        return np.full(heads * call.rows_q, np.nan)

    def upload(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float64)

    def download(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def heads(self, tensor: np.ndarray, first: int, count: int) -> np.ndarray:
        return tensor[first : first + count]

    def block(self, tensor: np.ndarray, head: int, first: int, rows: int) -> np.ndarray:
        return tensor[head, first : first + rows]

    def everything(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source

    def add(self, target: np.ndarray, parts: list[np.ndarray], factor: float) -> None:
        target[...] = factor * sum(parts)

    def clear(self, tensor: np.ndarray) -> None:
        tensor[...] = 0

    def clear_lse(self, lse: np.ndarray) -> None:
        lse[...] = -np.inf

    # ---- streams -----------------------------------------------------------------------------------------------------

    def exchange_waits(self) -> None: ...

    def arrival(self) -> None: ...

    def wait(self, arrival) -> None: ...

    # ---- attention ---------------------------------------------------------------------------------------------------

    def attend(self, call: Call, q, k, v, out, lse) -> None:
        found, found_lse = attention_reference(*self._inputs(call, q, k, v), **self._options(call))
        _put(found, _of_call(call, out))
        if lse is not None:
            own = lse.reshape(-1)[: found_lse.size].reshape(found_lse.shape)
            np.copyto(own, found_lse, where=~np.isnan(found_lse))  # other rows stay as they are

    def differentiate(self, call: Call, share, lse, found) -> None:
        """share: q, k, v, out; found: dout, and dq, dk, dv to be written."""
        out, dout, dq = (_of_call(call, tensor) for tensor in (share.out, found.dout, found.dq))
        inputs, options = self._inputs(call, share.q, share.k, share.v), self._options(call)
        saved = Saved(out=out, softmax_lse=lse.reshape(_lse_shape(call, len(share.q))))
        gradients = backward_reference(*inputs, dout, saved, **options)
        _put(gradients.dq, dq)
        for made, tensor in ((gradients.dk, found.dk), (gradients.dv, found.dv)):
            of_call = tensor.reshape(call.key_gradients, -1, *tensor.shape[1:]).transpose(0, 2, 1, 3)
            if call.is_packed:
                of_call = of_call[0]
            _put(made, of_call[:, : call.seqlen_k] if not call.is_packed else of_call)

    def merge(self, call: Call, out, lse, other, other_lse) -> None:
        """other, of the call's rows, into out."""
        rows = slice(call.first_q, None)
        other_lse = other_lse.reshape(-1)[: len(out) * call.rows_q].reshape(len(out), call.rows_q)
        pair = _rows_first(out[:, rows]), lse[:, rows], _rows_first(other[:, rows]), other_lse
        merged, lse[:, rows] = merge_reference(*pair)
        out[:, rows] = _rows_first(merged)

    def rounded(self, tensor, lse, target) -> None:
        target[...] = tensor

    def mean(self, pair: np.ndarray, target: np.ndarray) -> None:
        target[...] = (pair[: len(target)] + pair[len(target) :]) / 2

    def _inputs(self, call: Call, q, k, v):
        if call.is_packed:
            return _of_call(call, q), _rows_first(k), _rows_first(v)
        return _of_call(call, q), *(
            np.broadcast_to(_rows_first(x[:, : call.seqlen_k]), (call.batch, call.seqlen_k, len(x), x.shape[2]))
            for x in (k, v)
        )

    def _options(self, call: Call) -> dict:
        options: dict = {name: np.array(values) for name, values in call.lengths.items()}
        if call.is_masked and self.problem.window is not None:
            options["window_size"] = self.problem.window, 0
        else:
            options["causal"] = call.is_masked
        return options


def _rows_first(tensor: np.ndarray) -> np.ndarray:
    """[heads, rows, dim] <-> [rows, heads, dim]"""
    return tensor.swapaxes(0, 1)


def _of_call(call: Call, tensor: np.ndarray) -> np.ndarray:
    """The rows of a call as it has them: [rows, heads, dim], or [batch, seqlen_q, heads, dim]. A view."""
    rows = tensor[:, call.first_q : call.first_q + call.rows_q]
    if call.is_packed:
        return _rows_first(rows)
    heads, _, dim = tensor.shape
    return rows.reshape(heads, call.batch, call.seqlen_q, dim).transpose(1, 2, 0, 3)


def _lse_shape(call: Call, heads: int) -> tuple[int, ...]:
    return (heads, call.rows_q) if call.is_packed else (call.batch, heads, call.seqlen_q)


def _put(values: np.ndarray, target: np.ndarray) -> None:
    """What the reference made; rows that it left untouched are NaN there, and stay."""
    np.copyto(target, values, where=~np.isnan(values))

"""Backward problems on the GPU: inputs amid poison, gradients between guard bands, the call and its judgement."""

from dataclasses import replace
from functools import cached_property

import numpy as np
from backward_cases import NAMES, BackwardCase, check_case, expected_of, inputs_of
from check import DATA_TYPES
from images import POISON, Image, Tensor, contiguous

from fa3_cute import AttentionMode
from fa3_cute.contract.backward_params import BackwardParams
from fa3_cute.planning.backward_launch import workspace_bytes

WORKSPACE_GUARD = 4096


class BackwardProblem:
    """A case with its tensors on the device; rows that no sequence uses, and all that outputs hold, are poison.

    place    `place(name, shape, dtype)` lays a tensor out (images.py)
    inputs   of inputs_of, if not those
    """

    def __init__(self, case: BackwardCase, place=contiguous, inputs=None):
        self.case, self.inputs = case, inputs or inputs_of(case)
        elements = dict.fromkeys(NAMES, case.element_of_gradients)
        self.tensors: dict[str, Tensor] = {
            name: place(name, case.shape_of(name), elements.get(name, case.forward.dtype))
            for name in ("q", "out", "dout", "dq", "k", "v", "dk", "dv")
        }
        self.vectors = {"softmax_lse": contiguous("lse", self.inputs.lse.shape, "fp32")}
        if case.has_dlse:
            self.vectors["dlse"] = contiguous("dlse", self.inputs.lse.shape, "fp32")
        self.lengths = {name: contiguous(name, (len(values),), "int32") for name, values in case.lengths.items()}
        self.scores = self._place_scores()
        self.score_gradients = self._place_score_gradients()
        self.fill(self.inputs)

    def _place_scores(self) -> dict[str, Tensor]:
        """s_aux, alibi_slopes, attn_mask and rng_state, those that the case has."""
        forward = self.case.forward
        elements = {"s_aux": forward.sink_dtype, "alibi_slopes": "fp32", "rng_state": "uint64"}
        found = {
            name: contiguous(name, array.shape, elements[name])
            for name, array in self.inputs.scores.items()
            if name != "attn_mask"
        }
        return found | ({"attn_mask": self._place_mask(forward.attn_mask)} if forward.attn_mask else {})

    def _place_mask(self, element: str) -> Tensor:
        """Of the mask's shape, with its gaps between rows."""
        *outer, keys = self.inputs.scores["attn_mask"].shape
        image = Image((*outer, keys + self.case.forward.mask_gap), element)
        return image.tensor(image.whole[..., :keys])

    def _place_score_gradients(self) -> dict[str, Tensor]:
        """d_s_aux and d_bias, those that the case has."""
        forward = self.case.forward
        found = {"d_s_aux": contiguous("d_s_aux", (forward.num_heads,), "fp32")} if forward.sinks else {}
        return found | ({"d_bias": self._place_mask("fp32")} if forward.attn_mask not in ("", "bool") else {})

    def fill(self, inputs) -> None:
        """Bring these inputs to the device, poison the outputs."""
        self.inputs = inputs
        self.__dict__.pop("expected", None)
        values = {name: getattr(inputs, name) for name in ("q", "k", "v", "out", "dout")}
        values |= {"softmax_lse": inputs.lse, "dlse": inputs.dlse} | self.case.lengths | inputs.scores
        read = {name: tensor for name, tensor in self.all.items() if name not in NAMES}
        for name, tensor in read.items():
            tensor.array[...] = values[name]
        for image in {id(tensor.image): tensor.image for tensor in read.values()}.values():
            image.upload()
        self.poison()

    @property
    def all(self) -> dict[str, Tensor]:
        """Every tensor by its field, but for the gradients of what scores are changed with."""
        return self.tensors | self.vectors | self.lengths | self.scores

    def poison(self, stream=None) -> None:
        """Fill the outputs, at once or on `stream`. What is added to holds what it did before, at once."""
        for name in NAMES:
            if self.case.accumulates and name != "dq":
                self.tensors[name].array[...] = getattr(self.inputs, name)
                self.tensors[name].image.upload()
            else:
                self.tensors[name].poison(stream)
        for tensor in self.score_gradients.values():
            tensor.poison(stream)

    def params(self, **overrides) -> BackwardParams:
        """The problem as a call. Strides are given only of tensors that are not C-contiguous: defaults are used too."""
        forward, is_packed = self.case.forward, bool(self.case.layout)
        dims = ("row", "head") if is_packed else ("batch", "row", "head")
        fields = {name: tensor.address for name, tensor in self.all.items()} | {
            f"{name}_{dim}_stride": stride
            for name, tensor in self.tensors.items()
            if not tensor.array.flags.c_contiguous
            for dim, stride in zip(dims, tensor.strides, strict=False)
        }
        sizes = ("total_q", "total_k") if is_packed else ("seqlen_q", "seqlen_k")
        fields |= dict(zip(sizes, (forward.seqlen_q, forward.seqlen_k), strict=True))
        fields |= {"mode": AttentionMode.VARLEN_PREFILL} if is_packed else {}
        fields |= dict(zip(("window_size_left", "window_size_right"), forward.window, strict=True))
        fields |= {
            name: getattr(forward, name) for name in ("num_heads", "num_heads_k", "head_dim", "head_dim_v", "is_causal")
        }
        fields |= {"batch_size": forward.batch, "dtype": DATA_TYPES[forward.dtype]}
        fields |= self._score_fields()
        if self.case.grad_dtype:
            fields["grad_dtype"] = DATA_TYPES[self.case.grad_dtype]
        if self.case.accumulates:
            fields["accumulate_dkv"] = True
        return BackwardParams(**fields | overrides)

    def _score_fields(self) -> dict:
        """Of what scores are changed with; masks have a stride of 0 along what they are broadcast along."""
        forward = self.case.forward
        fields: dict = {name: tensor.address for name, tensor in self.score_gradients.items()}
        fields |= {name: getattr(forward, name) for name in ("softcap", "attention_chunk", "p_dropout")}
        if forward.sinks and forward.sink_dtype != "fp32":
            fields["s_aux_dtype"] = DATA_TYPES[forward.sink_dtype]
        if forward.alibi == "sequences":
            fields["alibi_batch_stride"] = forward.num_heads
        if forward.attn_mask:
            mask = self.scores["attn_mask"]
            for dim, size, stride in zip(("batch", "head", "row"), mask.array.shape, mask.strides, strict=False):
                fields[f"attn_mask_{dim}_stride"] = stride if size > 1 else 0
            fields["attn_mask_dtype"] = DATA_TYPES.get(forward.attn_mask)
        return fields

    def workspace(self, nbytes: int) -> tuple[dict[str, int], Tensor]:
        """(overrides of the params, tensor) of scratch memory of the caller's, full of NaN, between guard bands."""
        image = Image((nbytes,), "bool", guard=WORKSPACE_GUARD)
        image.upload()
        tensor = image.tensor(image.whole)
        return {"workspace": tensor.address, "workspace_bytes": nbytes}, tensor

    def run(self, stream, **overrides) -> tuple[np.ndarray | None, ...]:
        """`backward` over poisoned outputs, with a workspace if it needs one and none is given; returns `results`."""
        self.poison(stream)
        params = self.params(**overrides)
        nbytes = workspace_bytes(params)
        if "workspace" not in overrides and isinstance(nbytes, int) and nbytes:
            given, self.scratch = self.workspace(nbytes)  # which lives as long as the problem
            params = replace(params, **given)
        call(params, stream).check()
        return self.results(stream, *(bool(getattr(params, name)) for name in NAMES))

    def results(self, stream, *wanted: bool) -> tuple[np.ndarray | None, ...]:
        """dq, dk and dv as buffers hold them, after the work on `stream`, the memory around them checked; None if not
        wanted, and then not written."""
        found = []
        for name, is_wanted in zip(NAMES, wanted or (True,) * 3, strict=True):
            assert is_wanted or self.tensors[name].is_untouched(stream), f"{name} is not wanted, and written"
            found.append(self.tensors[name].read(stream) if is_wanted else None)
        return tuple(found)

    def score_results(self, stream) -> dict[str, np.ndarray]:
        """d_s_aux and d_bias likewise, those that the case has."""
        return {name: tensor.read(stream) for name, tensor in self.score_gradients.items()}

    @cached_property
    def expected(self):
        """(reference, twin)."""
        return expected_of(self.case, self.inputs)

    def check(self, dq, dk, dv, **of_scores) -> None:
        """Judge gradients (check_case); every bit of rows that no sequence uses is as it was."""
        check_case(self.case, self.inputs, dq, dk, dv, self.expected, **of_scores)
        used_q, used_k = self.case.is_used("q"), self.case.is_used("k")
        for name, got, is_used in zip(NAMES, (dq, dk, dv), (used_q, used_k, used_k), strict=True):
            if got is not None:
                written = (np.ascontiguousarray(got[~is_used]).view(np.uint8) != POISON).any()
                assert not written, f"{name}: rows are written that no sequence uses"


def call(params, stream):
    """`backward`."""
    from fa3_cute.api import backward

    return backward(params, stream)


def run_and_check(case: BackwardCase, stream, place=contiguous, **overrides) -> None:
    problem = BackwardProblem(case, place)
    problem.check(*problem.run(stream, **overrides), **problem.score_results(stream))

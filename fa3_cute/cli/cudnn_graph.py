"""cuDNN's FP8 attention through its Python frontend."""

from collections.abc import Callable

from .case import Case

# cuDNN's FP8 attention rounds P, at most 1, to E4M3 as P * P_SCALE, and its O, which is E4M3 on Hopper, as O * O_SCALE:
# small numbers then keep their bits, and no O of normal inputs, at most about 6, passes E4M3's largest number, 448.
P_SCALE, O_SCALE = 256.0, 64.0


class CudnnGraph:
    """cuDNN's FP8 attention of one case, built and with all its memory but Q, K and V: calls only execute it.

    Scales are per tensor: 1 for Q, K and V, P_SCALE and O_SCALE. O is E4M3: frontend and library have 16-bit O on
    Blackwell only.
    """

    def __init__(self, case: Case, cudnn, handle, torch):
        def scalar(value: float):
            return torch.full((1, 1, 1, 1), value, dtype=torch.float32, device="cuda")

        types = cudnn.data_type
        self.handle = handle
        self.graph = cudnn.pygraph(
            io_data_type=types.FP8_E4M3,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle,
        )
        self.out = torch.empty(case.q_shape, dtype=torch.float8_e4m3fn, device="cuda")
        layouts = {"q": case.q_shape, "k": case.kv_shape, "v": case.kv_shape}
        self.inputs = {
            name: self.graph.tensor(name=name, data_type=types.FP8_E4M3, **strided(shape))
            for name, shape in layouts.items()
        }
        scales = {
            "descale_q": 1.0,
            "descale_k": 1.0,
            "descale_v": 1.0,
            "descale_s": 1 / P_SCALE,
            "scale_s": P_SCALE,
            "scale_o": O_SCALE,
        }
        named = {
            name: self.graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=types.FLOAT) for name in scales
        }
        out, _, amax_p, amax_out = self.graph.sdpa_fp8(
            **self.inputs, **named, attn_scale=case.head_dim**-0.5, use_causal_mask=case.is_causal, generate_stats=False
        )
        layout = strided(case.q_shape)
        out.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(types.FP8_E4M3)
        for amax in (amax_p, amax_out):
            amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(types.FLOAT)
        self.graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
        self.memory = {named[name]: scalar(value) for name, value in scales.items()}
        self.memory |= {out: self.out.transpose(1, 2), amax_p: scalar(0), amax_out: scalar(0)}

    def launch(self, q, k, v) -> Callable:
        """A call that reads these tensors [batch, heads, rows, head_dim]."""
        memory = self.memory | dict(zip(self.inputs.values(), (q, k, v), strict=True))

        def launch():
            self.graph.execute(memory, self.workspace, handle=self.handle)
            return self.out

        return launch


def strided(shape: tuple[int, ...]) -> dict[str, list[int]]:
    """cuDNN's description of contiguous [batch, rows, heads, head_dim] as [batch, heads, rows, head_dim]."""
    batch, rows, heads, head_dim = shape
    width = heads * head_dim
    return {"dim": [batch, heads, rows, head_dim], "stride": [rows * width, head_dim, width, 1]}

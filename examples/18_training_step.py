"""Training steps: forward with its LSE, backward, gradient descent on q, k and v. FP16, causal, grouped heads, 2 x 150
tokens. The gradients are checked at some places by finite differences of the reference.

Without a Hopper GPU: compiles the same kernel for sm_90a, shows what came out, computes the example in NumPy.
"""

from functools import partial

import numpy as np

from fa3_cute import BackwardParams, DataType, FlashAttentionParams, backward, backward_workspace_size, forward
from fa3_cute.arrays.memory import download, hopper_device_problem, open_device, upload
from fa3_cute.contract.backward_reference import backward_reference, backward_twin
from fa3_cute.contract.reference import attention_reference, low_precision_twin

BATCH, SEQLEN, HEADS, HEADS_K, HEAD_DIM = 2, 150, 4, 2, 64
STEPS, RATE, PLACES, STEP_SIZE = 3, 0.05, 8, 1e-4


def loss_of(out, target) -> float:
    """Half the squared distance; its gradient is out - target."""
    return 0.5 * np.square(out.astype(np.float64) - target).sum()


def on_gpu(q, k, v, target):
    """Returns a function: q, k, v -> out and its gradients, as NumPy arrays. All memory is made here, once."""
    device = open_device()
    stream = device.create_stream()
    inputs, outputs = {"q": q, "k": k, "v": v}, {"out": q, "dout": q, "dq": q, "dk": k, "dv": v}
    buffers = {name: device.allocate(array.nbytes, stream=stream) for name, array in (inputs | outputs).items()}
    buffers["softmax_lse"] = device.allocate(4 * BATCH * HEADS * SEQLEN, stream=stream)
    address = {name: int(buffer.handle) for name, buffer in buffers.items()}
    call = {"batch_size": BATCH, "seqlen_q": SEQLEN, "seqlen_k": SEQLEN, "num_heads": HEADS, "num_heads_k": HEADS_K}
    call |= {"head_dim": HEAD_DIM, "is_causal": True, "dtype": DataType.FP16}
    call |= {name: address[name] for name in ("q", "k", "v", "out", "softmax_lse")}
    ahead = FlashAttentionParams(**call)
    back = BackwardParams(**call)  # with deterministic=True dq has the same bits every time too
    back.dout, back.dq, back.dk, back.dv = (address[name] for name in ("dout", "dq", "dk", "dv"))
    back.workspace_bytes = backward_workspace_size(back)
    buffers["workspace"] = device.allocate(back.workspace_bytes, stream=stream)
    back.workspace = int(buffers["workspace"].handle)
    print(f"{device.name}: {STEPS} steps, a workspace of {back.workspace_bytes} bytes")

    def step(q, k, v):
        for name, array in zip("qkv", (q, k, v), strict=True):
            upload(array, buffers[name], stream=stream)
        forward(ahead, stream).check()
        out = download(buffers["out"], q.shape, np.float16, stream=stream)
        upload((out - target).astype(np.float16), buffers["dout"], stream=stream)
        backward(back, stream).check()
        return out, [download(buffers[f"d{x}"], inputs[x].shape, np.float16, stream=stream) for x in "qkv"]

    return step


def in_numpy(target, q, k, v):
    """The same step, rounded where the kernels round."""
    out = low_precision_twin(q, k, v, "fp16", causal=True)[0]
    return out, backward_twin(q, k, v, (out - target).astype(np.float16), "fp16", causal=True)


def compile_only():
    """What ptxas made of the main kernel of `backward`."""
    from fa3_cute.planning.backward_kernels import kernels_of, pass_config
    from fa3_cute.runtime.compiler import compile_report

    _, main_kernel = kernels_of(pass_config("fp16", HEAD_DIM, "causal", False, False))
    report = compile_report(main_kernel)
    print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")


def slope(tensors, which: int, place, target) -> float:
    """The derivative of the loss in one number of q, k or v, by the reference on either side of it."""
    losses = []
    for step in (STEP_SIZE, -STEP_SIZE):
        moved = [tensor.astype(np.float64) for tensor in tensors]
        moved[which][place] += step
        losses.append(loss_of(attention_reference(*moved, causal=True)[0], target))
    return (losses[0] - losses[1]) / (2 * STEP_SIZE)


def main() -> int:
    rng = np.random.default_rng(0)
    q, target = rng.standard_normal((2, BATCH, SEQLEN, HEADS, HEAD_DIM), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, BATCH, SEQLEN, HEADS_K, HEAD_DIM), np.float32).astype(np.float16)
    tensors, rounded = [q, k, v], in_numpy(target, q, k, v)[1]
    exact = backward_reference(q, k, v, attention_reference(q, k, v, causal=True)[0] - target, causal=True)
    if problem := hopper_device_problem():
        print(f"No Hopper GPU here ({problem}): compiling the kernel, computing the example in NumPy.")
        compile_only()
    step = partial(in_numpy, target) if problem else on_gpu(q, k, v, target)

    losses, is_right = [], True
    for number in range(STEPS):
        out, gradients = step(*tensors)
        losses.append(loss_of(out, target))
        for which, name in enumerate("qkv" if number == 0 else ""):
            places = [tuple(rng.integers(0, gradients[which].shape)) for _ in range(PLACES)]
            error = max(abs(gradients[which][at] - slope(tensors, which, at, target)) for at in places)
            allowed = 2 * np.abs(rounded[which] - exact[which]).max() + 1e-5  # the error that FP16 explains, twice
            print(f"d{name}: largest error against finite differences {error:.1e}, allowed {allowed:.1e}")
            is_right &= bool(error <= allowed)
        tensors = [(x - RATE * dx).astype(np.float16) for x, dx in zip(tensors, gradients, strict=True)]
    print("loss " + ", ".join(f"{loss:.0f}" for loss in losses))
    return 0 if is_right and losses == sorted(losses, reverse=True) else 1


if __name__ == "__main__":
    raise SystemExit(main())

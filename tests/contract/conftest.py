"""Stand-ins for the launcher and for device memory."""

from types import SimpleNamespace

import pytest
from fake_gpu import FakeGpu
from images import cuda

from fa3_cute import api
from fa3_cute.runtime.launch import CudaFailure, NotWarmedUp, UnsupportedDevice, addresses_of, resolve_stream


@pytest.fixture
def launches(monkeypatch):
    """Stands in for launch.py and lists what it is asked for."""
    calls = []

    class Call:
        can_repeat = False

        def repeat(self, addresses, stream):
            calls.extend([("repeat", addresses, stream)] * self.can_repeat)
            return self.can_repeat

        def launch(self, addresses, stream):
            calls.append(("again", addresses, stream))

    def launch(step, shape, addresses, stream):
        calls.append(("launch", addresses, step.config, stream))
        return stub.call

    stub = SimpleNamespace(
        call=Call(),
        launch=launch,
        launch_all=lambda steps, *call: [stub.launch(step, *call) for step in steps][-1],
        addresses_of=addresses_of,
        resolve_stream=resolve_stream,
        ensure_loaded=lambda cfg, stream: calls.append(("load", cfg, stream)),
        prepare_workspace=lambda step, shape, stream: calls.extend(
            [("prepare", step.config, stream)] * (step.scratch == "splits")
        ),
        CudaFailure=CudaFailure,
        UnsupportedDevice=UnsupportedDevice,
        NotWarmedUp=NotWarmedUp,
    )
    monkeypatch.setattr(api, "_launcher", lambda: stub)
    monkeypatch.setattr(api, "_thread", api._Thread())
    return SimpleNamespace(calls=calls, stub=stub)


@pytest.fixture
def gpu(monkeypatch):
    """Device memory on the host, in which problems can be made."""
    gpu = FakeGpu()
    fakes = {
        "allocate": gpu.allocate,
        "upload": gpu.upload,
        "download": gpu.download,
        "address": lambda buffer, offset=0: buffer.handle + offset,
        "fill": lambda buffer, byte, stream=None: buffer.bytes.fill(byte),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(cuda, name, fake)
    return gpu

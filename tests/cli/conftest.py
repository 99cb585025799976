"""A GPU for the commands that time kernels."""

import pytest
from fake_gpu import fake_stopwatch, install

from fa3_cute.runtime import launch
from fa3_cute.cli import bench, trial
from fa3_cute.cli.suites import prefill


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU under the rig; its launches are right."""
    fake = install(monkeypatch)
    monkeypatch.setattr(prefill, "TOKENS", 512)
    monkeypatch.setattr(trial, "open_device", bench.open_device)
    monkeypatch.setattr(trial, "download", fake.download)
    monkeypatch.setattr(trial, "Stopwatch", lambda device, stream: fake_stopwatch(stream, monkeypatch))
    monkeypatch.setattr(launch, "launch_through", lambda params, cfg, stream: fake.forward(params, stream))
    return fake

"""Why the CUDA kernels cannot run: every reason, from what torch, the driver and the build say of themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pyarith.errors import BackendError
from pyarith.ops import _native

DEVICE = torch.device("cuda", 0)
ARCHS = "80-real 90a-real 100-real 100-virtual"


@pytest.mark.parametrize(
    "archs, runs, refused",
    (
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("90a-virtual", [(9, 0)], [(9, 1), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("100f-virtual", [(10, 3)], [(9, 0), (12, 0)]),
        ("100-virtual", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),  # machine code and PTX
        ("120-real", [(12, 0), (12, 1)], [(10, 0), (10, 3), (2, 0)]),
        (ARCHS, [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 5), (9, 1)]),
        ("native", [(8, 0), (12, 0)], []),
        ("", [], [(9, 0)]),
    ),
)
def test_which_code_runs_where(archs, runs, refused):
    assert all(_native.runs_code_of(archs, capability) for capability in runs)
    assert not any(_native.runs_code_of(archs, capability) for capability in refused)


@pytest.fixture
def machine(monkeypatch):
    """An H200 with everything in place; returns what a test may take away from it."""
    state = SimpleNamespace(
        build=dict(cuda=True, cuda_archs=ARCHS), versions=(13000, 13000), capability=(9, 0), available=True, error=None
    )

    def init():
        if state.error is not None:
            raise RuntimeError(state.error)

    extension = SimpleNamespace(build_info=lambda: state.build, cuda_versions=lambda: state.versions)
    monkeypatch.setattr(_native, "C", extension)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.available)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    return state


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_nothing_is_missing(machine, dtype):
    assert _native.why_not_cuda(DEVICE, dtype) is None


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(build=dict(cuda=False)), ["built without CUDA", "nvcc", "PYARITH_CUDA=1"]),
        (
            dict(available=False, error="Found no NVIDIA driver on your system. Please check\nthat you have one"),
            ["torch cannot start CUDA: Found no NVIDIA driver on your system. Please check (see", "nvidia-smi"],
        ),
        (
            dict(available=False, error="The NVIDIA driver on your system is too old (found version 11040)."),
            ["too old (found version 11040)"],
        ),
        (dict(available=False, error=""), ["torch cannot start CUDA: no reason given"]),
        (dict(available=False), ["torch sees no CUDA device", "CUDA_VISIBLE_DEVICES"]),
        (
            dict(versions=(12080, 13010)),
            ["driver supports CUDA 12.8", "built with CUDA 13.1", "update the driver", "nvcc of CUDA 12"],
        ),
        (dict(capability=(7, 5)), ["need compute capability 8.0, this device has 7.5", "backend='reference'"]),
        (
            dict(build=dict(cuda=True, cuda_archs="90a-real 100-real")),
            ["code for 90a-real 100-real, none for", "8.6", "PYARITH_CUDA_ARCHS=86-real"],
        ),
    ),
    ids=lambda value: "" if isinstance(value, list) else "-".join(value),
)
def test_each_reason_is_one_line_with_the_remedy(machine, changed, words):
    if "8.6" in words:
        machine.capability = (8, 6)
    for name, value in changed.items():
        setattr(machine, name, value)
    reason = _native.why_not_cuda(DEVICE, torch.float32)
    assert reason is not None and "\n" not in reason
    for word in words:
        assert word in reason, reason


def test_a_newer_toolkit_of_the_same_major_version_runs(machine):
    machine.versions = (13000, 13020)
    assert _native.why_not_cuda(DEVICE, torch.float32) is None


def test_dtype(machine):
    reason = _native.why_not_cuda(DEVICE, torch.float64)
    assert reason is not None and "not in torch.float64" in reason and "backend='reference'" in reason


def test_torch_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("CUDA must not be started"))
    reason = _native.why_not_cuda(DEVICE, torch.float32)
    assert reason == f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"


def test_extension_not_built(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "_load_error", "pyarith._C cannot be loaded (gone); build it with `pip install .`")
    assert "build it with `pip install .`" in str(_native.why_not_cuda(DEVICE, torch.float32))


def test_the_extension_knows_its_versions():
    if _native.C is None or not _native.C.build_info()["cuda"]:
        pytest.skip("the extension is not built with CUDA")
    driver, runtime = _native.C.cuda_versions()
    assert runtime >= 12000 and (driver == 0 or driver >= 10000)


def test_an_error_of_a_launch_is_a_backend_error(monkeypatch):
    calls = []

    def kernel(*tensors, **scalars):
        calls.append((tensors, scalars))
        if scalars["eps"]:
            raise RuntimeError("an illegal memory access was encountered")

    class Device:
        def __init__(self, device):
            assert device == torch.device("cpu")

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(_native, "C", SimpleNamespace(some_cuda=kernel))
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    row = torch.zeros(3)
    _native.launch("some_cuda", row, None, eps=0.0)
    assert calls == [((row, None), dict(eps=0.0, stream=77))]
    with pytest.raises(BackendError) as caught:
        _native.launch("some_cuda", row, None, eps=1.0)
    for words in ("some_cuda", "refused the launch on cpu", "illegal memory access", "CUDA_LAUNCH_BLOCKING=1"):
        assert words in str(caught.value)

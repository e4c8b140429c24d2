"""What Triton needs to build its launcher is looked for before the first merge."""

import sysconfig

import pytest
import torch

from mindspeed_cp.kernels import choose_merge_kernel, triton_merge


@pytest.fixture
def looked_for_anew():
    triton_merge.missing.cache_clear()
    yield
    triton_merge.missing.cache_clear()


@pytest.mark.parametrize("headers", [True, False])
def test_plain_torch_merges_where_pythons_headers_are_missing(looked_for_anew, headers, tmp_path, monkeypatch):
    schemes = {"posix_prefix": {"include": str(tmp_path)}}
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: schemes[scheme])
    monkeypatch.setattr(triton_merge, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    if headers:
        (tmp_path / "Python.h").touch()
    assert choose_merge_kernel("cuda", torch.bfloat16).name == ("triton" if headers else "torch")
    reason = f"triton needs Python's headers, and there is no Python.h in {tmp_path}: install python3-dev"
    assert triton_merge.missing() == (() if headers else (reason,))

"""Binding a call's arguments by name costs every layer in every micro-batch: signatures are read once."""

import inspect

from mindspeed_cp.patching import bind_by_name


def test_a_signature_is_read_once(monkeypatch):
    def function(config, size=1):
        pass

    read, signature = [], inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda called: read.append(called) or signature(called))
    for config in ("one", "another"):
        assert bind_by_name(function, (config,), {}) == {"config": config, "size": 1}
    assert read == [function]

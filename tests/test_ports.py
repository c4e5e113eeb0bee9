"""Free ports."""

from __future__ import annotations

import socket

import pytest

from serving import ports


def test_free_ports_are_free_and_different(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        (first, *others) = ports.free_ports(4)
        assert len({first, *others}) == 4
        taken.bind(("127.0.0.1", first))
        monkeypatch.setattr(ports, "UNASSIGNED", range(first, first + 1))
        with pytest.raises(OSError, match="only 0 ports"):
            ports.free_ports(1)

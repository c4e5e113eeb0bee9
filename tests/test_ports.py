"""Free ports."""

import socket

import pytest

from ade_base import ports


def test_free_ports_are_free_and_different(monkeypatch):
    with socket.socket() as taken:
        (first, *others) = ports.free_ports(4)
        assert len({first, *others}) == 4
        taken.bind(("127.0.0.1", first))
        monkeypatch.setattr(ports, "UNASSIGNED", range(first, first + 1))
        with pytest.raises(OSError, match="only 0 ports"):
            ports.free_ports(1)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_metrics_need_a_free_port_on_loopback_wherever_else_they_are(host):
    found = ports.Ports(*ports.free_ports(3))
    with socket.create_server(("127.0.0.1", found.metrics)):
        for exposes_metrics in (False, True):
            with pytest.raises(ports.PortError, match="ADE_METRICS_PORT"):
                found.check_free(host, exposes_metrics)


def test_an_empty_host_is_refused():
    """As of a variable that is not set; it would be every address."""
    with pytest.raises(ports.PortError, match="--host takes an address .*, got an empty text"):
        ports.Ports(*ports.free_ports(3)).check_free("")

"""deploy/nginx.conf with a real nginx in front of a real service."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import time

import httpx
import numpy as np
import pytest

from ade_base.ports import free_ports
from ade_client.client import AdeClient
from tests.helpers import ROOT, npy, wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
KEY = "0123456789abcdef0123456789abcdef"
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NGINX is None, reason="nginx is not installed (apt-get install nginx-light)"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def proxy(service, folder):
    """Run the file with other ports and a low rate; yields the address."""
    (outer,) = free_ports(1)
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    # One request per second after a burst of a hundred: even a slow machine exceeds that.
    for old, new in (
        ("listen 443", f"listen 127.0.0.1:{outer}"),
        ("127.0.0.1:8080", f"127.0.0.1:{service.ports['inference']}"),
        ("127.0.0.1:7860", f"127.0.0.1:{service.ports['ui']}"),
        ("rate=50r/s", "rate=1r/s"),
        ("client_header_timeout 10s", "client_header_timeout 4s"),
        ("client_body_timeout 20s", "client_body_timeout 4s"),
        ("send_timeout 20s", "send_timeout 4s"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    (folder / "secrets").mkdir()
    (folder / "secrets" / "keys.conf").write_text(f'"{KEY}" tests;\n')
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            str(folder / "secrets" / "key.pem"),
            "-out",
            str(folder / "secrets" / "certificate.pem"),
        ],
        check=True,
        capture_output=True,
    )
    assert NGINX is not None
    process = subprocess.Popen(
        [NGINX, "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"],
        stderr=subprocess.DEVNULL,
    )
    url = f"https://127.0.0.1:{outer}"
    for _ in range(100):
        if process.poll() is not None:
            raise RuntimeError((folder / "error.log").read_text())
        try:
            httpx.get(f"{url}/healthz", verify=False, timeout=30)
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait(10)
    log = (folder / "access.log").read_text()
    assert KEY not in log and '"client":"tests"' in log


def ask(proxy, path, key=KEY, method="POST", **options):
    headers = {
        **({} if key is None else {"Authorization": f"Bearer {key}"}),
        **options.pop("headers", {}),
    }
    return httpx.request(method, proxy + path, headers=headers, verify=False, timeout=60, **options)


def raw(proxy, request):
    """Send what no client library would send."""
    host, port = proxy.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), 60) as plain,
        unverified().wrap_socket(plain) as connection,
    ):
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


@contextlib.contextmanager
def slow_client(proxy, request):
    """Sends a part of a request, or a whole one, and receives little at a time."""
    host, port = proxy.removeprefix("https://").split(":")
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        plain.settimeout(60)
        plain.connect((host, int(port)))
        with unverified().wrap_socket(plain) as connection:
            connection.sendall(request)
            yield connection


def head_of(size, content_type="image/png"):
    return (
        f"POST /v1/encode HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


def code_of(answer):
    body = answer.json()
    assert answer.headers["content-type"].startswith("application/json")
    assert set(body) == {"error"} and {"code", "message"} <= set(body["error"]), body
    return body["error"]["code"]


def test_operations_under_short_paths(proxy, service):
    data = EXAMPLE.read_bytes()
    direct = httpx.post(f"{service.url}/predictions/score", content=data)
    answer = ask(proxy, "/v1/score", content=data, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200 and answer.content == direct.content
    assert answer.headers["x-ade-model"] == direct.headers["x-ade-model"]
    (name,) = answer.headers.get_list("x-request-id")
    # The id of the service, as in its journal.
    assert len(name) == len(direct.headers["x-request-id"]) == 36
    assert "access-control-allow-origin" not in answer.headers
    # With the headers that AdeClient sends.
    long = ask(proxy, "/predictions/score", content=data, headers={"Content-Type": "image/png"})
    assert long.status_code == 200 and long.content == direct.content
    # Dropped in silence, the level would be the default one.
    query = ask(proxy, "/v1/score?alpha=0.2", content=data)
    assert query.status_code == 400 and code_of(query) == "malformed_request"
    sample = ask(proxy, "/v1/sample", json={"n": 2, "seed": 1})
    assert sample.content.startswith(b"\x89PNG") and sample.headers["content-type"] == "image/png"
    form = ask(proxy, "/v1/score", files={"image": EXAMPLE.read_bytes()}, data={"alpha": "0.05"})
    assert form.json()["alpha"] == 0.05
    images = np.zeros((256, 32, 32, 3), np.uint8)
    many = ask(
        proxy, "/v1/score", content=npy(images), headers={"Content-Type": "application/x-npy"}
    )
    assert many.status_code == 200 and len(many.json()["results"]) == 256, many.text[:300]


def test_health_and_contract_need_no_key(proxy):
    assert ask(proxy, "/healthz", key=None, method="GET").json() == {"ready": True}
    document = ask(proxy, "/v1/openapi.json", key=None, method="GET").json()
    assert document["servers"] == [{"url": proxy}]
    assert sorted(document["paths"]) == [
        f"/v1/{name}" for name in ("encode", "reconstruct", "sample", "score")
    ]
    (scheme,) = document["security"][0]
    assert document["components"]["securitySchemes"][scheme] == {"type": "http", "scheme": "bearer"}


def test_a_host_is_not_copied_into_the_contract_as_it_is(proxy):
    answer = ask(proxy, "/v1/openapi.json", key=None, method="GET", headers={"Host": 'a","x":"b'})
    assert answer.json()["servers"] == [{"url": "https://localhost"}]


@pytest.mark.parametrize("key", [None, "wrong", KEY[:-1], KEY + "x", KEY.upper(), f"{KEY}' OR 1"])
def test_keys(proxy, key):
    answer = ask(proxy, "/v1/sample", key=key, json={})
    assert answer.status_code == 401 and code_of(answer) == "bad_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"] and answer.headers["strict-transport-security"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "retry-after" not in (answer.headers)


def test_the_client_behind_the_proxy(proxy, folder, monkeypatch):
    """With a certificate of one's own."""
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "secrets" / "certificate.pem"))
    with AdeClient(proxy, token=KEY) as client:
        assert len(client.sample(2, seed=1).images) == 2


def test_a_key_that_was_replaced_is_refused_after_a_reload(proxy, folder):
    """By the documented command; its file may be renamed over the old one."""
    page = (ROOT / "docs" / "how-to" / "open-to-a-network.md").read_text()
    (options,) = re.findall(r"^sudo nginx (.* -s reload)$", page, re.MULTILINE)
    keys, old, new = folder / "secrets" / "keys.conf", "a" * 32, "b" * 32

    def is_taken(key):
        status = ask(proxy, "/v1/sample", key, json={"n": 500}).status_code
        assert status in (401, 422)
        return status == 422

    def replace(text):
        (folder / "new").write_text(text)
        (folder / "new").rename(keys)
        assert NGINX is not None
        subprocess.run([NGINX, *options.split()], cwd=folder, check=True)

    # The other tests' key stays; clients of their own, whose rates these requests do not exceed.
    before = keys.read_text()
    try:
        for valid, refused in ((old, new), (new, old)):
            replace(f'{before}"{valid}" {valid};\n')
            # For a moment the processes of before answer, too.
            wait_for(lambda new=valid, old=refused: is_taken(new) and not is_taken(old))
    finally:
        replace(before)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_the_scheme_of_a_key_has_any_case(proxy, scheme):
    answer = ask(proxy, "/v1/sample", None, json={}, headers={"Authorization": f"{scheme} {KEY}"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/predictions/other",
        "/predictions/",
        "/models",
        "/v1/",
        "/v1/score/",
        "/metrics",
        "/v1/../models",
    ],
)
def test_nothing_else_is_reached(proxy, path):
    answer = ask(proxy, path, method="GET")
    assert answer.status_code == 404 and code_of(answer) == "not_found"


def test_errors_of_every_origin_have_one_shape(proxy):
    ours = ask(proxy, "/v1/score", content=b"junk")
    assert ours.status_code == 415 and code_of(ours) == "not_an_image"
    empty = ask(proxy, "/v1/score", json={"images": []})
    assert empty.status_code == 400 and code_of(empty) == "malformed_request"
    assert code_of(ask(proxy, "/v1/sample", json={"n": 500})) == "bad_parameter"
    unknown = ask(proxy, "/v1/other-score", content=b"x")  # TorchServe's
    assert unknown.status_code == 404 and code_of(unknown) == "unknown_model"
    large = ask(proxy, "/v1/score", content=b"x" * (33 * 2**20))  # nginx's
    assert large.status_code == 413 and code_of(large) == "request_too_large"
    wrong = ask(proxy, "/v1/score", method="GET")
    assert wrong.status_code == 405 and code_of(wrong) == "not_allowed"
    assert ask(proxy, "/v1/score", method="OPTIONS").status_code == 405  # no CORS
    long = {"X-Long": "x" * 40_000}
    head = ask(proxy, "/v1/score", headers=long)
    assert head.status_code == 431 and code_of(head) == "headers_too_large"
    address = ask(proxy, "/" + "x" * 40_000)
    assert address.status_code == 431 and code_of(address) == "headers_too_large"


@pytest.mark.parametrize(
    "path, method, allowed",
    [
        ("/v1/score", "GET", "POST, PUT"),
        ("/predictions/tiny-1.0-score", "PATCH", "POST, PUT"),
        ("/v1/score", "TRACE", "POST, PUT"),
        ("/healthz", "POST", "GET, HEAD"),
        ("/v1/openapi.json", "DELETE", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(proxy, path, method, allowed):
    answer = ask(proxy, path, method=method)
    assert answer.status_code == 405 and code_of(answer) == "not_allowed"
    assert answer.headers.get_list("allow") == [allowed]


@pytest.mark.parametrize("path", ["/healthz", "/v1/openapi.json"])
def test_open_paths_take_no_body(proxy, path):
    """nginx would hold it in memory, of any address and without a key."""
    answer = ask(proxy, path, key=None, method="GET", content=bytes(2048))
    assert answer.status_code == 413 and code_of(answer) == "request_too_large"


def test_pages_of_errors_have_no_address(proxy):
    for path in ("/malformed", "/head_too_large", "/plain_http", "/not_implemented"):
        assert ask(proxy, path, method="GET").status_code == 404


@pytest.mark.parametrize(
    "head, status, code",
    [
        (b"GET \x01 HTTP/1.1", 400, "malformed_request"),
        (b"GET /healthz HTTP/3.0", 501, "not_implemented"),
        (b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip", 501, "not_implemented"),
    ],
)
def test_what_nginx_cannot_read_has_the_same_shape(proxy, head, status, code):
    answer = raw(proxy, head + b"\r\n\r\n")
    assert answer.status_code == status and code_of(answer) == code


def test_only_bodies_in_tiny_chunks_leave_the_memory(proxy, folder):
    written = str(folder / "body")  # in a warning, or in an error if root runs the tests
    for content in (b"x" * 20_000_000, iter([b"x" * 10_000] * 2_000)):
        code_of(ask(proxy, "/v1/score", content=content))
    assert written not in (folder / "error.log").read_text()
    head = f"PUT /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    chunks = b"1\r\nx\r\n" * (33 * 2**20 // 6) + b"0\r\n\r\n"
    code_of(raw(proxy, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks))
    assert written in (folder / "error.log").read_text()


@pytest.mark.parametrize(
    "request_", [b"", b"POST /v1/encode HTTP/1.1\r\nHost: x\r\n", head_of(10**6) + bytes(10**5)]
)
def test_a_request_that_stalls_ends_and_never_reaches_the_service(proxy, folder, request_):
    with slow_client(proxy, request_) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while connection.recv(2**16):
                pass
        assert time.monotonic() - started < 30
    lines = map(json.loads, (folder / "access.log").read_text().splitlines())
    assert not any(one["upstream"] for one in lines if one["request"] == "POST /v1/encode")


def test_a_client_that_does_not_read_holds_nothing_of_the_service(proxy, folder):
    """nginx takes the whole answer from the service at once, then waits for the client alone."""
    images = npy(np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), np.uint8))
    form = httpx.Request("POST", proxy, files={"image": images}, data={"format": "npz"})
    body = form.read()

    def unread():
        lines = [json.loads(one) for one in (folder / "access.log").read_text().splitlines()]
        return [one for one in lines if one["request"] == "POST /v1/encode" and one["upstream"]]

    with slow_client(proxy, head_of(len(body), form.headers["content-type"]) + body) as connection:
        assert connection.recv(1) == b"H"
        wait_for(unread, 60)
    (logged,) = unread()
    assert logged["bytes_out"] < 10**7 and logged["status"] == 200
    assert float(logged["upstream"]) < logged["seconds"] - 3, logged


def test_http_2(proxy):
    done = subprocess.run(
        ["curl", "-ks", "--http2", "-w", "%{http_version}", "-T", EXAMPLE, f"{proxy}/v1/score"]
        + ["-H", f"Authorization: Bearer {KEY}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"bpd"' in done.stdout and done.stdout.endswith("}2"), done.stdout[-300:]


def unverified():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_tls_is_modern_and_plain_text_is_refused(proxy):
    old, weak = unverified(), unverified()
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("AES128-SHA:ECDHE-RSA-AES128-SHA:@SECLEVEL=0")
    for context in (old, weak):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{proxy}/healthz", verify=context)
    answer = httpx.get(proxy.replace("https", "http") + "/healthz")
    assert answer.status_code == 400 and code_of(answer) == "malformed_request"


def test_an_address_has_a_rate_without_a_key(proxy):
    with httpx.Client(verify=False, timeout=60) as client:
        answers = [client.get(f"{proxy}/v1/openapi.json") for _ in range(100)]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert "rate_limited" in {code_of(a) for a in answers if a.status_code == 429}


def test_a_key_has_a_rate(proxy):
    with httpx.Client(
        verify=False, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as client:
        answers = [client.post(f"{proxy}/v1/score", content=b"junk") for _ in range(400)]
    assert {answer.status_code for answer in answers} == {415, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert code_of(refused) == "rate_limited" and refused.headers["retry-after"] == "1"
    assert refused.headers["x-request-id"] and "www-authenticate" not in refused.headers

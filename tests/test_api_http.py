"""HTTP around the protocols: keys, ids, encodings, paths, sockets, certificates, and what is no HTTP at all."""

import datetime
import gzip
import json
import logging
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import live_server
from api import connection
from api.launch import check_certificate, listen_on_file
from api.server import Server, Settings
from openai_api import parse_args, read_credentials
from qwen import QwenError, QWenTokenizer

KEY = "sk-secret"
PAGE = "https://page.example"
CHAT = {"messages": [{"role": "user", "content": "say: ok"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server(tokenizer: QWenTokenizer) -> Server:
    settings = Settings(credentials=[f"Bearer {KEY}"], cors_origins=[PAGE], max_body=20_000, root_path="/qwen")
    return live_server.make_server(tokenizer, settings)


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with live_server.run_server(server) as address:
        yield address


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"bearer {KEY}"}, {"authorization": f"BEARER  {KEY}"}, {"x-api-key": KEY}]
)
def test_keys_in_every_form(address: str, headers: dict) -> None:
    assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
    wrong = {name: value + "x" for name, value in headers.items()}
    assert httpx.get(f"{address}/v1/models", headers=wrong).status_code == 401


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# whose\none\n\n  two  \n")
    assert read_credentials(parse_args(["--api-key-file", str(file)])) == ["Bearer one", "Bearer two"]


def test_pages_may_call_with_the_headers_of_their_client(http: httpx.Client) -> None:
    names = "authorization,content-type,x-api-key,anthropic-version,x-stainless-arch,x-stainless-retry-count"
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    response = http.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == PAGE
    allowed = response.headers["access-control-allow-headers"]
    assert allowed == "*" or set(names.split(",")) <= {name.strip().lower() for name in allowed.split(",")}
    # Without asking, a page may only send what is not JSON, and that is not read.
    sly = http.post(
        "/v1/chat/completions", content=json.dumps(CHAT), headers={"Origin": PAGE, "Content-Type": "text/plain"}
    )
    assert sly.status_code == 400


def test_ids_of_requests(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qwen.access")
    response = http.post("/v1/chat/completions", json={**CHAT, "foo": 1}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "mine-1"
    deadline = time.monotonic() + 5
    while "mine-1" not in caplog.text and time.monotonic() < deadline:  # the line comes after the answer
        time.sleep(0.01)
    assert "/v1/chat/completions 400" in caplog.text and "mine-1" in caplog.text and KEY not in caplog.text
    made = http.get("/v1/models", headers={"x-request-id": "bad id " + "x" * 200}).headers["x-request-id"]
    assert made.startswith("req_")
    streamed = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert streamed.headers["x-request-id"].startswith("req_") != made


def test_a_log_of_json_lines(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen.access")
    monkeypatch.setattr(server, "settings", Settings(log_json=True))
    http.get("/v1/models/no%0Asuch")
    deadline = time.monotonic() + 5
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    line = json.loads(caplog.records[-1].getMessage())
    assert (
        line["status"] == 404 and line["path"].endswith("/v1/models/no\nsuch") and line["request_id"].startswith("req_")
    )


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    response = http.head(path)
    assert response.status_code == 200 and not response.content and response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "/qwen/v1/models", "/v1/models"])
def test_paths_with_more_slashes_and_behind_a_proxy(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200
    assert '"/qwen/openapi.json"' in http.get("/docs").text.replace("'", '"')
    assert http.get("/qwen/health").status_code == 200


def test_bodies_as_curl_sends_them(http: httpx.Client) -> None:
    for type_ in ("application/x-www-form-urlencoded", "", "text/plain"):
        response = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": type_})
        assert response.status_code == 200, type_


def test_compressed_bodies(http: httpx.Client) -> None:
    def send(data: bytes, encoding: str) -> httpx.Response:
        return http.post("/v1/chat/completions", content=data, headers={"Content-Encoding": encoding})

    data = json.dumps(CHAT).encode()
    assert send(gzip.compress(data), "gzip").status_code == send(zlib.compress(data), "deflate").status_code == 200
    for body, encoding, status, words in (
        (data, "gzip", 400, "not gzip"),
        (gzip.compress(data)[:-9], "gzip", 400, "breaks off"),
        (gzip.compress(b" " * 10_000_000), "gzip", 413, "at most 20,000 bytes"),
        (data, "br", 415, "'br' is not read"),
    ):
        response = send(body, encoding)
        assert response.status_code == status and words in response.json()["error"]["message"], encoding


@pytest.mark.parametrize(
    ("body", "words"),
    [(b'{"messages": "caf\xe9"}', "not UTF-8: byte 0xe9 at 17"), (b"[" * 100_000, "nested too deep"),
     (b'{"n": ' + b"9" * 5000 + b"}", "digits"), (b"{", "not JSON")],
)  # fmt: skip
def test_bodies_that_are_no_json(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, body: bytes, words: str
) -> None:
    monkeypatch.setattr(server, "settings", Settings())
    response = http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


# ---- below HTTP ----


def exchange(address: str, data: bytes, wait: float = 5.0) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
             b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\r\n\r\n"],
)  # fmt: skip
def test_broken_http_is_told_in_json(address: str, data: bytes) -> None:
    head, _, body = exchange(address, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_heads_that_never_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    for data in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le"):
        assert b"408" in exchange(address, data, 10)


def certificate(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    files = folder / "key.pem", folder / "cert.pem"
    files[0].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                           serialization.NoEncryption()))  # fmt: skip
    files[1].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return files


def serve(*flags: str) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).parent.parent / "openai_api.py"), "-c", "demo", "--server-port", "0",
               "--kv-cache-gib", "0.5", *flags]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(client: httpx.Client, path: str) -> int:
    deadline = time.monotonic() + 60
    while (status := client.get(path).status_code) == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    return status


def test_https_and_unix_sockets(demo_checkpoint: Path, tmp_path: Path) -> None:
    key, cert = certificate(tmp_path)
    for flags in (
        ["--ssl-keyfile", str(key), "--ssl-certfile", str(cert)],
        ["--uds", str(tmp_path / "s"), "--log-json"],
    ):
        with serve(*flags) as process:
            told = next(line for line in process.stderr if line.startswith("serving")).split()[3]
            if "--uds" in flags:
                client = httpx.Client(transport=httpx.HTTPTransport(uds=flags[1]), base_url="http://x")
            else:
                port = told.rpartition(":")[2].removesuffix("/v1")
                context = ssl.create_default_context(cafile=str(cert))
                client = httpx.Client(verify=context, base_url=f"https://localhost:{port}")
            with client:
                assert wait_for(client, "/health") == 200
            process.terminate()
            errors = process.stderr.read()
        assert "Traceback" not in errors
    assert '"path": "/health"' in errors


def test_certificates_and_sockets_are_checked_first(tmp_path: Path) -> None:
    key, cert = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")[0]
    check_certificate(key, cert)
    for pair, words in (
        ((key, None), "go together"),
        ((other, cert), "can't be used"),
        ((tmp_path, cert), "can't be used"),
    ):
        with pytest.raises(QwenError, match=words):
            check_certificate(*pair)
    path = tmp_path / "socket"
    with listen_on_file(path):
        with pytest.raises(QwenError, match="is served already"):
            listen_on_file(path)
    listen_on_file(path).close()  # what nobody serves any more is replaced
    with pytest.raises(QwenError, match="can't listen on --uds"):
        listen_on_file(tmp_path / "no" / "socket")

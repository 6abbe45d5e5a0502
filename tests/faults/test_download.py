"""scripts/download_weights.py against a server on this machine: only the right and complete file
gets its name.
"""

import hashlib
import http.server
import threading

import pytest

import download_weights

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)  # first: the client does not wait for the end
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/interrupted" else CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.handle_error = lambda *_: None  # of a client that hangs up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(server, folder, page="/weights", *flags):
    url = f"http://127.0.0.1:{server.server_port}{page}"
    return download_weights.main(["v107", "--url", url, "--exp", str(folder), *flags])


def test_the_file_and_its_digest(server, tmp_path, capsys):
    path = tmp_path / "v107" / "train" / "checkpoint_0009.pth.tar"
    for flags in ((), ("--sha256", DIGEST), ("--sha256", DIGEST.upper())):
        assert download(server, tmp_path, "/weights", *flags) == 0
        assert capsys.readouterr().out == f"{DIGEST}  {path}\n"
    assert path.read_bytes() == CONTENT
    assert server.requests == ["/weights"]  # an existing file is not downloaded again
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("page", ["/missing", "/interrupted", "/other", ":nonsense"])
def test_anything_else_leaves_nothing(server, tmp_path, capsys, page):
    digest = hashlib.sha256(b"the right file").hexdigest() if page == "/other" else DIGEST
    assert download(server, tmp_path, page, "--sha256", digest) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("download_weights.py: error: http://127.0.0.1:")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_interrupted_download_without_a_digest(server, tmp_path, capsys):
    assert download(server, tmp_path, "/interrupted") == 2
    assert "error:" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_existing_wrong_file_stays(server, tmp_path, capsys):
    path = tmp_path / "v107" / "train" / "checkpoint_0009.pth.tar"
    path.parent.mkdir(parents=True)
    path.write_text("one's own")
    assert download(server, tmp_path, "/weights", "--sha256", DIGEST) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == "one's own" and not server.requests


def test_a_malformed_digest_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        download_weights.parse_args(["v107", "--sha256", "abc"])
    assert "64 hexadecimal digits" in capsys.readouterr().err

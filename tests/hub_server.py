"""A hub for tests: serves model folders from disk the way huggingface.co and modelscope.cn do, with faults on order.

    with HubServer(root) as server:
        environment = {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}

`root/OWNER/NAME/REVISION/FILE` is served; the revision `main` is ModelScope's `master` too. Weight files are reached
by a redirect to another host name, as from the hubs to their content networks; only that one honours ranges. What both
hubs answer in case of error is as their clients and users report it: ModelScope says 404 to almost everything, with a
code of its own, except that a branch or tag that does not exist is merely without files.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WEIGHTS = (".safetensors", ".bin")
NOT_FOUND, NO_ACCESS, NO_TREE, NO_FILE = 10010205001, 10010200001, 10990101004, 10990101007  # ModelScope's codes


@dataclass
class Request:
    """One request that the server answered."""

    method: str
    path: str  # with the query
    file: str = ""  # the file that it was for, if any
    start: int = 0  # first byte asked for
    status: int = 0
    sent: int = 0  # bytes of the file


@dataclass
class Faults:
    """What goes wrong, changed by the tests while the server runs."""

    status: dict[str, int] = field(default_factory=dict)  # repository: HTTP status of every answer about it
    # file (`REPOSITORY/FILE`): bytes after which its next transfers break off, None for an HTTP error 503 instead
    cuts: dict[str, list[int | None]] = field(default_factory=dict)


class HubServer:
    """Serves `root` on a free port of 127.0.0.1 from `with` on, until `stop`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Request] = []
        self.faults = Faults()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening; connections are refused from now on."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def revision(self, repository: str, name: str) -> Path | None:
        """The folder of a revision, by branch, tag or commit."""
        for folder in (self.root / repository).glob("*"):
            if name in (folder.name, self.commit(folder)) or (name == "master" and folder.name == "main"):
                return folder
        return None

    def commit(self, folder: Path) -> str:
        return hashlib.sha1(str(folder.relative_to(self.root)).encode()).hexdigest()

    def describe(self, path: Path) -> tuple[int, str]:
        """Size and sha256 of a file."""
        return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()

    def content_url(self, path: Path) -> str:
        """Where the content network has a file."""
        return f"http://localhost:{self.port}/content/{path.relative_to(self.root).as_posix()}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing: the log is for the tests."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.request_log = Request(self.command, self.path)
        self.hub.log.append(self.request_log)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        routes = {
            r"/api/models/(?P<repository>[^/]+/[^/]+)/tree/(?P<revision>.+)": self.huggingface_tree,
            r"/api/models/(?P<repository>[^/]+/[^/]+)(/revision/(?P<revision>.+))?": self.huggingface_info,
            r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)": self.huggingface_file,
            r"/api/v1/models/(?P<repository>[^/]+/[^/]+)/repo/files": self.modelscope_files,
            r"/api/v1/models/(?P<repository>[^/]+/[^/]+)/repo": self.modelscope_file,
            r"/content/(?P<place>.+)": self.content,
        }
        for pattern, route in routes.items():
            if match := re.fullmatch(pattern, path):
                status = self.hub.faults.status.get(match.groupdict().get("repository", ""))
                gated_file_only = status == 403 and route in (self.huggingface_info, self.huggingface_tree)
                if status and not gated_file_only:  # a gated repository of Hugging Face shows its list of files
                    return self.refuse(status, modelscope=path.startswith("/api/v1/"))
                return route(**match.groupdict(), **(query if path.startswith("/api/v1/") else {}))
        self.answer(404, {"error": "no such route"})

    # ---- Hugging Face ----

    def huggingface_info(self, repository: str, revision: str | None) -> None:
        if folder := self.huggingface_revision(repository, revision or "main"):
            siblings = [self.huggingface_entry(path, "rfilename", "blobId", "sha256") for path in self.list(folder)]
            self.answer(200, {"id": repository, "sha": self.hub.commit(folder), "siblings": siblings})

    def huggingface_tree(self, repository: str, revision: str) -> None:
        if folder := self.huggingface_revision(repository, revision):
            entries = [self.huggingface_entry(path, "path", "oid", "oid") for path in self.list(folder)]
            self.answer(200, [{"type": "file"} | entry for entry in entries])

    def huggingface_entry(self, path: Path, name_key: str, blob_key: str, digest_key: str) -> dict[str, Any]:
        size, digest = self.hub.describe(path)
        entry = {name_key: self.name_of(path), "size": size, blob_key: digest[:40]}
        if path.suffix in WEIGHTS:
            entry["lfs"] = {"size": size, digest_key: digest, "pointerSize": 134}
        return entry

    def huggingface_file(self, repository: str, revision: str, name: str) -> None:
        folder = self.huggingface_revision(repository, revision)
        if folder is None:
            return
        self.request_log.file = f"{repository}/{name}"
        path = folder / name
        if not path.is_file():
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        size, digest = self.hub.describe(path)
        headers = {"X-Repo-Commit": self.hub.commit(folder), "ETag": f'"{digest[:40]}"'}
        if path.suffix not in WEIGHTS:
            return self.send_file(path, headers, ranges=False)
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(size)}
        self.answer(302, {}, headers | {"Location": self.hub.content_url(path)})

    def huggingface_revision(self, repository: str, name: str) -> Path | None:
        folder = self.hub.revision(repository, name)
        if folder is None and (self.hub.root / repository).is_dir():
            self.answer(404, {"error": f"Invalid rev id: {name}"}, {"X-Error-Code": "RevisionNotFound"})
        elif folder is None:  # it does not tell strangers what is missing and what is private
            self.answer(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        return folder

    # ---- ModelScope ----

    def modelscope_files(self, repository: str, Revision: str = "master", **query: str) -> None:
        if not (self.hub.root / repository).is_dir():
            message = "获取模型目录树失败，信息：record not found"
            return self.answer(404, {"Code": NOT_FOUND, "Message": message, "Success": False})
        folder = self.hub.revision(repository, Revision)
        if folder is None and re.fullmatch(r"[0-9a-f]{40}", Revision):
            return self.answer(404, {"Code": NO_TREE, "Message": "获取模型目录树失败", "Success": False})
        entries = []
        for path in self.list(folder) if folder else []:
            size, digest = self.hub.describe(path)
            entry = {"Name": path.name, "Path": self.name_of(path), "Type": "blob", "Size": size, "Sha256": digest}
            entries.append(entry)
        data = {"Files": entries or None}
        self.answer(200, {"Code": 200, "Message": "success", "Data": data, "Success": True})

    def modelscope_file(self, repository: str, Revision: str, FilePath: str) -> None:
        self.request_log.file = f"{repository}/{FilePath}"
        folder = self.hub.revision(repository, Revision)
        if folder is None or not (path := folder / FilePath).is_file():
            return self.answer(404, {"Code": NO_FILE, "Message": "no such file", "Success": False})
        if path.suffix not in WEIGHTS:
            return self.send_file(path, {}, ranges=False)
        self.answer(302, {}, {"Location": self.hub.content_url(path)})

    # ---- both ----

    def content(self, place: str) -> None:
        """The content network: it must not be shown the user's token."""
        if "Authorization" in self.headers:
            return self.answer(400, {"error": "only one way to authorise a request is allowed"})
        path = self.hub.root / place
        self.request_log.file = f"{path.parents[1].relative_to(self.hub.root).as_posix()}/{path.name}"
        self.send_file(path, {}, ranges=True)

    def list(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def name_of(self, path: Path) -> str:
        return "/".join(path.relative_to(self.hub.root).parts[3:])

    def refuse(self, status: int, modelscope: bool) -> None:
        if modelscope and status == 403:
            return self.answer(404, {"Code": NO_ACCESS, "Message": "no access", "Success": False})
        gated = {"X-Error-Code": "GatedRepo"} if status == 403 else {}
        self.answer(status, {"error": HTTPStatus(status).phrase}, gated)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.start(status, {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {}))
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, path: Path, headers: dict[str, str], ranges: bool) -> None:
        content = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if ranges else None
        start = self.request_log.start = int(match[1]) if match else 0
        cuts = self.hub.faults.cuts.get(self.request_log.file, []) if self.command == "GET" else []
        cut = cuts.pop(0) if cuts else len(content)
        if cut is None:
            return self.answer(503, {"error": "busy"})
        if start and start >= len(content):
            return self.answer(416, {}, {"Content-Range": f"bytes */{len(content)}"})
        if match:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.start(206 if match else 200, headers | {"Content-Length": str(len(content) - start)})
        if self.command == "GET":
            self.wfile.write(content[start : start + cut])
            self.request_log.sent = min(cut, len(content) - start)
            self.close_connection = self.close_connection or start + cut < len(content)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

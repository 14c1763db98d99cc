"""Where training data lie: packed files, Parquet, Arrow, saved datasets, names of the hub; all the same samples."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow
import pytest

from finetune import ROOT
from qwen import QwenError
from training.read import Source
from training.samples import Conversation, Message, Notes

ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {i}!"}]}
        for i in range(5)]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED = [(Message("user", "Hi"), Message("assistant", f"Hello {i}!")) for i in range(5)]


def read(name: Path | str, split: str = "train") -> list[tuple[Message, ...]]:
    notes = Notes()
    samples = list(Source(str(name), split=split).samples(notes))
    assert not notes.faults, notes.list_faults()
    return [each.messages for each in samples if isinstance(each, Conversation)]


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize("end", [".gz", ".zst", ".bz2", ".xz"])
def test_packed_files(tmp_path: Path, end: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}[end]
    path = tmp_path / f"a.jsonl{end}"
    path.write_bytes(compress(LINES[:200]) + compress(LINES[200:]))  # as tools that pack in parallel do
    assert read(path) == read(tmp_path) == EXPECTED
    path.rename(tmp_path / "a.jsonl")  # what a file is, its first bytes say
    assert read(tmp_path / "a.jsonl") == EXPECTED
    table = "prompt,completion\n" + "Hi,Hello!\n" * 20000
    for name, content in (("a.jsonl", LINES * 900), ("a.csv", table.encode()), ("a.txt", LINES * 900)):
        (tmp_path / name).write_bytes(compress(content)[:-9])
        with pytest.raises(QwenError, match=f"{name}.*(breaks off|can't be unpacked)"):
            list(Source(str(tmp_path / name)).samples(Notes()))


def test_columnar_files_and_folders(tmp_path: Path) -> None:
    """A column of messages has the fields of all messages: those that a message lacks are null there."""
    rows = [*ROWS[:4], {"messages": [*ROWS[4]["messages"][:1], ROWS[4]["messages"][1] | {"weight": 1}]}]
    whole = datasets.Dataset.from_list(rows)
    (tmp_path / "parquet").mkdir()
    for number in range(2):
        whole.shard(2, number, contiguous=True).to_parquet(tmp_path / "parquet" / f"{number}.parquet")
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "dict")
    (tmp_path / "arrow").mkdir()
    for path in (tmp_path / "saved").glob("*.arrow"):
        (tmp_path / "arrow" / path.name).write_bytes(path.read_bytes())
    assert read(tmp_path / "parquet") == read(f"{tmp_path}/parquet/*.parquet") == EXPECTED
    assert read(tmp_path / "saved") == read(tmp_path / "arrow") == read(tmp_path / "dict") == EXPECTED
    assert read(tmp_path / "dict", "test") == EXPECTED[:1]
    with pytest.raises(QwenError, match="has no split dev: give one of train, test with --data_split"):
        read(tmp_path / "dict", "dev")
    (tmp_path / "parquet" / "0.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(QwenError, match=r"0\.parquet can't be read"):
        read(tmp_path / "parquet")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a data set of one file takes."""

    commit = "0" * 40

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/resolve/" + f"{self.commit}/train.jsonl"):
            self.answer(200, LINES)
        elif "/tree/" in path and path.endswith(self.commit):
            self.answer(200, json.dumps([{"type": "file", "path": "train.jsonl", "size": len(LINES), "oid": "1"}]))
        elif path.startswith("/api/datasets/me/chats") and "/tree/" not in path:
            self.answer(200, json.dumps({"id": "me/chats", "sha": self.commit, "siblings": []}))
        else:
            self.answer(404, json.dumps({"error": "not found"}))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, json.dumps([{"type": "file", "path": "train.jsonl", "size": len(LINES), "oid": "1"}]))

    def answer(self, status: int, body: bytes | str) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        headers = {"Content-Length": len(body), "ETag": '"1"', "X-Repo-Commit": self.commit}
        if status == 404:
            headers["X-Error-Code"] = "EntryNotFound"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_names_of_the_hub(tmp_path: Path) -> None:
    """Read through the hub's own client; offline, from its cache; what can't be had is one sentence."""
    script = tmp_path / "read.py"
    script.write_text(
        "import sys\nfrom qwen import QwenError\nfrom training.read import Source\nfrom training.samples import Notes\n"
        "for name in sys.argv[1:]:\n    try:\n        print(*(each.messages[1].content for each in Source(name)"
        ".samples(Notes())))\n    except QwenError as error:\n        print(error)\n"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT),
                                    "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip

        def run(**more: str) -> list[str]:
            command = [sys.executable, str(script), "me/chats", "me/nothing"]
            done = subprocess.run(command, env=environment | more, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout.splitlines()

        for offline in ("0", "1"):
            found, missing = run(HF_HUB_OFFLINE=offline)
            assert found == "Hello 0! Hello 1! Hello 2! Hello 3! Hello 4!"
            assert missing.startswith("me/nothing can't be read (")
        assert "the hub can't be reached; give a path, or go online" in missing
        server.shutdown()

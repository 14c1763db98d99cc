"""hub.py against a real HTTP server that speaks both hubs' protocols, with both hubs' own clients in processes of
their own: what is downloaded, resumed, found in the cache, and said when it fails."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hub_server import HubServer, Request
from safetensors.torch import load_file

from hub import HUBS, fetch_checkpoint
from qwen import QWenConfig, QwenError, QWenLMHeadModel

PROJECT = Path(__file__).parents[1]
INSTEAD = {
    hub: f"pass a local directory with -c, try --hub {other}, or -c demo"
    for hub, other in zip(HUBS, HUBS[::-1], strict=True)
}
CLIENT_PIECE = 10 << 20  # Hugging Face's client writes in pieces of this size, and loses what it has of a broken one
UNKNOWN = ("nope", "0" * 40)  # revisions
CUT, CUT_AGAIN = 15_000_000, 3_000_000  # bytes after which a transfer of 19 MB breaks off, and its continuation

# Takes steps as JSON, waits for a line on stdin, prints a line of JSON for each step; a failure of the last one ends
# the script. The imports take seconds, so all processes of the story do them at once.
SCRIPT = """
import json, sys
import utils
from qwen import QwenError

def main():
    steps = json.loads(sys.argv[1])
    for number, (path, hub, revision, load) in enumerate(steps, start=1):
        try:
            result = {"directory": str(utils.find_checkpoint(path, hub, revision))}
            if load:
                model, tokenizer = utils.load_model_and_tokenizer(path, "cpu", "fp32", hub=hub, revision=revision)
                result |= {"head": model.lm_head.weight[:2].tolist(), "ids": tokenizer("Hello world")["input_ids"]}
        except QwenError as error:
            if number == len(steps):
                raise
            result = {"error": str(error)}
        print(json.dumps(result), flush=True)

if sys.stdin.readline():
    utils.run_script(main)
"""


# ---- what the hub holds ----


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders for HubServer: a checkpoint in three revisions, and repositories to fail in several ways."""
    root = tmp_path_factory.mktemp("served")
    main, old = root / "Tiny/chat/main", root / "Tiny/chat/old"
    save_checkpoint(main, seed=0)
    for hub in HUBS:
        shutil.copytree(main, root / f"Tiny/broken-{hub}/main", copy_function=os.link)
    save_checkpoint(root / "Tiny/chat/v1.1", seed=1, max_shard_size="10MB")
    save_checkpoint(old, seed=2)
    state = {name: tensor.clone() for name, tensor in load_file(old / "model.safetensors").items()}
    torch.save(state, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    # What the official repositories also hold, and nobody needs.
    (main / "pytorch_model.bin").write_bytes(b"the same again")
    (main / "README.md").write_text("# Tiny")
    (main / "assets").mkdir()
    (main / "assets" / "logo.json").write_text("{}")
    for name in ("full", "damaged", "gated", "failing"):
        folder = root / "Tiny" / name / "main"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "qwen"}')
        (folder / "model.safetensors").write_bytes(name.encode() * 5000)
    return root


def save_checkpoint(folder: Path, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    config = QWenConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, kv_channels=8, intermediate_size=32, seq_length=64
    )
    QWenLMHeadModel(config).save_pretrained(folder, **options)
    shutil.copy(PROJECT / "tests/data/qwen.tiktoken", folder)
    code = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    settings = json.loads((folder / "config.json").read_text()) | {"auto_map": code}
    (folder / "config.json").write_text(json.dumps(settings))
    settings = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint ran')")


# ---- the processes ----


class Step(NamedTuple):
    """One call of `find_checkpoint`, with `load` followed by `load_model_and_tokenizer`."""

    path: str
    hub: str
    revision: str | None = None
    load: bool = False


ONLINE = [Step("Tiny/chat", hub, revision, True) for hub in HUBS for revision in (None, "old")]
ONLINE += [Step("Tiny/chat", hub, revision) for hub in HUBS for revision in ("v1.1", *UNKNOWN)]
ONLINE += [Step(f"Tiny/{name}", hub) for hub in HUBS for name in ("missing", "gated", "failing", "full", "damaged")]
BROKEN = [Step(f"Tiny/broken-{hub}", hub) for hub in HUBS]
OFFLINE = [Step("Tiny/chat", hub, revision) for hub in HUBS for revision in (None, "v1.1", "old", "nope")]
OFFLINE += [Step("Tiny/full", hub) for hub in HUBS]
UNREACHABLE = [Step(f"Tiny/{name}", hub) for name in ("chat", "missing") for hub in HUBS]
IMPATIENT = {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0"}
TOKENS = {"HF_TOKEN": "hf_secret", "MODELSCOPE_API_TOKEN": "secret"}


@dataclass
class Run:
    """What one process did with its steps."""

    results: dict[Step, dict[str, Any]]
    returncode: int
    stderr: str


class Process:
    """A process of SCRIPT with its caches in `home`, for a hub at `url`."""

    def __init__(self, home: Path, url: str, steps: list[Step], **variables: str) -> None:
        script = home / "fetch.py"
        script.write_text(SCRIPT)
        self.steps = steps
        self.popen = subprocess.Popen(
            [sys.executable, str(script), json.dumps(steps)],
            env=clean_environment(home) | {"HF_ENDPOINT": url, "MODELSCOPE_ENDPOINT": url} | variables,
            text=True,
            encoding="utf-8",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self) -> Run:
        output, errors = self.popen.communicate("go\n", timeout=200)
        results = [json.loads(line) for line in output.splitlines()]  # so there is nothing else on stdout
        if self.popen.returncode:
            results.append({"error": errors.splitlines()[-1]})
        assert len(results) == len(self.steps), errors
        return Run(dict(zip(self.steps, results, strict=True)), self.popen.returncode, errors)


@dataclass
class Story:
    """All processes, in order: the first fills an empty cache, the others share it."""

    online: Run
    resumed: Run
    offline: Run
    unreachable: Run
    fetched: list[Request]  # the server's log of the first process
    resumes: list[Request]  # and of the second
    uninvited: list[Request]  # and of the third, which should not ask


@pytest.fixture(scope="module")
def story(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    home = tmp_path_factory.mktemp("home")
    for path in partial_files(root, home, "full"):
        path.symlink_to("/dev/full")
    for path in partial_files(root, home, "damaged"):
        path.write_bytes(b"something else")
    with HubServer(root) as server, HubServer(root) as shunned, HubServer(root) as gone:
        gone.stop()
        online = Process(home, server.url, ONLINE + BROKEN, **IMPATIENT, **TOKENS)
        resumed = Process(home, server.url, BROKEN)
        offline = Process(home, shunned.url, OFFLINE, HF_HUB_OFFLINE="1")
        unreachable = Process(home, gone.url, UNREACHABLE, **IMPATIENT)

        server.faults.status = {"Tiny/gated": 403, "Tiny/failing": 500}
        server.faults.cuts = {f"Tiny/broken-{hub}/model.safetensors": [CUT, None] for hub in HUBS}
        runs = [online.run()]
        fetched, server.log = server.log, []
        server.faults.cuts = {f"Tiny/broken-{hub}/model.safetensors": [CUT_AGAIN] for hub in HUBS}
        runs += [resumed.run(), offline.run(), unreachable.run()]
    return Story(*runs, fetched, server.log, shunned.log)


def clean_environment(home: Path) -> dict[str, str]:
    """This process's variables without those of the hubs' clients; all caches lie in `home`."""
    hubs = ("HF_", "HUGGING", "TRANSFORMERS_", "MODELSCOPE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hubs)}
    caches = {"HF_HOME": home / "huggingface", "MODELSCOPE_CACHE": home / "modelscope", "MODELSCOPE_HOME": home / "own"}
    return kept | {name: str(path) for name, path in caches.items()} | {"PYTHONPATH": str(PROJECT), "NO_PROXY": "*"}


def partial_files(root: Path, home: Path, name: str) -> list[Path]:
    """Where the two caches keep what they have of Tiny/`name`'s unfinished weights; their folders are made."""
    digest = sha256(root / "Tiny" / name / "main/model.safetensors")
    paths = [
        home / f"huggingface/hub/models--Tiny--{name}/blobs/{digest}.incomplete",
        home / f"modelscope/models/Tiny--{name}/snapshots/master/model.safetensors.incomplete",
    ]
    for path in paths:
        path.parent.mkdir(parents=True)
    return paths


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- downloads ----


def directory(run: Run, *step: Any) -> Path:
    result = run.results[Step(*step)]
    assert "error" not in result
    return Path(result["directory"])


def sentence(run: Run, *step: Any) -> str:
    """The error of a step, after a look at its form."""
    text = run.results[Step(*step)]["error"]
    assert "\n" not in text and "http" not in text and len(text) < 250
    return text


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize("revision", [None, "old"])
def test_a_downloaded_checkpoint_loads(story: Story, root: Path, hub: str, revision: str | None) -> None:
    result = story.online.results[Step("Tiny/chat", hub, revision, True)]
    served = root / "Tiny/chat" / (revision or "main")
    state = torch.load(served / "pytorch_model.bin") if revision else load_file(served / "model.safetensors")
    assert torch.equal(torch.tensor(result["head"]), state["lm_head.weight"][:2])
    assert result["ids"] == [9707, 1879]


@pytest.mark.parametrize("hub", HUBS)
def test_nothing_but_data_in_one_format_is_fetched(story: Story, hub: str) -> None:
    settings = {"config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"}
    for revision, weights in ((None, "model.safetensors"), ("old", "pytorch_model.bin")):
        folder = directory(story.online, "Tiny/chat", hub, revision, True)
        assert {path.name for path in folder.rglob("*")} == settings | {weights}
    asked = {Path(request.file).name for request in story.fetched if request.file.startswith("Tiny/chat/")}
    shards = {name for name in asked if name.startswith("model-")} | {"model.safetensors.index.json"}  # of v1.1
    assert asked == settings | {"model.safetensors", "pytorch_model.bin"} | shards


@pytest.mark.parametrize("hub", HUBS)
def test_a_revision_is_the_one_asked_for(story: Story, root: Path, hub: str) -> None:
    for revision, step in (("main", (None, True)), ("v1.1", ("v1.1",))):
        folder = directory(story.online, "Tiny/chat", hub, *step)
        served = {path.name: sha256(path) for path in (root / "Tiny/chat" / revision).glob("*.safetensors")}
        assert {path.name: sha256(path) for path in folder.glob("*.safetensors")} == served
    assert len(served) > 1  # shards


# ---- a broken download ----


@pytest.mark.parametrize("hub", HUBS)
def test_a_broken_download_resumes_in_the_next_run(story: Story, root: Path, hub: str) -> None:
    file = f"Tiny/broken-{hub}/model.safetensors"
    size = (root / f"Tiny/broken-{hub}/main/model.safetensors").stat().st_size
    assert "run again to resume" in sentence(story.online, f"Tiny/broken-{hub}", hub)

    first = [request for request in story.fetched if request.file == file and request.status in (200, 206)]
    assert [(request.start, request.sent) for request in first] == [(0, CUT)]
    kept = CUT if hub == "modelscope" else CUT // CLIENT_PIECE * CLIENT_PIECE
    kept_again = CUT_AGAIN if hub == "modelscope" else 0
    rest = [(request.start, request.sent) for request in story.resumes if request.file == file and request.sent]
    assert rest == [(kept, CUT_AGAIN), (kept + kept_again, size - kept - kept_again)]  # the second by itself
    folder = directory(story.resumed, f"Tiny/broken-{hub}", hub)
    assert sha256(folder / "model.safetensors") == sha256(root / f"Tiny/broken-{hub}/main/model.safetensors")
    assert not list(folder.parents[1].rglob("*.incomplete"))


def test_a_rest_that_does_not_fit_is_not_used(story: Story, root: Path) -> None:
    text = sentence(story.online, "Tiny/damaged", "huggingface")
    assert "model.safetensors came out damaged and was removed" in text
    folder = directory(story.online, "Tiny/damaged", "modelscope")  # whose client starts anew by itself
    assert sha256(folder / "model.safetensors") == sha256(root / "Tiny/damaged/main/model.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("hub", HUBS)
def test_full_disk(story: Story, hub: str) -> None:
    text = sentence(story.online, "Tiny/full", hub)
    assert text == "the disk is full while downloading Tiny/full: free some space and run again, the download goes on"


# ---- without a network ----


@pytest.mark.parametrize("hub", HUBS)
def test_the_cache_serves_offline(story: Story, hub: str) -> None:
    assert not story.uninvited
    assert directory(story.offline, "Tiny/chat", hub) == directory(story.online, "Tiny/chat", hub, None, True)
    assert directory(story.offline, "Tiny/chat", hub, "old") == directory(story.online, "Tiny/chat", hub, "old", True)
    assert directory(story.offline, "Tiny/chat", hub, "v1.1") == directory(story.online, "Tiny/chat", hub, "v1.1")
    for step in (("Tiny/chat", hub, "nope"), ("Tiny/full", hub)):  # never seen, and seen in part
        text = sentence(story.offline, *step)
        assert f"the cache of {hub} holds no whole copy of {step[0]}" in text and INSTEAD[hub] in text


@pytest.mark.parametrize("hub", HUBS)
def test_the_cache_serves_when_the_hub_is_unreachable(story: Story, hub: str) -> None:
    assert directory(story.unreachable, "Tiny/chat", hub) == directory(story.online, "Tiny/chat", hub, None, True)
    text = sentence(story.unreachable, "Tiny/missing", hub)
    assert f"cannot get Tiny/missing from {hub} (Connection refused)" in text and INSTEAD[hub] in text


# ---- what else can go wrong ----


@pytest.mark.parametrize("hub", HUBS)
def test_refusals(story: Story, hub: str) -> None:
    for revision in UNKNOWN:
        text = sentence(story.online, "Tiny/chat", hub, revision)
        assert text.startswith(f"Tiny/chat on {hub} has no revision {revision}: leave --revision out, or give a branch")
    expected = {
        "missing": f"Tiny/missing is neither a directory here nor on {hub}: check the name, or ",
        "gated": f"{hub} refuses access to Tiny/gated: accept its terms on its page and run `",
        "failing": f"cannot get Tiny/failing from {hub} (it answers HTTP 500): run again",
    }
    for name, start in expected.items():
        text = sentence(story.online, f"Tiny/{name}", hub)
        assert text.startswith(start) and INSTEAD[hub] in text


def test_a_script_ends_with_the_sentence(story: Story) -> None:
    for run in (story.online, story.offline, story.unreachable):
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert run.stderr.splitlines()[-1].startswith("fetch.py: error: ")
    assert story.resumed.returncode == 0


@pytest.mark.parametrize("path", ["output", "./output", "../output", "~/output", "/no/such", "a/b/c", "Qwen/", "a\\b"])
def test_a_path_that_is_no_directory(path: str) -> None:
    with pytest.raises(QwenError) as error:
        fetch_checkpoint(path)
    assert str(error.value) == f"there is no directory {path}, and it is no hub name like Qwen/Qwen-7B-Chat either"


def test_an_unknown_hub() -> None:
    with pytest.raises(QwenError, match="--hub github is unknown: choose one of huggingface, modelscope"):
        fetch_checkpoint("Qwen/Qwen-7B", hub="github")

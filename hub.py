"""Fetch a checkpoint from the Hugging Face Hub or ModelScope into their own caches, or find it there without a network.

Only data is fetched: code files of the repository are left behind, and of two formats of the weights only safetensors.
"""

import errno
import hashlib
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from qwen import QwenError
from qwen.checkpoint import list_weight_files

HUBS = ("huggingface", "modelscope")
SETTINGS = ["*.json", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]
SAFETENSORS, PYTORCH = ["*.safetensors"], ["pytorch_model*.bin", "adapter_model*.bin"]
SUBFOLDERS = ["*/*"]  # pictures, and checkpoints of a training run
LOGIN = {"huggingface": "hf auth login", "modelscope": "modelscope login"}
INSTEAD = "pass a local directory with -c, try {other}, or -c demo for the small built-in stand-in"


def fetch_checkpoint(repo_id: str, hub: str = "huggingface", revision: str | None = None) -> Path:
    """The local directory of `repo_id`, downloaded if need be; an interrupted download goes on where it broke off.

    The clients' own variables hold: HF_HOME, HF_ENDPOINT, MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT, ...; HF_HUB_OFFLINE
    for both hubs. Whenever the hub does not deliver, a whole copy in the cache will do.

    Raises:
        QwenError: no such repository or revision, no access, no network and not in the cache, or no disk space.
    """
    if hub not in HUBS:
        raise QwenError(f"--hub {hub} is unknown: choose one of {', '.join(HUBS)}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
        raise QwenError(f"there is no directory {repo_id}, and it is no hub name like Qwen/Qwen-7B-Chat either")
    if constants.is_offline_mode():
        if cached := _find_in_cache(repo_id, hub, revision):
            return cached
        raise QwenError(
            f"the cache of {hub} holds no whole copy of {repo_id}{f' at {revision}' if revision else ''}, and "
            f"HF_HUB_OFFLINE forbids fetching it: unset it, or {_alternatives(hub)}"
        )
    try:
        return _fetch_huggingface(repo_id, revision) if hub == "huggingface" else _fetch_modelscope(repo_id, revision)
    except QwenError:
        raise
    except Exception as error:  # the clients raise their own, httpx's, requests' and the system's errors
        if cached := _find_in_cache(repo_id, hub, revision):
            return cached
        raise QwenError(_explain(error, repo_id, hub, revision)) from error


# ---- Hugging Face ----


def _fetch_huggingface(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub.file_download import are_symlinks_supported

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    files = {file.rfilename: file for file in info.siblings or []}
    weights = _select(files, SAFETENSORS) or _select(files, PYTORCH)
    repository = Path(constants.HF_HUB_CACHE, "models--" + repo_id.replace("/", "--"))
    missing = [name for name in weights if not (repository / "snapshots" / info.sha / name).exists()]
    if missing and are_symlinks_supported():  # without, the client would copy finished blobs: then it does it all
        for name in missing:
            if lfs := files[name].lfs:
                url = hf_hub_url(repo_id, name, revision=info.sha)
                _fetch_blob(url, name, lfs.size, repository / "blobs" / lfs.sha256)
    wanted = SETTINGS + weights
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=SUBFOLDERS))


def _select(names: Any, patterns: list[str]) -> list[str]:
    return sorted(name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns))


def _fetch_blob(url: str, name: str, size: int, blob: Path) -> None:
    """Put one large file into the cache, from the byte on where an earlier run stopped.

    The client would start the file anew (huggingface_hub 1.18 and later, over HTTP as well as over Xet). It takes
    finished blobs as they are, though: they are named by their sha256.
    """
    from huggingface_hub.file_download import http_get

    part = blob.with_name(f"{blob.name}.incomplete")
    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"  # the client's own
    part.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with part.open("ab") as file:
            start = file.tell()
            if start > size:
                start = file.truncate(0)
            headers = build_hf_headers()
            http_get(url, file, resume_size=start, headers=headers, expected_size=size, displayed_filename=name)
        if start and _sha256(part) != blob.name:
            part.unlink()
            raise OSError(f"{name} came out damaged and was removed")
        part.replace(blob)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- ModelScope ----


def _fetch_modelscope(repo_id: str, revision: str | None) -> Path:
    download = _modelscope_client()
    options = {"revision": revision, "ignore_patterns": SUBFOLDERS}
    directory = Path(download(repo_id, allow_patterns=SETTINGS + SAFETENSORS, **options))
    if not any(directory.glob("*.safetensors")):  # the releases before September 2023
        directory = Path(download(repo_id, allow_patterns=SETTINGS + PYTORCH, **options))
    if not any(directory.iterdir()):  # how ModelScope answers an unknown revision
        raise QwenError(_no_revision(repo_id, "modelscope", revision))
    return directory


def _modelscope_client() -> Any:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise QwenError("--hub modelscope needs the package modelscope: pip install modelscope") from None
    return snapshot_download


# ---- both ----


def _find_in_cache(repo_id: str, hub: str, revision: str | None) -> Path | None:
    """The cached copy of a checkpoint, if its weights are all there: a broken download leaves a directory as well."""
    download = snapshot_download if hub == "huggingface" else _modelscope_client()
    try:
        directory = Path(download(repo_id, revision=revision, allow_patterns=["config.json"], local_files_only=True))
        if hub == "modelscope" and revision and directory.name != revision:
            return None  # the layout of modelscope 1.37 and older, which does not tell the revision
        if any(directory.glob("*.incomplete")):
            return None
        if (directory / "adapter_config.json").is_file():
            return directory if any(directory.glob("adapter_model.*")) else None
        return directory if all(path.is_file() for path in list_weight_files(directory)) else None
    except Exception:  # the client's error for an empty cache, or QwenError for a directory without weights
        return None


def _explain(error: Exception, repo_id: str, hub: str, revision: str | None) -> str:
    """One sentence for a failed download: what, where, and what to do."""
    causes = _causes(error)
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    answers = [body for cause in causes if isinstance(body := getattr(cause, "response_body", None), dict)]
    code = next((body["Code"] for body in answers if "Code" in body), None)  # ModelScope's; its HTTP status is 404
    status = next((found for cause in causes if (found := _status(cause))), None)
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return f"the disk is full while downloading {repo_id}: free some space and run again, the download goes on"
    if "RevisionNotFoundError" in names or code == 10990101004:
        return _no_revision(repo_id, hub, revision)
    if "GatedRepoError" in names or code == 10010200001:
        status = 403
    elif names & {"RepositoryNotFoundError", "NotExistError"}:
        return f"{repo_id} is neither a directory here nor on {hub}: check the name, or {_alternatives(hub)}"
    if status in (401, 403):
        return (
            f"{hub} refuses access to {repo_id}: accept its terms on its page and run `{LOGIN[hub]}`, "
            f"or {_alternatives(hub)}"
        )
    reason = f"it answers HTTP {status}" if status else _reason(causes, names)
    return f"cannot get {repo_id} from {hub} ({reason}): run again to resume, {_alternatives(hub)}"


def _no_revision(repo_id: str, hub: str, revision: str | None) -> str:
    if revision is None:
        return f"{repo_id} on {hub} is empty: check the name, or {_alternatives(hub)}"
    return f"{repo_id} on {hub} has no revision {revision}: leave --revision out, or give a branch, tag or commit"


def _alternatives(hub: str) -> str:
    return INSTEAD.format(other=f"--hub {next(name for name in HUBS if name != hub)}")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and all that led to it; ModelScope's client gathers the errors of single files in one."""
    causes = [error]
    for cause in causes:
        found = [cause.__cause__, cause.__context__, *getattr(cause, "failed_files", {}).values()]
        causes += [one for one in dict.fromkeys(found) if one is not None and one not in causes]
    return causes


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error that a hub's answer led to."""
    return getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)


def _reason(causes: list[BaseException], names: set[str]) -> str:
    """What went wrong on the way to the hub, from the innermost error, without addresses and object names."""
    if names & {"RemoteProtocolError", "ProtocolError", "ReadError"}:
        return "the connection broke off"
    for cause in reversed(causes):
        if text := getattr(cause, "strerror", None):
            return f"{text}: {cause.filename}" if getattr(cause, "filename", None) else str(text)
    if names & {"TimeoutError", "TimeoutException", "Timeout"}:
        return "no answer in time"
    texts = (line for cause in reversed(causes) for line in str(cause).strip().split("\n"))
    return next((line[:160] for line in texts if line), type(causes[0]).__name__)

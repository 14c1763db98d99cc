"""What the scripts that serve have in common: flags the engine can't follow, memory for it, an address."""

import argparse
import socket
import ssl
from pathlib import Path

from qwen import QwenError, QWenLMHeadModel
from qwen.pages import kv_room, layer_bytes


def check_model_arguments(args: argparse.Namespace) -> None:
    """QwenError for flags of the model that go with single chats only."""
    if args.tp:
        raise QwenError("--tp works in chats, not in the server: use --num-gpus, or one GPU")


def cache_tokens(model: QWenLMHeadModel, gib: float | None = None) -> int:
    """How many tokens' keys and values fit into the memory for them."""
    token_bytes = layer_bytes(model) * model.config.num_hidden_layers
    tokens = kv_room(model) if gib is None else int(gib * 2**30 / token_bytes)
    if tokens < 256:
        budget = tokens * token_bytes if gib is None else gib * 2**30
        raise QwenError(
            f"the memory for keys and values, {budget / 2**20:.0f} MiB, holds only {tokens} tokens: "
            "free some, or set --kv-cache-gib higher"
        )
    return tokens


def check_certificate(key: Path | None, certificate: Path | None) -> None:
    """QwenError unless both files are given and belong together, or neither is given."""
    if (key is None) != (certificate is None):
        raise QwenError("--ssl-keyfile and --ssl-certfile go together: give both")
    if key is not None and certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except (OSError, ssl.SSLError) as error:
            raise QwenError(f"--ssl-keyfile {key} and --ssl-certfile {certificate} can't be used: {error}") from None


def listen_on_file(path: Path) -> socket.socket:
    """A bound Unix socket, in place of one that nobody serves any more."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise QwenError(f"--uds {path} is served already: choose another")
            path.unlink()
        listener.bind(str(path))
        listener.listen()
        return listener
    except (OSError, QwenError) as error:
        listener.close()
        if isinstance(error, QwenError):
            raise
        raise QwenError(f"can't listen on --uds {path} ({error}): choose another") from None


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; QwenError where the address is taken or not this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise QwenError(
            f"can't listen on {host}:{port} ({error}): choose another --server-port or --server-name"
        ) from None

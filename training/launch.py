"""torchrun for the launchers, without a traceback of its own: what went wrong, the failed process has said."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    """The exit status of torchrun with this command line, as a shell would give it."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = "; most often memory ran out" if name == "SIGKILL" else ""
        print(f"finetune.py: process {rank} was ended by {name}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run())

"""What runs in img2dataset's own environment: its download, which ends when the process that started it does.

ENVIRONMENT/bin/python -I data_tools/_fetch_child.py '{"url_list": ..., "output_folder": ...}'    stdin: a pipe
"""

import json
import os
import signal
import sys
import threading


def main() -> None:
    """Download what the JSON in the first argument says."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from img2dataset import download

    download(**json.loads(sys.argv[1]))


def _leave_with_parent() -> None:
    """Wait until the parent's end of the pipe is closed, be it by its death, and end the whole process group."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

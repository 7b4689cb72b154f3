"""Is the hub needed, and can it be reached? Asked once, before anything heavy is imported.

Left to themselves the libraries retry for over a minute before they give up, one after the other. One look at the
hub's door answers for all of them: if nobody opens, they are told to work offline (`HF_HUB_OFFLINE` is read when they
are imported), find what is already in this machine's cache, or fail at once.
"""

import http.client
import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from config import Config
from errors import PASSWORD, UserError

PATIENCE = 3  # seconds; a working hub answers in well under one


def endpoint() -> str:
    """The hub's address, without a user and password: it is shown, and asked only whether it answers."""
    return PASSWORD.sub("", os.environ.get("HF_ENDPOINT", "https://huggingface.co")).rstrip("/")


def offline() -> bool:
    """Whether the libraries have been told to use the cache alone, by the user or by `check`."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def check(config: Config, resume: Path | None = None) -> None:
    """Go offline, with a line that says so, if this run wants something from the hub and the hub does not answer.

    Raises:
        UserError: it does not answer, and a look at the cache's folders shows that what is wanted can't be there.
    """
    wants_data, wants_weights = config.data.kind == "hub", config.model.pretrained and not config.model.weights
    wants_weights = wants_weights and not (resume and any(resume.glob("checkpoints/[0-9]*")))  # it has its own
    if offline() or not (wants_data or wants_weights) or _answers():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    source = config.data.source
    kept = (datasets_cache / source.replace("/", "___"), hub_cache / f"datasets--{source.replace('/', '--')}")
    if wants_data and not any(folder.exists() for folder in kept):
        raise unreachable(f"the dataset {source}")
    if wants_weights and not any(hub_cache.glob("models--*")):
        raise unreachable(f"timm's pretrained {config.model.name}")
    if os.environ.get("RANK", "0") == "0":
        print(f"The hub ({endpoint()}) can't be reached: using only what is in this machine's cache.", file=sys.stderr)


def unreachable(wanted: str) -> UserError:
    """The error for something that is neither in the cache nor to be had."""
    return UserError(
        f"the hub ({endpoint()}) can't be reached, and {wanted} is not in this machine's cache. Ways on: connect; or "
        "use local data (--data.source FOLDER) and local weights (--model.weights FILE.safetensors), or train from "
        "scratch (--model.pretrained false); or see it work on embedded data: make demo"
    )


def _answers() -> bool:
    """Any HTTP answer counts. In a thread of its own, since a name look-up keeps no time limit."""
    answered = threading.Event()

    def look():
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()

"""Is the hub needed, and can it be reached? Asked once, before anything heavy is imported. Later, patient retries.

Left to themselves, the libraries retry one after the other, each for over a minute, before they give up. One request
here answers for all: if the hub is silent, they are set offline (they read `HF_HUB_OFFLINE` when imported), and find
what is already in this machine's cache, or fail at once.

A stream sends requests to the hub in every epoch, for hours. `persist` gives them all one rule: retry until the hub
answers, and raise one clear error if it does not.
"""

import http.client
import os
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from config import Config
from errors import UserError
from text import PASSWORD

PATIENCE = 3  # seconds; a working hub answers in well under one
FIRST_PAUSE = 0.5  # seconds before a request is retried; then twice as long each time
LOST_AFTER = 120  # seconds to retry a request for; a network that is down for a minute ends no run
LONGEST_WAIT = 300  # seconds; cap on the waits that the hub asks for: the window of its rate limits


def endpoint() -> str:
    """The hub's address, without user and password: it is only shown, and probed for an answer."""
    return PASSWORD.sub("", os.environ.get("HF_ENDPOINT", "https://huggingface.co")).rstrip("/")


def offline() -> bool:
    """Whether the libraries are set to use only the cache, by the user or by `check`."""
    return _says_yes(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"))


def data_offline() -> bool:
    """The same for `datasets`, which has a variable of its own."""
    own = os.environ.get("HF_DATASETS_OFFLINE")
    return offline() if own is None else _says_yes(own)


def _says_yes(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on")


def check(config: Config, resume: Path | None = None) -> None:
    """Go offline, with a line that says so, if this run needs something from the hub and the hub does not answer.

    Raises:
        UserError: it does not answer, and the cache's folders show that what is needed can't be there.
    """
    wants_data, wants_weights = config.data.kind == "hub", config.model.pretrained and not config.model.weights
    wants_weights = wants_weights and not (resume and any(resume.glob("checkpoints/[0-9]*")))  # it has its own
    if offline() or not (wants_data or wants_weights) or _answers():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    home = _folder("HF_HOME", _folder("XDG_CACHE_HOME", Path("~/.cache")) / "huggingface")
    hub_cache = _folder("HF_HUB_CACHE", _folder("HUGGINGFACE_HUB_CACHE", home / "hub"))
    datasets_cache = _folder("HF_DATASETS_CACHE", home / "datasets")
    source = config.data.source
    kept = (datasets_cache / source.replace("/", "___"), hub_cache / f"datasets--{source.replace('/', '--')}")
    if wants_data and not any(folder.exists() for folder in kept):
        raise unreachable(f"the dataset {source}")
    if wants_weights and not any(hub_cache.glob("models--*")):
        raise unreachable(f"timm's pretrained {config.model.name}")
    if os.environ.get("RANK", "0") == "0":
        print(f"The hub ({endpoint()}) can't be reached: using only what is in this machine's cache.", file=sys.stderr)


def _folder(variable: str, otherwise: Path) -> Path:
    """A folder that an environment variable names, as the libraries read it."""
    return Path(os.environ.get(variable, otherwise)).expanduser()


def unreachable(wanted: str) -> UserError:
    """The error for something that is not in the cache and can't be downloaded."""
    return UserError(
        f"the hub ({endpoint()}) can't be reached, and {wanted} is not in this machine's cache. Connect; or "
        "use local data (--data.source FOLDER) and local weights (--model.weights FILE.safetensors), or train from "
        "scratch (--model.pretrained false); or see it work on embedded data: --config recipes/demo_pretrain.yaml"
    )


def persist() -> None:
    """Retry each request for data on the hub until it is answered in full, for up to `LOST_AFTER` seconds.

    The libraries retry many requests, but not all: each epoch of a stream begins with one that a single 503 ends in a
    traceback, and with one that waits for ever. Where they do retry, their loops are nested and take anything from 20
    seconds to half an hour. This works below them all and leaves them nothing to retry.
    """
    from huggingface_hub import constants, set_client_factory  # not above: it reads the environment when imported
    from huggingface_hub.utils import httpx, parse_ratelimit_headers

    class Persistent(httpx.Client):
        def send(self, request, *, stream=False, **options):
            # Retry only what a stream can't do without. HEAD asks whether a cached file is the newest: unanswered, the
            # cache is used. Other addresses are of services that the libraries can do without.
            if request.method == "HEAD" or not re.search("/resolve/|/api/datasets/", request.url.path):
                return super().send(request, stream=stream, **options)
            request.extensions["timeout"] = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT).as_dict()
            deadline, wait = time.monotonic() + LOST_AFTER, FIRST_PAUSE
            while True:
                told = 0
                try:
                    response = super().send(request, stream=stream, **options)
                    problem = fault(request, response, stream)
                    if not problem:
                        return response
                    response.close()
                    told = told_wait(response.headers)
                except httpx.TransportError as error:  # refused, reset, silent, or shorter than announced
                    problem = str(error) or type(error).__name__
                if time.monotonic() > deadline:
                    raise lost(problem)
                pause = max(wait, min(told, LONGEST_WAIT))
                if wait == FIRST_PAUSE or told:
                    line = f"The hub ({endpoint()}) fails ({problem}): asking again, first in {pause:g} s."
                    print(line, file=sys.stderr, flush=True)
                time.sleep(pause)
                wait = min(2 * wait, 8)

    def fault(request, response, stream: bool) -> str | None:
        if response.status_code in (408, 429, 500, 502, 503, 504):
            return f"{response.status_code} {response.reason_phrase}"
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and response.is_success and not stream:
            size, came = int(asked[2]) - int(asked[1]) + 1, len(response.content)
            if came != size:  # cut off on the way, by something that announced the shorter length as the whole
                return f"{came} bytes of {size}"
        return None

    def told_wait(headers) -> int:
        limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
        if limit and not limit.remaining:
            return limit.reset_in_seconds
        return int(after) if after.isdigit() else 0

    set_client_factory(lambda: Persistent(follow_redirects=True))


def lost(problem: str) -> UserError:
    """The error for a hub that stopped answering in the middle of a run."""
    return UserError(
        f"the hub ({endpoint()}) stopped answering ({problem}), and {LOST_AFTER} seconds of asking again did not help. "
        "When it is back, continue after the last finished epoch with --resume and the run's folder, or start again if "
        "there is none"
    )


def _answers() -> bool:
    """Any HTTP answer counts. In a thread of its own, since a DNS look-up ignores the timeout."""
    answered = threading.Event()

    def look():
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLCertVerificationError):
                return  # but the libraries know authorities that urllib may not
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()

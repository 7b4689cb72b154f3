"""A small server that speaks as much of the hub's HTTP as its clients use to read a repository, and to make one.

It serves folders: `HubServer({"datasets/uoft-cs/cifar100": folder, "models/timm/resnet50.a1_in1k": folder})`. Only what
the clients ask for is here: repository info, tree, paths-info, and files by revision with ETag and byte ranges. For
uploads: who a token belongs to, new model repositories, LFS objects (of .safetensors; to a signed address, as the hub
has it) and commits, which are whole or not made. Not here: xet, so that clients need HF_HUB_DISABLE_XET.

And it fails, on demand: `faults` are handed out to the questions that a stream asks: for what a data set's repository
holds, and for ranges of its files.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAULTS = ("429", "500", "503", "reset", "truncated", "stall", "short")


class HubServer:
    """Serves repositories on a free loopback port; `requests` lists (method, path) of all that was asked, and `sent`
    counts what was sent of their files.

    Args:
        faults: one of `FAULTS`, or None for a proper answer, for each of these requests in turn; when they are used up,
            all goes well. `served` lists those that were met.
        store: a folder for repositories that are made: those of `user`, whose token is `token`.
    """

    def __init__(
        self,
        repositories: dict[str, Path],
        faults: Iterable[str | None] = (),
        store: Path | None = None,
        token: str = "",
    ):
        self.repositories = repositories
        self.store, self.token, self.role = store, token, "write"
        self.broken = ""  # a pattern of paths that are answered with 500
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.signature = secrets.token_hex()  # of the addresses that they are sent to
        self.commits: list[list[str]] = []  # the paths in each
        self.faults, self.served = iter(faults), []
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()  # bytes of each file's content, by its name
        self.limit = {"Retry-After": "1"}  # headers that come with a 429
        self.gone = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()  # seconds until it stops

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """From now on connections are refused, and those that are open are closed when they ask for more."""
        self.gone = True
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository: str) -> dict[str, Path]:
        folder = self.repositories[repository]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _entry(name: str, path: Path) -> dict:
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


def _handler_for(hub: HubServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def do_POST(self):
            self._answer()

        def do_PUT(self):
            self._answer()

        def _answer(self):
            if hub.gone:
                self.close_connection = True
                return
            hub.requests.append((self.command, self.path))
            url = urlparse(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.broken and re.search(hub.broken, path):
                self._send(500, b"")
            elif path.startswith("/lfs/"):
                self._object(path.removeprefix("/lfs/"), query, body)
            elif path in ("/api/whoami-v2", "/api/repos/create", "/api/validate-yaml") or (
                self.command == "POST" and re.search(r"/(preupload|commit)/main$|\.git/info/lfs/", path)
            ):
                self._write(path, body)
            elif match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+?)(/.*)?", path):
                self._api(f"{match[1]}/{match[2]}", match[3] or "", query, body)
            elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                self._file(f"{'datasets' if match[1] else 'models'}/{match[2]}", match[3])
            else:
                self._send(200 if path == "/" else 404, b"")

        def _api(self, repository, rest, query, body):
            if repository not in hub.repositories:
                return self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            files = hub.files(repository)
            if rest.startswith("/paths-info/"):
                fields = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
                wanted = fields.get("paths", [])
                wanted = [wanted] if isinstance(wanted, str) else wanted
                found = [_entry(name, files[name]) for name in wanted if name in files]
                found += [
                    {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                    for name in wanted
                    if name not in files and any(file.startswith(f"{name}/") for file in files)
                ]
                return self._json(found)
            if rest.startswith("/tree/"):
                below = "/".join(rest.split("/")[3:])
                inside = {n: p for n, p in files.items() if n.startswith(f"{below}/" if below else "")}
                if not inside and below:
                    return self._send(404, b'{"error": "no such folder"}', {"X-Error-Code": "EntryNotFound"})
                if query.get("recursive", ["false"])[0].lower() in ("true", "1"):
                    return self._json([_entry(name, path) for name, path in inside.items()])
                depth = len(below.split("/")) if below else 0
                folders = {"/".join(n.split("/")[: depth + 1]) for n in inside if n.count("/") > depth}
                entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
                return self._json(entries + [_entry(n, p) for n, p in inside.items() if n.count("/") == depth])
            name = repository.partition("/")[2]
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "_id": "0", "sha": COMMIT, "private": False, "gated": False, "disabled": False}
            info |= {
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
            return self._json(info)

        def _write(self, path, body):
            """What only the owner of the token may."""
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._json({"error": "Invalid username or password."}, 401)
            if path == "/api/whoami-v2":
                access = {"displayName": "a token", "role": hub.role}
                return self._json({"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": access}})
            if hub.role == "read":
                return self._json({"error": "This token may only read."}, 403)
            if path == "/api/validate-yaml":
                return self._validate(json.loads(body)["content"])
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            match = re.fullmatch(
                r"/(?:api/models/)?(user/[^/]+?)(/preupload/main|/commit/main|\.git/info/lfs/.+)", path
            )
            if not match:
                return self._json({"error": "This token may not write here."}, 403)
            if f"models/{match[1]}" not in hub.repositories:
                return self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            if match[2] == "/commit/main":
                return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
            asked = json.loads(body)
            if match[2] == "/preupload/main":
                modes = {True: "lfs", False: "regular"}
                files = [
                    {
                        "path": it["path"],
                        "uploadMode": modes[it["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for it in asked["files"]
                ]
                return self._json({"files": files})
            if match[2].endswith("/objects/batch"):
                verify = {"href": f"{hub.url}/{match[1]}.git/info/lfs/verify"}
                objects = [dict(it) for it in asked["objects"]]
                for it in objects:
                    if it["oid"] not in hub.objects:
                        upload = {"href": f"{hub.url}/lfs/{it['oid']}?signature={hub.signature}"}
                        it["actions"] = {"upload": upload, "verify": verify}
                return self._json({"transfer": "basic", "objects": objects})
            whole = len(hub.objects.get(asked["oid"], b"")) == asked["size"]
            return self._json({} if whole else {"error": "There is no such object."}, 200 if whole else 404)

        def _validate(self, card):
            head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
            try:
                valid = bool(head) and isinstance(yaml.safe_load(head[1]), dict)
            except yaml.YAMLError:
                valid = False
            errors = [] if valid else [{"message": "the card has no valid head"}]
            return self._json({"errors": errors, "warnings": []}, 200 if valid else 400)

        def _create(self, asked):
            repository = f"{asked['organization'] or 'user'}/{asked['name']}"
            if not repository.startswith("user/") or asked.get("type", "model") != "model":
                return self._json({"error": f"You may not create {repository}."}, 403)
            exists = f"models/{repository}" in hub.repositories
            if not exists:
                folder = hub.store / asked["name"]
                folder.mkdir()
                hub.repositories[f"models/{repository}"] = folder
            said = {"error": "You already created this model repo."} if exists else {}
            return self._json(said | {"url": f"{hub.url}/{repository}"}, 409 if exists else 200)

        def _object(self, oid, query, content):
            """An LFS object, from whoever knows the signed address."""
            if query.get("signature") != [hub.signature]:
                return self._send(403, b"")
            if hashlib.sha256(content).hexdigest() != oid:
                return self._send(400, b"")
            hub.objects[oid] = content
            return self._send(200, b"")

        def _commit(self, repository, lines):
            files = {}
            for line in lines[1:]:  # the first is the message
                value = line["value"]
                if line["key"] == "lfsFile" and value["oid"] in hub.objects:
                    files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "file" and value["encoding"] == "base64":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    return self._json({"error": f"{line['key']} is not understood here."}, 400)
            for name, content in files.items():
                (hub.repositories[f"models/{repository}"] / name).write_bytes(content)
            hub.commits.append(sorted(files))
            url = f"{hub.url}/{repository}/commit/{COMMIT}"
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

        def _file(self, repository, name):
            path = hub.files(repository).get(name) if repository in hub.repositories else None
            headers = {"X-Repo-Commit": COMMIT}
            if path is None:
                missing = "EntryNotFound" if repository in hub.repositories else "RepoNotFound"
                return self._send(404, b"", headers | {"X-Error-Code": missing})
            content, status = path.read_bytes(), 200
            headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            if self.command == "GET":
                hub.sent[name] += len(content)
            self._send(status, content, headers)

        def _json(self, value, status=200):
            headers = {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}
            self._send(status, json.dumps(value).encode(), headers)

        def _send(self, status, content, headers=None):
            streams = self.command == "GET" and (status == 206 or "/api/datasets/" in self.path)
            fault = next(hub.faults, None) if streams else None
            if fault == "short" and status != 206:
                fault = "truncated"  # an answer that isn't a range promises no other length
            if fault:
                hub.served.append(fault)
            if fault in ("429", "500", "503"):
                status, content, headers = int(fault), b"", hub.limit if fault == "429" else {}
            elif fault == "short":  # the length that is announced is that of what comes
                content = content[: len(content) // 2]
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            cut = fault in ("reset", "truncated", "stall")  # half of what was announced comes, and then ...
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection |= cut  # ... the connection is closed (truncated)
            if fault == "stall":
                self.rfile.read(1)  # ... nothing, until the client hangs up
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()  # ... a reset, since nothing may linger

    return Handler

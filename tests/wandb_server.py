"""A small server that speaks as much of W&B's HTTP as its client needs to start a run and to upload figures."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer:
    """On a free loopback port. `started` lists the ids of runs that began or went on, `projects` where."""

    def __init__(self):
        self.started: list[str] = []
        self.projects: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()  # seconds until it stops

    def stop(self):
        """From now on connections are refused; one that is open gets no answer."""
        self.server.gone = True
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query: str, variables: dict) -> dict:
        """To a question in GraphQL."""
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "bucket(name:" in query:
            return {"model": {"bucket": None}}  # no run of that id is known
        if "upsertBucket" in query:
            name = variables["name"]
            self.projects.append(variables["project"])
            self.started += [] if name in self.started[-1:] else [name]
            project = {"id": "1", "name": variables["project"], "entity": {"id": "1", "name": "me"}}
            return {"upsertBucket": {"bucket": {"id": "1", "name": name, "displayName": name, "project": project}}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}  # nowhere to upload them to
        return {}


def _handler_for(wandb: WandbServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            if getattr(self.server, "gone", False):
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                answer = {"data": wandb.answer(asked["query"], asked.get("variables") or {})}
            answer = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    return Handler

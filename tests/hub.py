"""A Hub on this machine, as far as uploading goes: it keeps what it receives, and refuses what the real one refuses."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_of_the_fake"


class Hub:
    """Repositories as {name: {branch: {path: content}}}, and every request as (method, path)."""

    def __init__(self):
        self.repos, self.private, self.requests, self.lfs = {}, {}, [], {}
        self.status = None  # what every request is answered with, to see how errors are said
        self.url = ""


def metadata_errors(content):
    """What the Hub says of a README's metadata, as far as it concerns us."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    values = yaml.safe_load(found[1]) if found else None
    if not isinstance(values, dict):
        return ["no metadata"]
    errors = []
    if not re.fullmatch(r"[\w./-]+", values.get("base_model", "a/b")):
        errors.append("base_model is no name of a repository")
    for model in values.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append("model-index[].name is required")
        for result in model.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append("model-index[].results[].task.type is required")
            for key in ("type", "name"):
                if not isinstance(result.get("dataset", {}).get(key), str):
                    errors.append(f"model-index[].results[].dataset.{key} is required")
            for metric in result["metrics"]:
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append("a metric has a type and a value")
    return errors


class Answers(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, said in headers:
            self.send_header(name, said)
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self):
        hub, path, body = self.hub, self.path.partition("?")[0], self.body()
        hub.requests.append((self.command, path))
        if path.startswith("/lfs/"):  # what the batch answered is signed, and takes no token
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            hub.lfs[path.removeprefix("/lfs/")] = body
            return self.answer({})
        if hub.status is not None:
            return self.answer({"error": "as was asked for"}, hub.status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in hub.repos
            if not there:
                hub.repos[name], hub.private[name] = {"main": {}}, asked.get("visibility") == "private"
            return self.answer({"url": f"{hub.url}/{name}", "name": name}, 409 if there else 200)
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            told = [{"message": error} for error in errors]
            return self.answer({"errors": told, "warnings": []}, 400 if errors else 200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)(?:/(.+))?", path):
            return self.about_a_repo(hub.repos.get(found[1]), *found.groups(), body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.answer({"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]})
        return self.answer({"error": f"the fake knows no {path}"}, 404)

    do_GET = do_POST = do_PUT = handle_any

    def upload(self, wanted):
        there = wanted["oid"] in self.hub.lfs
        actions = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
        return {"oid": wanted["oid"], "size": wanted["size"], **actions}

    def about_a_repo(self, repo, name, what, revision, body):
        if repo is None or (revision not in repo and what != "branch"):
            return self.answer({"error": "not found"}, 404, [("X-Error-Code", "RepoNotFound")])
        if what == "branch":
            repo.setdefault(revision, dict(repo["main"]))
            return self.answer({})
        if what == "tree":
            return self.answer(
                [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in repo[revision].items()]
            )
        if what == "preupload":
            files = json.loads(body)["files"]
            large = [f["path"].endswith((".safetensors", ".gguf")) for f in files]
            modes = ["lfs" if is_large else "regular" for is_large in large]
            told = [
                {"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)
            ]
            return self.answer({"files": told})
        assert what == "commit", what
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo[revision][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo[revision][value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo[revision][value["path"]]
        return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextmanager
def running_hub():
    """A Hub that answers at `hub.url` within the context."""
    hub = Hub()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (Answers,), {"hub": hub, "protocol_version": "HTTP/1.1"})
    )
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A small server that answers as the Hugging Face hub does, for tests of downloads.

`huggingface_hub` asks three questions to download a repository: what is the newest commit, which
files does it have, and what is in a file. They have the same addresses here as at the hub, and the
answers have the same headers: a commit, an ETag, and redirects to where a file is stored. What the
hub answers if a repository does not exist, or if its terms were not accepted, is reproduced, too.
The hub's newer protocol for large files (Xet) is not: without it, files come over plain HTTP.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

FILES_PER_PAGE = 3  # The hub lists up to 1,000 files in an answer, and links to the next ones.
LARGE_FILES = {".safetensors", ".parquet", ".bin"}  # stored elsewhere, at the end of a redirect

# Whom a token belongs to. Any other token is refused, even for public repositories.
MEMBER = "hf_member"  # has accepted the terms of the gated repositories
VISITOR = "hf_visitor"  # has not


@dataclass
class Repository:
    """A folder that is served as a repository. Gated: its files are for `MEMBER` only."""

    folder: Path
    gated: bool = False

    @cached_property
    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    @cached_property
    def commit(self) -> str:
        """The hash of all files, in the form of a Git commit: 40 hexadecimal digits."""
        return hashlib.sha1(repr(self.files).encode()).hexdigest()


def is_large(name: str) -> bool:
    return Path(name).suffix in LARGE_FILES


def etag(name: str, content: bytes) -> str:
    """The hash that identifies a file: SHA-256 if it is large, else that of Git's blobs."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A hub that serves from a thread within a `with` block, or between `start` and `stop`.

    repositories: by their ids, those of datasets with "datasets/" in front. requests: what was
    asked so far, such as "HEAD /org/name/resolve/main/config.json".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.port = 0  # any free port, and then the same one after each stop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), HubRequest)
        self.server.hub, self.server.daemon_threads = self, True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "Hub":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()


class HubRequest(BaseHTTPRequestHandler):
    """One request, and the answer to it."""

    # A file is at "org/name/resolve/COMMIT/PATH", whence a redirect leads to where it is stored.
    ADDRESS = re.compile(
        r"/(?P<prefix> (?:api/ (?:resolve-cache/)? | stored/)? )"
        r"(?P<id> (?:models/ | datasets/)? [^/]+ / [^/]+ )"
        r"/ (?P<question> revision | tree | resolve ) / (?P<revision> [^/]+ )"
        r"(?:/ (?P<name> .+ ))?",
        re.VERBOSE,
    )

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        url = urlsplit(self.path)
        hub.requests.append(f"{self.command} {url.path}")
        address = self.ADDRESS.fullmatch(url.path)
        if not address:
            return self.refuse(404, "EntryNotFound", "Not found")
        repository = hub.repositories.get(address["id"].removeprefix("models/"))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", MEMBER, VISITOR):
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if not repository:
            # Without a token, the hub does not say whether it is private, or does not exist. (Its
            # 401 has no code, but without HTTPS huggingface_hub would not understand it.)
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if address["revision"] not in ("main", repository.commit):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if address["question"] == "revision":
            return self.describe(address["id"], repository)
        if address["question"] == "tree":
            return self.list_files(repository, parse_qs(url.query))
        # Everyone can see which files there are, but not read them.
        if repository.gated and token != MEMBER:
            message = f"Access to {address['id']} is restricted."
            return self.refuse(403 if token else 401, "GatedRepo", message)
        content = repository.files.get(address["name"])
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.send_file(address, repository.commit, content)

    do_HEAD = do_GET

    def describe(self, repository_id: str, repository: Repository) -> None:
        """The newest commit, and what else the page of a repository shows."""
        files = [{"rfilename": name} for name in repository.files]
        gated = "auto" if repository.gated else False
        description = {"id": re.sub("^(models|datasets)/", "", repository_id), "siblings": files}
        description |= {"sha": repository.commit, "private": False, "gated": gated, "tags": []}
        self.answer(200, json.dumps(description).encode())

    def list_files(self, repository: Repository, query: dict[str, list[str]]) -> None:
        """Folders and files, a page at a time."""
        folders = {str(p) for name in repository.files for p in Path(name).parents} - {"."}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in folders]
        for name, content in repository.files.items():
            entry = {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
            if is_large(name):
                oid = etag(name, content)
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        start, headers = int(query.get("cursor", ["0"])[0]), {}
        end = start + FILES_PER_PAGE
        if end < len(entries):
            page = f"{self.server.hub.url}{urlsplit(self.path).path}"
            page += f"?recursive={query['recursive'][0]}&cursor={end}"
            headers["Link"] = f'<{page}>; rel="next"'
        self.answer(200, json.dumps(entries[start:end]).encode(), **headers)

    def send_file(self, address: re.Match, commit: str, content: bytes) -> None:
        """A file, or its end if an interrupted download is resumed."""
        name, headers = address["name"], {"X-Repo-Commit": commit}
        if not address["prefix"]:
            if not is_large(name):
                return self.answer(307, Location=f"/api/resolve-cache{self.path}", **headers)
            headers["X-Linked-Etag"] = f'"{etag(name, content)}"'
            headers["X-Linked-Size"] = str(len(content))
            location = f"{self.server.hub.url}/stored{self.path}"
            return self.answer(302, Location=location, **headers)
        headers["ETag"] = f'"{etag(name, content)}"'
        byte_range = re.fullmatch("bytes=([0-9]+)-", self.headers.get("Range", ""))
        if not byte_range:
            return self.answer(200, content, **headers)
        start = int(byte_range[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206, content[start:], **headers)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, **{"X-Error-Message": message}, **headers)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass  # instead of a line on stderr

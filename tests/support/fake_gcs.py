"""A bucket server on localhost that speaks the part of the JSON API of Google Cloud Storage that a run needs.

Objects are kept in memory, whole and with a generation; there are no folders, no append and no rename, as in the real
one. Lists come in pages of `PAGE`. Anything that is not known here is answered with 501, so that a test fails.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 7
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")
MOVE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")


class Refused(Exception):
    """What is answered instead: a status, such as 404 or 412."""


class Bucket:
    """The objects by name, and what has been asked for."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and User-Agent of each."""
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self._generations = itertools.count(1000)
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}

    def get(self, name: str, query: dict[str, str]) -> tuple[bytes, int]:
        """An object whose generation is as `query` wants it."""
        with self.lock:
            found = self.objects.get(name)
            generation = found[1] if found else 0
            if int(query.get("ifGenerationMatch", generation)) != generation:
                raise Refused(412)
            if found is None or int(query.get("generation", generation)) != generation:
                raise Refused(404)
            if query.get("ifGenerationNotMatch") == str(generation):
                raise Refused(304)
            return found

    def put(self, name: str, data: bytes, query: dict[str, str]) -> None:
        """Write an object, if the one that is there has the generation that `query` wants."""
        with self.lock:
            generation = self.objects[name][1] if name in self.objects else 0
            if int(query.get("ifGenerationMatch", generation)) != generation:
                raise Refused(412)
            self.objects[name] = data, next(self._generations)

    def delete(self, name: str, query: dict[str, str]) -> None:
        """Delete an object, as `get` finds it."""
        with self.lock:
            self.get(name, query)
            del self.objects[name]

    def list(self, query: dict[str, str]) -> tuple[list[str], list[str], str]:
        """A page of names, of prefixes, and the token of the next one."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        found = {}
        with self.lock:
            for name in sorted(self.objects):
                if name.startswith(prefix) and name >= first and (not end or name < end):
                    head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                    found[prefix + head + cut if cut else name] = bool(cut)
        rest = [name for name in found if name > query.get("pageToken", "")]
        size = min(PAGE, int(query.get("maxResults", PAGE)))
        page = rest[:size]
        return [n for n in page if not found[n]], [n for n in page if found[n]], page[-1] if rest[size:] else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    bucket: Bucket
    name: str

    def handle(self) -> None:
        """Serve a connection until who asks is gone, killed perhaps."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.body = self._read()
        self.bucket.requests.append((self.command, url.path, self.headers.get("User-Agent", "")))
        try:
            self._route(self.command, url.path)
        except Refused as refused:
            self._answer(refused.args[0])

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _route(self, method: str, path: str) -> None:
        bucket = self.bucket
        if method == "POST" and path == "/batch/storage/v1":
            self._batch()
        elif method == "GET" and (found := self._ours(BUCKET, path)) is not None:
            self._json({"kind": "storage#bucket", "name": self.name, "id": self.name})
        elif method == "GET" and (found := self._ours(LIST, path)) is not None:
            names, prefixes, token = bucket.list(self.query)
            items = [self._metadata(name) for name in names if name in bucket.objects]
            answer = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
            self._json(answer | ({"nextPageToken": token} if token else {}))
        elif (found := self._ours(UPLOAD, path)) is not None:
            self._upload()
        elif method == "POST" and (found := self._ours(COPY, path)) is not None:
            bucket.put(found[2], bucket.get(found[0], {})[0], self.query)
            self._json({"kind": "storage#rewriteResponse", "done": True, "resource": self._metadata(found[2])})
        elif method == "POST" and (match := MOVE.fullmatch(path)) and match[1] == self.name:
            old, new = unquote(match[2]), unquote(match[3])
            bucket.put(new, bucket.get(old, {})[0], {})
            bucket.delete(old, {})
            self._json(self._metadata(new))
        elif method in ("GET", "DELETE") and (found := self._ours(OBJECT, path)) is not None:
            if method == "DELETE":
                bucket.delete(found[0], self.query)
                self._answer(204)
            elif self.query.get("alt") == "media":
                self._media(*bucket.get(found[0], self.query))
            else:
                bucket.get(found[0], self.query)
                self._json(self._metadata(found[0]))
        else:
            bucket.unknown.append(f"{method} {self.path}")
            raise Refused(501)

    def _ours(self, pattern: re.Pattern[str], path: str) -> list[str] | None:
        """The object names in a path of this kind, without the buckets."""
        if not (match := pattern.fullmatch(path)):
            return None
        parts = [unquote(part) for part in match.groups()]
        if any(part != self.name for part in parts[::2]):
            raise Refused(404)
        return parts[1::2] if len(parts) < 4 else [parts[1], "", parts[3]]

    def _upload(self) -> None:
        kind, name = self.query["uploadType"], self.query.get("name", "")
        if kind == "media":
            self._written(name, self.body, self.query)
        elif kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, data, _ = self.body.split(b"--" + boundary)
            about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, data))
            self._written(name or json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", data), self.query)
        elif "upload_id" not in self.query:
            key = str(len(self.bucket.uploads))
            name = name or json.loads(self.body)["name"]
            self.bucket.uploads[key] = name, self.query, bytearray()
            host = self.headers["Host"]
            location = f"http://{host}{urlsplit(self.path).path}?uploadType=resumable&upload_id={key}"
            self._answer(200, b"{}", {"Location": location})
        else:
            name, query, data = self.bucket.uploads[self.query["upload_id"]]
            data += self.body
            if self.headers["Content-Range"].endswith("/*"):
                self._answer(308, headers={"Range": f"bytes=0-{len(data) - 1}"})
            else:
                self._written(name, bytes(data), query)

    def _written(self, name: str, data: bytes, query: dict[str, str]) -> None:
        self.bucket.put(name, data, query)
        self._json(self._metadata(name))

    def _batch(self) -> None:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
        answer = ""
        for part in self.body.decode().split(f"--{boundary}")[1:-1]:
            target = urlsplit(re.search(r"^DELETE (\S+)", part, re.M)[1])
            try:
                self.bucket.delete(self._ours(OBJECT, target.path)[0], {})
                status = 204
            except Refused as refused:
                status = refused.args[0]
            answer += f"--batch_answer\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} .\r\n\r\n\r\n"
        kind = {"Content-Type": "multipart/mixed; boundary=batch_answer"}
        self._answer(200, f"{answer}--batch_answer--".encode(), kind)

    def _media(self, data: bytes, generation: int) -> None:
        about = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if not (wanted := self.headers.get("Range")):
            return self._answer(200, data, about)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1 if first and last else len(data), len(data))
        if begin >= len(data):
            raise Refused(416)
        about["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._answer(206, data[begin:end], about)

    def _metadata(self, name: str) -> dict[str, Any]:
        data, generation = self.bucket.objects[name]
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "id": f"{self.name}/{name}/{generation}",
            "name": name,
            "bucket": self.name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": when,
            "updated": when,
        }

    def _json(self, value: dict[str, Any]) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def serve(name: str) -> Iterator[tuple[Bucket, str]]:
    """A server of one empty bucket, and its URL."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket, "name": name})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield bucket, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

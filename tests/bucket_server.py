"""The JSON API of Google Cloud Storage in small: what gcsfs, google-cloud-storage and TensorStore ask of it.

Objects appear whole when their last byte has come, can't be extended, know generations, and are listed at once. Nobody
needs credentials. Buckets are those that were given; others are not there.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import socketserver
import sys
import threading
import urllib.parse

STORAGE = re.compile(r"/(?:(?P<verb>upload|download)/)?storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>.+))?)?")


class Refused(Exception):  # noqa: N818
    """An HTTP status that says no."""

    def __init__(self, status, message=""):
        self.status, self.message = status, message


class Bucket:
    """The objects of one bucket."""

    def __init__(self, name):
        self.name, self.objects = name, {}  # {object: (bytes, generation)}
        self.refused = {}  # {HTTP method: the status it is answered with}
        self.written, self.read = [], set()  # objects as they came, and those that were asked for
        self.lock = threading.RLock()
        self._generations = itertools.count(1)

    def put(self, name, content, match=None):
        with self.lock:
            _, generation = self.objects.get(name, (b"", 0))
            if match not in (None, str(generation)):
                raise Refused(412, "conditionNotMet")
            self.objects[name] = (content, next(self._generations))
            self.written.append(name)

    def names(self, prefix=""):
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if (found := STORAGE.fullmatch(path)) is None:
                raise Refused(404, f"no such service: {path}")
            verb, name, bucket = found["verb"], found["name"], self.server.buckets.get(found["bucket"])
            if bucket is None:
                raise Refused(404, "The specified bucket does not exist.")
            self.bucket = bucket
            if self.command in bucket.refused:
                raise Refused(bucket.refused[self.command], "Anonymous caller does not have access to the bucket.")
            if verb == "upload":
                self.upload()
            elif not path.endswith("/o") and name is None:
                self.json({"kind": "storage#bucket", "name": bucket.name, "location": "US"})
            elif name is None:
                self.list()
            else:
                self.object(urllib.parse.unquote(name), verb)
        except Refused as no:
            error = {"code": no.status, "message": no.message, "errors": [{"message": no.message}]}
            self.json({"error": error}, no.status)

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def object(self, name, verb):
        content, generation = self.found(name)
        if self.query.get("ifGenerationMatch") not in (None, str(generation)):
            raise Refused(412, "conditionNotMet")
        if self.query.get("ifGenerationNotMatch") == str(generation):
            return self.reply(304, b"")
        if self.command == "DELETE":
            self.bucket.objects.pop(name, None)
            return self.reply(204, b"")
        if verb != "download" and self.query.get("alt") != "media":
            return self.json(self.resource(name))
        self.bucket.read.add(name)
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
        headers = {"X-Goog-Generation": generation}
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if asked else {}
        return self.reply(206 if asked else 200, content[first : last + 1], "application/octet-stream", headers)

    def list(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, last = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], set()
        with self.bucket.lock:
            for name in self.bucket.names(prefix):
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                if cut >= 0:
                    prefixes.add(name[: cut + len(delimiter)])
                elif name >= first and not (last and name >= last):
                    items.append(self.resource(name))
        self.json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def upload(self):
        match self.query.get("uploadType"):
            case _ if "upload_id" in self.query:
                return self.resume()
            case "media":
                name, content = self.query["name"], self.body
            case "resumable":
                name = self.query.get("name") or json.loads(self.body)["name"]
                with self.bucket.lock:
                    key = str(len(self.server.uploads))
                    self.server.uploads[key] = [name, self.query.get("ifGenerationMatch"), bytearray()]
                path = f"/upload/storage/v1/b/{self.bucket.name}/o?uploadType=resumable&upload_id={key}"
                return self.reply(200, b"", headers={"Location": f"{self.server.url}{path}"})
            case kind:
                raise Refused(400, f"uploadType={kind}")
        self.bucket.put(name, content, self.query.get("ifGenerationMatch"))
        return self.json(self.resource(name))

    def resume(self):
        name, match, content = self.server.uploads[self.query["upload_id"]]
        content += self.body
        if (self.headers.get("Content-Range") or "/0").endswith("/*"):
            return self.reply(308, b"", headers={"Range": f"bytes=0-{len(content) - 1}"})
        self.bucket.put(name, bytes(content), match)
        return self.json(self.resource(name))

    def found(self, name):
        try:
            return self.bucket.objects[name]
        except KeyError:
            raise Refused(404, f"No such object: {name}") from None

    def resource(self, name):
        content, generation = self.found(name)
        return {
            **{"kind": "storage#object", "name": name, "bucket": self.bucket.name, "size": str(len(content))},
            **{"generation": str(generation), "metageneration": "1", "etag": str(generation)},
            **{"timeCreated": "2024-01-01T00:00:00.000Z", "updated": "2024-01-01T00:00:00.000Z"},
            **{"md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "contentType": "text/plain"},
        }

    def json(self, value, status=200):
        self.reply(status, json.dumps(value).encode(), "application/json")

    def reply(self, status, content, kind="text/plain", headers=None):
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Says nothing."""


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 64

    def __init__(self, names):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets, self.uploads = {name: Bucket(name) for name in names}, {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore looks for no other credentials
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask for the kind of bucket by gRPC
        }

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed or wants no answer any more
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(*names):
    """A server of these buckets; its `environment` leads the libraries to it."""
    with Server(names) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

"""A server on this machine that breaks connections, lies and changes its files."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

DATE = "Mon, 05 Jul 2021 00:00:00 GMT"


class Handler(BaseHTTPRequestHandler):
    """Serves one file, as well as `server.plan` lets it."""

    def do_GET(self):
        plan = self.server.plan
        plan.requests.append(dict(self.headers))
        status = plan.statuses.pop(0) if plan.statuses else 200
        if status != 200 or self.path != plan.path:
            return self.send_error(status if status != 200 else 404)
        start = self.asked_start()
        if start is not None and start >= len(plan.content):
            return self.answer(416, {"Content-Range": f"bytes */{len(plan.content)}"}, b"")
        begin = 0 if start is None else start + plan.shifted
        body = plan.content[begin:]
        headers = {"Content-Length": str(len(body) + plan.exaggerated)} if plan.tells_size else {}
        headers |= {k: v for k, v in plan.validators.items() if v}
        if start is not None:
            whole = len(plan.content)
            headers["Content-Range"] = f"bytes {begin}-{whole - 1}/{whole}"
        self.answer(200 if start is None else 206, headers, body)

    def asked_start(self):
        """Return where the asked part begins, None for the whole."""
        plan, asked = self.server.plan, self.headers.get("Range")
        if not (asked and plan.knows_ranges):
            return None
        version = self.headers.get("If-Range")
        same = version is None or version in plan.validators.values()
        return int(asked.removeprefix("bytes=").removesuffix("-")) if same else None

    def answer(self, status, headers, body):
        """Send an answer, or as much of it as the plan allows."""
        plan = self.server.plan
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        most = plan.cuts.pop(0) if plan.cuts else len(body)
        plan.sent += len(body[:most])
        self.wfile.write(body[:most])

    def log_message(self, *args):
        pass


@contextmanager
def serving(path, content):
    """Serve a file under a path; yield the server, whose plan is a good one at first.

    Its `statuses` and `cuts` are those of the next answers, then of a good server again.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan = SimpleNamespace(
        path=path, content=content, validators={"ETag": '"1"', "Last-Modified": DATE},
        knows_ranges=True, tells_size=True, cuts=[], statuses=[], exaggerated=0, shifted=0,
        requests=[], sent=0,
    )  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

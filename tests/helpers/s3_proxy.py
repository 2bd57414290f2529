"""A proxy for the S3 server that forwards requests and injects the faults that a test asks for."""

import http.client
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "expect"}
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)
DENIED = (
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
)
ALWAYS = float("inf")
SLOW_SECONDS = 1.5


@dataclass
class Fault:
    kind: str
    containing: str  # substring of the request path
    times: float = ALWAYS
    seconds: float = ALWAYS  # duration, from the first affected request
    first: float | None = None

    def applies_to(self, path):
        now = time.monotonic()
        if (
            self.containing not in path
            or self.times <= 0
            or (self.first is not None and now > self.first + self.seconds)
        ):
            return False
        self.times, self.first = self.times - 1, self.first or now
        return True


class Faults:
    """Planned faults, counts of injected faults by kind, and the requests with their answers.

    `requests`: (method, path) of each; `sent`: (path, bytes of the body of the answer) of each.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.clear()

    def clear(self):
        self._faults, self.befallen, self.requests, self.sent, self._share, self._draw = (
            [],
            Counter(),
            [],
            [],
            0.0,
            random.Random(0),
        )

    def answer_503(self, containing="", times=ALWAYS, seconds=ALWAYS):
        """Answer with 503, as S3 does when the request rate is too high."""
        self._faults.append(Fault("503", containing, times, seconds))

    def deny(self, containing):
        """Answer with 403, as S3 does without the right to an action."""
        self._faults.append(Fault("403", containing))

    def truncate(self, containing, times=1):
        """Send half of the body after headers that announce all of it."""
        self._faults.append(Fault("truncate", containing, times))

    def reset(self, containing, times=1):
        """Close the connection without an answer."""
        self._faults.append(Fault("reset", containing, times))

    def at_random(self, share, seed=0):
        """Make this share of all requests fail in a random way or be answered late."""
        self._share, self._draw = share, random.Random(seed)

    def asked(self, method, containing):
        return sum(verb == method and containing in path for verb, path in self.requests)

    def bytes_sent(self, containing):
        return sum(size for path, size in self.sent if containing in path)

    def of(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            kind = next((fault.kind for fault in self._faults if fault.applies_to(path)), None)
            if kind is None and self._draw.random() < self._share:
                kind = self._draw.choice(("503", "reset", "truncate", "slow"))
            self.befallen[kind] += 1
            return kind


class Proxy(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.faults = upstream, Faults()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.faults.of(self.command, self.path)
        if content := {"503": SLOW_DOWN, "403": DENIED}.get(fault):
            kind = {"Content-Type": "application/xml"}
            return self.answer(int(fault), kind, content, len(content))
        if fault == "reset":
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        self.close_connection = fault == "truncate"
        server = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        server.request(
            self.command,
            self.path,
            body,
            {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in NOT_PASSED_ON
            },
        )
        answer = server.getresponse()
        content = answer.read()
        server.close()
        return self.answer(
            answer.status,
            dict(answer.getheaders()),
            content,
            len(content) // (2 if fault == "truncate" else 1),
        )

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def answer(self, status, headers, content, send):
        self.send_response_only(status)
        headers = {
            name: value for name, value in headers.items() if name.lower() not in NOT_PASSED_ON
        }
        if not any(name.lower() == "content-length" for name in headers):
            headers["Content-Length"] = str(len(content))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.faults.sent.append((self.path, send))
            with suppress(ConnectionError):  # the client may not want the rest
                self.wfile.write(content[:send])

    def log_message(self, *arguments):
        pass

"""A judge on this machine that answers over HTTP, well or badly, as a test tells it to."""

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat(text):
    """The body of a chat completion that says `text`."""
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        """Say nothing where the asker has hung up, which some tests are about."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class StubJudge:
    """Serves /v1/chat/completions; each question meets the faults in turn, then gets a good answer.

    Args:
        prefer: (message, A, B) → what the good answer says, "A", "B" or "tie".
        faults: names of `Handler`'s faults, one for each time a question is put.
        always: a fault for every time after that.
    """

    def __init__(self, prefer, faults=(), always=None, slow=0.4):
        self.prefer, self.faults, self.always, self.slow = prefer, list(faults), always, slow
        self.requests, self.tries = [], Counter()
        self.clock = time.monotonic
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.stub = self

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, question):
        """Which fault meets this question now, or None."""
        with self.lock:
            n = self.tries[question]
            self.tries[question] += 1
        return self.faults[n] if n < len(self.faults) else self.always


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        stub = self.server.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = json.loads(body["messages"][-1]["content"])
        with stub.lock:
            stub.requests.append({"at": stub.clock(), "path": self.path, "headers": dict(self.headers), "body": body})
        question = asked["message"], asked["A"], asked["B"]
        fault = stub.fault(question)
        if callable(fault):
            fault = fault(*question)
        if fault is None:
            self.reply(200, chat(json.dumps({"winner": stub.prefer(*question)})))
        elif fault.startswith("http_"):
            status, _, wait = fault.removeprefix("http_").partition(" ")
            echo = f"no: {self.headers.get('Authorization')}".encode()  # as some servers do
            self.reply(int(status), echo, **({"Retry-After": wait} if wait else {}))
        else:
            getattr(self, fault)()

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def html(self):
        self.reply(200, b"<html><body>Welcome to the hotel's network</body></html>", **{"Content-Type": "text/html"})

    def empty(self):
        self.reply(200, b"")

    def torn_json(self):
        self.reply(200, chat('{"winner": "A"}')[:-9])

    def nested_body(self):
        self.reply(200, b"[" * 100_000)  # deeper than the parser goes

    def nested_answer(self):
        self.reply(200, chat("[" * 100_000))

    def prose(self):
        self.reply(200, chat("I think that A is better."))

    def echo(self):
        self.reply(200, chat(f"You are {self.headers.get('Authorization')}."))

    def bare_letter_in_json(self):
        self.reply(200, chat('"A"'))

    def third_winner(self):
        self.reply(200, chat('{"winner": "C"}'))

    def two_winners(self):
        self.reply(200, chat('{"winner": ["A", "B"]}'))

    def no_winner(self):
        self.reply(200, chat('{"better": "A"}'))

    def no_choices(self):
        self.reply(200, b'{"choices": []}')

    def no_text(self):
        self.reply(200, chat(None))

    def wrong_encoding(self):
        self.reply(200, chat('{"winner": "A"}'), **{"Content-Encoding": "gzip"})

    def endless(self):
        self.reply(200, b" " * (1 << 21) + chat('{"winner": "A"}'))

    def late(self):
        time.sleep(self.server.stub.slow)
        self.close_connection = True

    def dribble(self):
        """Never still for as long as a time-out, and never done."""
        self.send_response(200)
        self.send_header("Content-Length", "10000")
        self.end_headers()
        end = time.monotonic() + self.server.stub.slow
        try:
            while time.monotonic() < end:
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:  # the asker has gone
            pass
        self.close_connection = True

    def hang_up(self):
        self.close_connection = True

    def cut_off(self):
        whole = chat('{"winner": "A"}')
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[:20])
        self.close_connection = True

    def log_message(self, *_):
        """Nothing: a test has no log."""

"""A real HTTP server on loopback that speaks just enough of the chat-completions protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: Gets the prompt and the request's number; returns the answer's text or one of the faults below.
Answer = Callable[[str, int], 'str | Fault']


class Fault:
    def __init__(self, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.kind = kind
        self.status = status
        self.headers = headers or {}


HANG = Fault('hang')
CLOSE = Fault('close')
GARBAGE = Fault('garbage')
GARBAGE_JSON = Fault('garbage_json')
NO_CHOICES = Fault('no_choices')


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer, latency: float) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.answer = answer
        self.latency = latency
        self.lock = threading.Lock()
        self.requests: list[dict] = []
        self.keys: set[str] = set()
        self.active = self.most_active = 0
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}/v1'

    @property
    def prompts(self) -> list[str]:
        return [request['messages'][0]['content'] for request in self.requests]

    def handle_error(self, request, client_address) -> None:
        """Clients that gave up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: JudgeServer

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        server = self.server
        with server.lock:
            server.requests.append(body)
            server.keys.add(self.headers.get('authorization', ''))
            number = len(server.requests) - 1
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            time.sleep(server.latency)
            answer = server.answer(body['messages'][0]['content'], number)
        finally:
            with server.lock:
                server.active -= 1
        if isinstance(answer, Fault):
            self._fault(answer)
        else:
            message = {'role': 'assistant', 'content': answer}
            choice = {'index': 0, 'finish_reason': 'stop', 'message': message}
            self._send(200, json.dumps({**_FRAME, 'choices': [choice]}))

    def _fault(self, fault: Fault) -> None:
        if fault.kind == 'hang':
            self.server.stopping.wait(10)
            self.close_connection = True
        elif fault.kind == 'close':
            self.close_connection = True
        elif fault.kind == 'garbage':
            self._send(200, '<html>not what you asked for', 'text/html')
        elif fault.kind == 'garbage_json':
            self._send(200, '{"choices": [{"mess')
        elif fault.kind == 'no_choices':
            self._send(200, json.dumps({**_FRAME, 'choices': []}))
        else:
            self._send(
                fault.status, json.dumps({'error': {'message': fault.kind}}), **fault.headers
            )

    def _send(self, status: int, text: str, content_type='application/json', **headers) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header('content-type', content_type)
        self.send_header('content-length', str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(data)


_FRAME = {'id': 'x', 'object': 'chat.completion', 'created': 1, 'model': 'judge'}


@contextmanager
def judge_server(answer: Answer, latency: float = 0.0):
    server = JudgeServer(answer, latency)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()

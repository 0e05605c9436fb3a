"""A real headless Chromium, driven over the DevTools protocol by the standard library alone."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
_INSTALL = 240


def find_browser() -> str:
    """Path of a Chromium; installed by apt-get where there is none and this is root.

    Skips the test, with the reason, where there is none to be had.
    """
    found = _installed()
    if found:
        return found
    if not shutil.which('apt-get') or os.geteuid() != 0:
        pytest.skip(f'none of {", ".join(_NAMES)} is installed, and there is no apt-get as root')
    environment = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}
    for command in (
        ['apt-get', 'update', '-qq'],
        ['apt-get', 'install', '-qq', '-y', '--no-install-recommends', 'chromium'],
    ):
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_INSTALL
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f'{" ".join(command)} took more than {_INSTALL} s')
        if done.returncode:
            pytest.skip(f'{" ".join(command)} failed: {done.stderr.strip()[-300:]}')
    found = _installed()
    if not found:
        pytest.skip('apt-get installed chromium, but it is not on PATH')
    return found


def _installed() -> str | None:
    paths = [shutil.which(name) for name in _NAMES]
    caches = Path.home().glob('.cache/ms-playwright/chromium-*/chrome-linux*/chrome')
    return next((path for path in [*paths, *map(str, sorted(caches))] if path), None)


class Browser:
    """One page in a headless Chromium; a context manager.

    Args:
        profile: A folder for the browser's own files.
    """

    def __init__(self, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._ids = itertools.count(1)
        self._buffer = b''
        self._profile = profile

    def __enter__(self) -> Browser:
        path = find_browser()
        # The browser reads commands from descriptor 3 and answers on 4.
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [
            *('bash', '-c', f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', path),
            *('--headless=new', '--remote-debugging-pipe', '--no-sandbox', '--disable-gpu'),
            *('--disable-dev-shm-usage', '--no-first-run', '--disable-background-networking'),
            *('--disable-component-update', '--disable-sync', f'--user-data-dir={self._profile}'),
            'about:blank',
        ]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(20)

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        """Opens a file at a width in CSS pixels and waits until it is loaded."""
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setEmulatedMedia', media='', features=[scheme])
        self.events.clear()
        self.call('Page.navigate', url=file.resolve().as_uri())
        self._until(lambda: any(e['method'] == 'Page.loadEventFired' for e in self.events))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        answer = self.call(
            'Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True
        )
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        answer = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer['data']))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call('Page.printToPDF', printBackground=False)['data'])

    def requests(self) -> list[str]:
        """Addresses that the page asked for, besides what it holds itself."""
        addresses = [
            event['params']['request']['url']
            for event in self.events
            if event['method'] == 'Network.requestWillBeSent'
        ]
        return [address for address in addresses if not address.startswith('data:')]

    def complaints(self) -> list[dict[str, Any]]:
        """What stands in the console, and what was thrown."""
        methods = ('Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Log.entryAdded')
        return [event['params'] for event in self.events if event['method'] in methods]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._ids)
        message = {'id': number, 'method': method, 'params': parameters}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._out, json.dumps(message).encode() + b'\0')
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), number, answers)
        assert 'error' not in answers[0], (method, answers[0]['error'])
        return answers[0]['result']

    def _until(self, done: Any, number: int = 0, answers: list | None = None) -> None:
        end = time.monotonic() + 30
        while not done():
            left = end - time.monotonic()
            assert left > 0, 'the browser does not answer'
            if not select.select([self._in], [], [], left)[0]:
                continue
            data = os.read(self._in, 1 << 20)
            assert data, f'the browser has ended with {self._process.poll()}'
            *messages, self._buffer = (self._buffer + data).split(b'\0')
            for message in map(json.loads, messages):
                if 'method' in message:
                    self.events.append(message)
                elif message['id'] == number and answers is not None:
                    answers.append(message)

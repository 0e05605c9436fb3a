"""What the page's server refuses, and what it makes of what the page draws.

tests/test_tools/test_app.py has the page itself, in a browser.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.inference import Box, Points, Sa2VA, Scribble

pytest.importorskip('starlette', reason='the extra app is not installed')
uvicorn = pytest.importorskip('uvicorn', reason='the extra app is not installed')

from projects.llava_sam2_rl.inference.web import server  # noqa: E402

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'
JSON, BYTES = 'application/json', 'application/octet-stream'


@pytest.fixture(scope='module')
def model():
    return Sa2VA.from_pretrained(MODEL, device='cpu')


@pytest.fixture
def ask(model):
    """Sends a request to a real server, returns status and the answer's JSON (or its bytes)."""
    listener = socket.create_server(('127.0.0.1', 0))
    port = listener.getsockname()[1]
    app = server.build_app([('tiny', model)])
    serving = uvicorn.Server(uvicorn.Config(app, log_level='critical', lifespan='off'))
    thread = threading.Thread(target=serving.run, kwargs={'sockets': [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not serving.started:
        assert time.monotonic() < deadline, 'uvicorn did not start within 30 s'
        time.sleep(0.01)

    def ask(method, path, body=None, media_type=JSON, host=None):
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        headers = {'Content-Type': media_type} | ({'Host': host} if host else {})
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = answer.getheader('content-type') == JSON
        return answer.status, json.loads(data) if is_json else data

    yield ask
    serving.should_exit = True
    thread.join(timeout=30)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    return file.getvalue()


#: Red grows to the right.
IMAGE = np.zeros((40, 60, 3), np.uint8)
IMAGE[..., 0] = np.linspace(0, 255, 60)


def loaded(ask):
    status, said = ask('POST', '/api/images', png(IMAGE), BYTES)
    assert (status, said['width'], said['height']) == (200, 60, 40)
    return said['image']


def test_a_photograph_comes_back_as_it_is_shown(ask):
    name = loaded(ask)
    assert loaded(ask) == name
    status, data = ask('GET', f'/api/images/{name}')
    assert status == 200
    shown = np.array(Image.open(io.BytesIO(data)))
    assert shown.shape == IMAGE.shape
    assert np.abs(shown.astype(int) - IMAGE).max() < 12  # a JPEG


def test_a_large_photograph_is_shown_smaller(ask):
    _, said = ask('POST', '/api/images', png(np.zeros((10, 3200, 3), np.uint8)), BYTES)
    assert said['width'] == 3200
    _, data = ask('GET', f'/api/images/{said["image"]}')
    assert Image.open(io.BytesIO(data)).size == (1600, 5)


def test_the_last_photographs_are_remembered(ask):
    first = loaded(ask)
    for shade in range(server.MAX_PHOTOGRAPHS):
        ask('POST', '/api/images', png(np.full((4, 4, 3), shade, np.uint8)), BYTES)
    status, said = ask('POST', '/api/segment', json.dumps({'image': first, 'text': 'a cup'}))
    assert (status, said) == (404, {'error': 'the photograph is not here any more: load it again'})


def test_other_names_and_other_origins_are_refused(ask):
    """A page of the web may reach this machine by a name of its own, or send simple forms."""
    assert ask('GET', '/', host='attacker.example')[0] == 400
    assert ask('GET', '/', host='localhost:7860')[0] == 200
    for media_type in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data'):
        assert ask('POST', '/api/images', png(IMAGE), media_type)[0] == 415
        assert ask('POST', '/api/segment', '{}', media_type)[0] == 415


def test_what_is_too_long_or_no_question(ask, monkeypatch):
    monkeypatch.setattr(server, 'MAX_PHOTOGRAPH', 1000)
    assert ask('POST', '/api/images', bytes(1001), BYTES)[0] == 413
    assert ask('POST', '/api/segment', '{')[0] == 400
    assert ask('POST', '/api/segment', '[]')[0] == 400
    monkeypatch.undo()
    image = loaded(ask)
    status, said = ask('POST', '/api/segment', json.dumps({'image': image, 'text': 'a' * 2001}))
    assert (status, said) == (422, {'error': 'the text must be one of at most 2000 characters'})


def test_a_broken_photograph(ask):
    status, said = ask('POST', '/api/images', b'GIF89a', BYTES)
    assert status == 422
    assert said['error'].startswith('the file is damaged or no image')
    assert '0x' not in said['error']  # no address of an object


def test_a_failure_is_said_and_the_server_goes_on(ask, model, monkeypatch):
    image = loaded(ask)
    question = json.dumps({'image': image, 'text': 'a cup'})
    with monkeypatch.context() as patch:
        patch.setattr(model, 'segment', lambda *a: (_ for _ in ()).throw(RuntimeError('no memory')))
        status, said = ask('POST', '/api/segment', question)
    assert status == 500
    assert said['error'] == 'RuntimeError: no memory (the terminal has more)'
    assert ask('POST', '/api/segment', question)[0] == 200


def test_regions():
    corners = [[10, 5], [20, 5], [20, 15], [10, 15]]
    mask = server.read_region({'kind': 'outline', 'points': corners}, 60, 40)
    expected = np.zeros((40, 60), bool)
    expected[5:16, 10:21] = True  # its line is part of it
    assert np.array_equal(mask, expected)
    box = server.read_region({'kind': 'box', 'points': [[20, 5], [10, 15]]}, 60, 40)
    assert box == Box(10, 5, 20, 15)
    stroke = server.read_region({'kind': 'scribble', 'points': [[1, 2], [3, 4]]}, 60, 40)
    assert stroke == Scribble(((1, 2), (3, 4)))
    points = {'kind': 'points', 'points': [[1, 2], [3, 4]], 'labels': [1, 0]}
    assert server.read_region(points, 60, 40) == Points(((1, 2), (3, 4)), (1, 0))


@pytest.mark.parametrize(
    ('region', 'message'),
    [
        (None, 'has no region'),
        ({'kind': 'box'}, 'region is empty|pairs of x and y'),
        ({'kind': 'box', 'points': []}, 'the region is empty'),
        ({'kind': 'box', 'points': 'here'}, 'pairs of x and y'),
        ({'kind': 'box', 'points': [[1, 2, 3], [4]]}, 'pairs of x and y'),
        ({'kind': 'outline', 'points': [[1e300, 2]]}, 'beyond the photograph, 60 x 40'),
        ({'kind': 'outline', 'points': [[float('nan'), 2]]}, 'beyond the photograph'),
        ({'kind': 'points', 'points': [[1, 2]], 'labels': [{}]}, 'points have labels'),
        ({'kind': 'points', 'points': [[1, 2]]}, 'points have labels'),
        ({'kind': 'circle', 'points': [[1, 2]]}, "no region 'circle'"),
    ],
)
def test_what_is_no_region(region, message):
    with pytest.raises(ValueError, match=message):
        server.read_region(region, 60, 40)

"""tools/app.py: a page in a real browser, served by a real process."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import shutil
import socket
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.utils.pretrained import resolve

pytest.importorskip('starlette', reason='the extra app is not installed')
pytest.importorskip('uvicorn', reason='the extra app is not installed')

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'
#: Seconds until two tiny models are loaded and served, on a busy machine.
START = 120
#: Milliseconds for an answer, likewise.
ANSWER = 60_000


@pytest.fixture(scope='module')
def scene():
    plain = GeneratedScenes(length=12, split='val')
    # The largest region is the easiest to draw.
    return max((plain[i]['sample'] for i in range(12)), key=lambda sample: sample.mask.sum())


@pytest.fixture(scope='module')
def served(root, tmp_path_factory):
    """The address that the command prints, with a base model and a trained one."""
    trained = tmp_path_factory.mktemp('models') / 'trained'
    shutil.copytree(resolve(MODEL), trained)
    command = [sys.executable, 'tools/app.py', MODEL, str(trained), '--port', '0']
    with subprocess.Popen(
        [*command, '--device', 'cpu'],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        killer = threading.Timer(START, process.kill)
        killer.start()
        said, address = [], None
        for line in process.stdout:
            said.append(line)
            if address := re.search(r'^http://\S+', line):
                break
        killer.cancel()
        assert address, f'no address within {START} s: {"".join(said)}'
        # What it says from here on may not fill the pipe.
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        yield address[0]
        process.terminate()
        process.wait(timeout=30)


class Visit:
    """The page, what it asked for, and what went wrong in it."""

    def __init__(self, browser, address, width=1200):
        self.page = browser.new_page(
            viewport={'width': width, 'height': 900}, has_touch=width < 600
        )
        self.page.set_default_timeout(ANSWER)
        self.requests, self.complaints = [], []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('console', lambda message: self.complaints.append(message.text))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def load(self, file):
        with self.page.expect_response('**/api/images'):
            self.page.set_input_files('#file', str(file))
        self.wait()

    def wait(self):
        """Until the page is done with what was asked."""
        self.page.locator('body:not([aria-busy])').wait_for()

    def stroke(self, points):
        """Draws through points of the photograph with the mouse button held."""
        self.page.locator('#canvas').scroll_into_view_if_needed()
        box = self.page.locator('#canvas').bounding_box()
        width = self.page.locator('#canvas').evaluate('canvas => canvas.width')
        scale = box['width'] / width
        first, *rest = [(box['x'] + scale * x, box['y'] + scale * y) for x, y in points]
        self.page.mouse.move(*first)
        self.page.mouse.down()
        for place in rest:
            self.page.mouse.move(*place)
        self.page.mouse.up()

    def ask(self, path, act):
        """What the server said to an act, once the page shows it."""
        with self.page.expect_response(f'**{path}') as answer:
            act()
        said = answer.value.json()
        self.wait()
        return said

    @property
    def error(self):
        """What stands in the box of errors, where it is shown."""
        box = self.page.get_by_role('alert')
        return box.inner_text() if box.is_visible() else ''


@pytest.fixture
def visit(browser, served):
    visit = Visit(browser, served)
    yield visit
    visit.page.close()


@pytest.fixture
def photo(scene, tmp_path):
    Image.fromarray(scene.image).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


def decode(layer):
    """A mask that the page lays over the photograph, as ``(H, W)`` bool."""
    data = base64.b64decode(layer.removeprefix('data:image/png;base64,'))
    return np.array(Image.open(io.BytesIO(data)).convert('RGBA'))[..., 3] > 0


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def outline(mask):
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(contours, key=len)[:, 0].tolist()


def test_a_region_and_a_text_are_answered_both_ways(visit, served, scene, photo):
    page = visit.page
    assert page.locator('#models').inner_text().startswith(f'base: {MODEL} · trained: ')
    visit.load(photo)
    assert visit.error == ''
    assert page.locator('#describe').is_disabled()

    visit.stroke(outline(scene.mask))
    said = visit.ask('/api/describe', page.locator('#describe').click)
    assert iou(decode(said['region']), scene.mask) > 0.85
    cards = page.locator('article').first.locator('.card')
    assert cards.count() == 2
    for number, answer in enumerate(said['answers']):
        card = cards.nth(number)
        assert card.locator('.caption').inner_text() == answer['caption'] != ''
        assert card.locator('.score').inner_text() == f'IoU {answer["iou"]:.3f}'
        back = decode(answer['mask'])
        assert answer['iou'] == pytest.approx(iou(back, decode(said['region'])), abs=0.05)
        # The photograph, the region and what came back, one on the other.
        sizes = card.locator('img').evaluate_all('all => all.map(i => [i.width, i.naturalWidth])')
        assert len(sizes) == 3
        assert all(w == sizes[0][0] and natural == scene.mask.shape[1] for w, natural in sizes)
    assert 'base: ' in cards.nth(0).inner_text()
    assert 'trained: ' in cards.nth(1).inner_text()

    page.fill('#text', scene.caption)
    said = visit.ask('/api/segment', lambda: page.press('#text', 'Enter'))
    cards = page.locator('article').first.locator('.card')
    for number, answer in enumerate(said['answers']):
        card = cards.nth(number)
        assert iou(decode(answer['mask']), scene.mask) > 0.5
        assert '[SEG]' in card.locator('.answer').inner_text()
        assert card.locator('.caption').inner_text() == answer['caption'] != ''
        assert card.locator('.score').inner_text() == f'METEOR {answer["meteor"]:.3f}'
    assert page.locator('article').count() == 2

    assert visit.complaints == []
    assert {url for url in visit.requests if not url.startswith(('data:', f'{served}/'))} == set()


def test_a_broken_file_is_an_error_on_the_page(visit, photo, tmp_path):
    broken = tmp_path / 'holiday.jpg'
    broken.write_bytes(b'\xff\xd8 not a photograph')
    visit.load(broken)
    assert visit.error.startswith('holiday.jpg: the file is damaged or no image')
    assert visit.page.locator('#photograph').is_hidden()

    cut = tmp_path / 'cut.png'
    cut.write_bytes(photo.read_bytes()[:300])
    visit.load(cut)
    assert visit.error.startswith('cut.png: the file is damaged')
    visit.load(photo)
    assert visit.error == ''
    assert visit.page.locator('#photograph').is_visible()
    assert len([text for text in visit.complaints if '422' not in text]) == 0


def test_boxes_points_and_scribbles_are_sent_in_pixels_of_the_photograph(visit, scene, photo):
    """What SAM 2 makes of them is not looked at: the tiny model's has never seen one."""
    page = visit.page
    visit.load(photo)
    height, width = scene.mask.shape
    sent = []
    page.route('**/api/describe', lambda route: (sent.append(route.request), route.continue_()))

    page.get_by_label('box', exact=True).check()
    visit.stroke([(width * 0.9, height * 0.8), (width * 0.5, height * 0.3), (5, 6)])
    visit.ask('/api/describe', page.locator('#describe').click)

    page.get_by_label('points', exact=True).check()
    assert page.locator('#describe').is_disabled()  # what was drawn before is gone
    visit.stroke([(20, 30)])
    page.get_by_label('beside the object').check()
    visit.stroke([(40, 10)])
    visit.ask('/api/describe', page.locator('#describe').click)

    page.get_by_label('scribble', exact=True).check()
    visit.stroke([(10, 10), (30, 10), (30, 40)])
    visit.ask('/api/describe', page.locator('#describe').click)

    box, points, scribble = (request.post_data_json['region'] for request in sent)
    pixel = max(width, height) / 300
    assert np.allclose(box['points'], [(width * 0.9, height * 0.8), (5, 6)], atol=pixel)
    assert np.allclose(points['points'], [(20, 30), (40, 10)], atol=pixel)
    assert points['labels'] == [1, 0]
    assert np.allclose(scribble['points'], [(10, 10), (30, 10), (30, 40)], atol=pixel)
    assert [one['kind'] for one in (box, points, scribble)] == ['box', 'points', 'scribble']


def test_a_text_without_words_and_a_server_that_is_gone(visit, photo):
    page = visit.page
    visit.load(photo)
    page.fill('#text', '<|end|> .')
    visit.ask('/api/segment', lambda: page.press('#text', 'Enter'))
    assert "the text '<|end|> .' names nothing" in visit.error
    page.route('**/api/segment', lambda route: route.abort())
    page.fill('#text', 'a cup')
    page.press('#text', 'Enter')
    page.get_by_text('the server does not answer').wait_for()


@pytest.mark.parametrize('width', [390, 1440])
def test_nothing_is_wider_than_the_window(browser, served, photo, scene, width):
    visit = Visit(browser, served, width)
    visit.load(photo)
    visit.page.fill('#text', scene.caption)
    visit.ask('/api/segment', lambda: visit.page.press('#text', 'Enter'))
    assert visit.page.evaluate('document.documentElement.scrollWidth') <= width
    visit.page.close()


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def main(root):
    spec = importlib.util.spec_from_file_location('app', root / 'tools/app.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_what_cannot_be_served_is_said_at_once(main, tmp_path, capsys):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        for argv, message in (
            ([MODEL, '--port', port], f'port {port} of 127.0.0.1 cannot be had'),
            ([MODEL, MODEL, MODEL], '3 models: at most 2 are compared'),
            ([str(tmp_path / 'no'), '--port', '0'], 'no checkpoint folder'),
        ):
            with pytest.raises(SystemExit) as stopped:
                main(argv)
            assert stopped.value.code == 2
            assert message in capsys.readouterr().err


def test_without_the_extra(main, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    with pytest.raises(SystemExit):
        main([MODEL])
    assert "uvicorn is missing: pip install '.[app]'" in capsys.readouterr().err

from __future__ import annotations

import json
import re
import zipfile
from html.parser import HTMLParser

import pytest

from projects.llava_sam2_rl.report import make_report
from test_report.hand_made import ATTACK, IOU, jpeg, region, rle, train_row, write_lines, write_run


class Page(HTMLParser):
    """Texts of the elements, tables as rows of cells, and what could fetch or run something."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.texts = [], [], []
        self.rows, self.links = [], []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == 'img':
            self.images.append(attrs)
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th') and self.rows:
            self.rows[-1].append('')
            self.in_cell = True
        self.links += [
            attrs[key] for key in ('src', 'href', 'xlink:href', 'data', 'srcset') if key in attrs
        ]
        assert not [key for key in attrs if key.startswith('on')]

    def handle_endtag(self, tag):
        if tag in ('td', 'th'):
            self.in_cell = False
            self.rows[-1][-1] = ' '.join(self.rows[-1][-1].split())

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path):
    return Page(make_report(write_run(tmp_path / 'my run')).html)


def test_before_and_after(page):
    assert ['metric', 'step 0', 'step 40', 'change'] in page.rows
    # 0.524 - 0.494, and 0.1 - 0.2, of which less is better
    assert ['IoU, mask → caption → mask′', '0.494', '0.524', '+0.030 better'] in page.rows
    lower = 'IoU from another region’s caption (should be low)'
    assert [lower, '0.200', '0.100', '−0.100 better'] in page.rows


def test_the_numbers_of_the_other_tables(page):
    cells = page.rows
    rewards = ['mask → caption → mask′', 'scenes', 'mask_iou', '0.300', '0.600', '4', '1']
    assert rewards in cells
    assert ['scenes', 'empty <mask>', '6', '3.3 %'] in cells  # 6 of 180
    assert ['training steps', '2 min 00 s', '100.0 %', ''] in cells
    assert ['host memory, peak of the main process', '1.00 GiB'] in cells
    assert ['torch', '2.5.1'] in cells


def test_what_the_config_changes(page):
    text = ''.join(page.texts)
    file, run = text.split('against the files that it is based on')[1].split('The command line')
    assert file.split('\n')[2:5] == [
        *('+model.beta = 0.02', '-train_cfg.max_iters = 400', '+train_cfg.max_iters = 200')
    ]
    assert "-model.beta = 0.02\n+model.beta = '<b>'\n" in run


def test_curves_of_both_starts(page):
    text = ' '.join(' '.join(page.texts).split())
    assert 'mask → caption → mask′, step 10: 0.25' in text
    assert 'mask → caption → mask′, step 30: 0.75' in text
    assert 'step 30: 9' not in text  # of the start that was resumed from 20
    assert 'Step 40 of 40 (complete), 2 starts' in text
    assert '1 lines of the log cannot be read' in text


def test_pictures_say_what_they_show(page):
    assert len(page.images) == 3 * len(IOU)
    assert all(image['src'].startswith('data:image/jpeg;base64,') for image in page.images)
    alts = [image['alt'] for image in page.images]
    assert alts[0] == 'The image with the region in yellow; its reference caption: the reference'
    assert alts[1] == 'Before: the mask found, in blue, has IoU 0.10'
    assert alts[2] == 'After: the mask found, in blue, has IoU 0.80'


def test_what_a_caption_holds_stays_text(page):
    assert 'script' not in page.tags
    text = ''.join(page.texts)
    assert '<script>alert("x")</script> & \'quotes\' � turned � �' in text
    assert all(re.match(r'data:|#', link) for link in page.links)


def test_every_part_without_data_says_so(tmp_path):
    (tmp_path / 'empty').mkdir()
    text = ' '.join(' '.join(Page(make_report(tmp_path / 'empty').html).texts).split())
    for sentence in (
        'Nothing has been logged yet',
        'There was no validation yet',
        'No validation has left pictures',
        'None of the curves has been logged yet',
        'No rollouts were recorded',
        'Not recorded: the run had no ReportHook',
    ):
        assert sentence in text


def test_a_single_validation_is_no_comparison(tmp_path):
    row = {'cycle/return_iou': 0.5, 'step': 10}
    write_lines(tmp_path / '1/vis_data/scalars.json', [train_row(10, 0.5), row])
    page = Page(make_report(tmp_path).html)
    assert ['metric', 'step 10'] in page.rows
    assert ['IoU, mask → caption → mask′', '0.500'] in page.rows
    assert 'nothing to compare it with yet' in ''.join(page.texts)


def test_a_run_of_an_older_version_has_all_but_the_config(tmp_path):
    """Its differences were rows of a table."""
    (tmp_path / 'report').mkdir()
    facts = {'config': [{'key': 'a', 'base': '1'}], 'environment': {'torch': '2.5.1'}}
    (tmp_path / 'report/run.json').write_text(json.dumps(facts))
    page = Page(make_report(tmp_path).html)
    assert ', or one of an older version.' in page.texts
    assert ['torch', '2.5.1'] in page.rows


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='work directory of a run'):
        make_report(tmp_path / 'none')


def huge_run(folder):
    """The largest pictures, of noise, long texts, many steps, keys and regions."""
    size = 320
    masks = {key: rle(size, size, 10, 10, 200) for key in ('region', 'target', 'found')}
    for step in (0, 5000):
        rows = [region(f's/{i}', (i + step) % 97 / 97, 'word ' * 5000, **masks) for i in range(256)]
        rows = [{**row, 'image': 'n.jpg', 'target_image': 'n.jpg'} for row in rows]
        write_lines(folder / f'validations/iter_{step:08d}.jsonl', rows)
    with zipfile.ZipFile(folder / 'validations/images.zip', 'w') as archive:
        archive.writestr('n.jpg', jpeg(size, size, noise=True))
    extra = {'loop1/kl_div': 0.1, 'loop2/reward_mean': 0.1, 'loop1/mask_loss': 1.0}
    rows = [train_row(step, step % 7, **extra) for step in range(1, 5001)]
    write_lines(folder / '1/vis_data/scalars.json', rows)
    config = {'file': [f'+k{i} = ' + 'x' * 5000 for i in range(2000)], 'run': []}
    (folder / 'report').mkdir()
    (folder / 'report/run.json').write_text(json.dumps({'config_changes': config}))
    return folder


def test_size_is_bounded(tmp_path):
    html = make_report(huge_run(tmp_path)).html
    assert len(html.encode()) < 5e6
    page = Page(html)
    assert len(page.images) == 24
    text = ''.join(page.texts)
    assert '1700 more lines differ' in text  # 2000 - 300, said and not silent
    assert '… (cut off)' in text
    assert page.tags.count('use') <= 7 * 150


class Visit:
    """A file opened at a width in CSS pixels: what it asked for, and what went wrong."""

    def __init__(self, browser, file, width, scheme='light'):
        self.page = browser.new_page(
            viewport={'width': width, 'height': 844}, is_mobile=width < 600, color_scheme=scheme
        )
        self.requests, self.complaints = [], []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('console', lambda message: self.complaints.append(message.text))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.goto(file.resolve().as_uri())

    def colour(self, selector, key='color'):
        """A colour of an element as the browser has worked it out."""
        code = f'element => getComputedStyle(element).{key}'
        return self.page.locator(selector).first.evaluate(code)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1440])
def test_in_a_real_browser(tmp_path, browser, width, scheme):
    """Phone and desk, light and dark: no error, no request, no picture missing, nothing cut."""
    folder = write_run(tmp_path / 'run', caption=ATTACK + ' unbreakable' * 30 + 'x' * 200)
    file = folder / 'report.html'
    file.write_bytes(make_report(folder).html.encode())
    visit = Visit(browser, file, width, scheme)
    evaluate = visit.page.evaluate
    sizes = evaluate('[...document.images].map(i => [i.complete, i.naturalWidth])')
    assert sizes == [[True, 40]] * 3 * len(IOU)
    # A scroll bar takes a few pixels where there is a mouse.
    assert evaluate('document.documentElement.scrollWidth') <= width
    assert evaluate('window.innerWidth') == width
    # Nothing that is seen reaches beyond the page, but within a box that scrolls.
    beyond = f'.filter(e => e.getBoundingClientRect().right > {width + 1}).map(e => e.outerHTML)'
    inside = '[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, thead"))'
    assert evaluate(inside + beyond) == []
    assert [url for url in visit.requests if not url.startswith('data:')] == [file.as_uri()]
    assert visit.complaints == []
    paper = visit.colour('body', 'backgroundColor')
    assert (luminance(paper) > 0.5) == (scheme == 'light')
    assert contrast(visit.colour('body'), paper) > 7
    card = visit.colour('.example', 'backgroundColor')
    assert contrast(visit.colour('figcaption'), card) > 4.5  # WCAG AA
    card = visit.colour('.charts figure', 'backgroundColor')
    assert contrast(visit.colour('.chart text', 'fill'), card) > 4.5
    for curve in ('.line.c0 path', '.charts .legend .line.c0'):
        assert contrast(visit.colour(curve, 'stroke'), card) > 3  # WCAG AA for graphics
    assert contrast(visit.colour('.dot.c0 use', 'fill'), card) > 3
    assert visit.page.pdf().startswith(b'%PDF')


def test_a_pointer_finds_the_points_of_a_long_curve(tmp_path, browser):
    rows = [train_row(step, step / 100) for step in range(1, 101)]
    write_lines(tmp_path / '1/vis_data/scalars.json', rows)
    file = tmp_path / 'report.html'
    file.write_bytes(make_report(tmp_path).html.encode())
    visit = Visit(browser, file, 1440)
    dot = visit.page.locator('.dot.many use').nth(49)
    assert dot.locator('title').text_content() == 'mask → caption → mask′, step 50: 0.5'
    opacity = 'element => getComputedStyle(element).fillOpacity'
    assert dot.evaluate(opacity) == '0'
    dot.hover()
    assert dot.evaluate(opacity) == '1'


def luminance(colour):
    """WCAG 2's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(n) / 255 for n in re.findall(r'\d+', colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2's contrast ratio of two of them."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_browser_would_tell(tmp_path, browser):
    """The checks above fail on a page that has what they look for."""
    file = tmp_path / 'bad.html'
    file.write_text(
        '<meta name="viewport" content="width=device-width"><img src="data:image/png;base64,AAAA">'
        '<div style="width: 2000px">x</div><img src="http://127.0.0.1:9/x.png">'
        '<script>console.error("no")</script>'
    )
    visit = Visit(browser, file, 390)
    assert visit.page.evaluate('document.images[0].naturalWidth') == 0
    assert visit.page.evaluate('document.documentElement.scrollWidth') > 390
    assert 'http://127.0.0.1:9/x.png' in visit.requests
    assert 'no' in visit.complaints

"""Records with hostile text, sizes and encodings, from a generator with a fixed seed."""

from __future__ import annotations

import csv
import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from own_data import rle
from PIL import Image

from projects.llava_sam2_rl.prompts import SPECIAL_TOKENS

MARKERS = [
    *SPECIAL_TOKENS,
    *('<image>', '<video>', '<Prompt0>', '<Prompt99999999999>', '<|im_end|>', '<|im_start|>'),
    *('<|end|>', '<|user|>', '<|endoftext|>', '</s>', '<s>', '<unk>', '[UNUSED_TOKEN_145]'),
    *('<|vision_start|>', '<tool_call>', '{description}', 'region{i}', '{input}', '%s', '\0'),
]
WORDS = ['a', 'the', 'dog', 'cat', 'left', 'red', 'of', 'on', 'grass', *'[]<>|/\\"\'{},.!?']
NAMES = ['', '<IMG_CONTEXT>', '[SEG]', '\n', '\u202e', '.']
SIZES = [(1, 1), (1, 200), (200, 1), (2, 3), (7, 400), (48, 64), (64, 48), (96, 96), (333, 120)]


def text(draw: random.Random) -> Any:
    """A text, or what stands in its place."""
    words = draw.choices(WORDS, k=draw.randint(0, 12))
    kind = draw.randrange(14)
    if kind < 4:
        words[draw.randint(0, len(words)) : 0] = draw.choices(MARKERS, k=draw.randint(1, 4))
        return draw.choice(['', ' ']).join(words)
    if kind == 4:
        return ''.join(draw.choices(MARKERS, k=draw.randint(1, 30)))
    if kind == 5:
        return ''.join(chr(draw.randrange(0x110000)) for _ in range(draw.randint(1, 60)))
    if kind == 6:
        return 'word ' * draw.randint(500, 3000)
    if kind == 7:
        return 'A dog lies there. ' * draw.randint(200, 1000)
    if kind == 8:
        return draw.choice(['', ' ', '\n\t', '.', '\u200b', '\u202e', '\ufeff', '\x85'])
    if kind == 9:
        return draw.choice([None, 3, 2.5, True, [], {}, [None], ['a dog', 3], {'a': 'b'}])
    if kind == 10:
        return ['a dog', '', '[SEG]', 'the animal <img>']
    if kind == 11:
        return '\ud83d' * draw.randint(1, 3) + 'dog'
    return ' '.join(words)


def mask(draw: random.Random, height: int, width: int) -> Any:
    """A mask, or what stands in its place."""
    kind = draw.randrange(16)
    pixels = np.zeros((height, width), bool)
    pixels[draw.randrange(height) :, draw.randrange(width) :] = True
    if kind == 0:
        return rle(pixels & False)
    if kind == 1:
        return rle(np.ones((width, height + 1), bool))
    if kind == 2:
        code = rle(pixels)
        return {**code, 'counts': code['counts'][: len(code['counts']) // 2]}
    if kind == 3:
        return {'size': [10**7, 10**7], 'counts': [10**14]}
    if kind == 4:
        return draw.choice([None, '', 'gone.png', '../../etc/passwd', 7, [], [[]], ['a'], {}])
    if kind == 5:
        far = draw.choice([1e9, -1e308, float('inf'), 10**30])
        return [0, 0, far, 0, far, far, 0, height]
    if kind == 6:
        return [[draw.uniform(-9, 9) for _ in range(draw.randint(0, 9))] for _ in range(3)]
    if kind == 7:
        return [[0, 0], [width, 0], [width, height], [0, height]]
    return rle(pixels)


def picture(draw: random.Random, path: Path) -> tuple[int, int]:
    """Writes a picture, now and then a broken one; its rows and columns."""
    height, width = draw.choice(SIZES)
    mode = draw.choice(['RGB', 'RGB', 'RGB', 'L', 'RGBA', 'P', '1'])
    file = io.BytesIO()
    Image.new(mode, (width, height), draw.randrange(2)).save(file, 'PNG')
    raw = file.getvalue()
    kind = draw.randrange(15)
    if kind == 0:
        raw = raw[: draw.randrange(len(raw))]
    elif kind == 1:
        # A header that promises 60 000 x 60 000 pixels, with its check sum.
        header = raw[12:16] + (60_000).to_bytes(4, 'big') * 2 + raw[24:29]
        raw = raw[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + raw[33:]
    elif kind == 2:
        return height, width  # not there
    path.write_bytes(raw)
    return height, width


def write_jsonl(folder: Path, count: int, draw: random.Random) -> str:
    """One line each, some in another encoding, cut short or no object."""
    lines = []
    for i in range(count):
        name = f'{i}{draw.choice(["", "[SEG]", "<|im_end|>", "é", " "])}.png'
        height, width = picture(draw, folder / name)
        line: Any = {'image': name, 'mask': mask(draw, height, width), 'caption': text(draw)}
        if draw.randrange(10) == 0:
            line |= {'image2': name, 'mask2': mask(draw, height, width)}
        raw = json.dumps(line).encode()
        kind = draw.randrange(20)
        if kind == 0:
            raw = raw[: draw.randint(1, len(raw) - 1)]
        elif kind == 1:
            raw = json.dumps({**line, 'caption': 'café'}, ensure_ascii=False).encode('latin-1')
        elif kind == 2:
            raw = draw.choice([b'3', b'null', b'"a"', b'[' * 50_000, b'{"image": {}}', b'\xff\xfe'])
        lines.append(raw)
    (folder / 'regions.jsonl').write_bytes(b'\n'.join(lines))
    return f"dict(type='JSONLRegionDataset', ann_file={str(folder / 'regions.jsonl')!r}"


def write_folder(folder: Path, count: int, draw: random.Random) -> str:
    """A picture, a mask and a text each, in names and encodings of all kinds."""
    for i in range(count):
        name = f'{i:03d}{draw.choice(NAMES)}'
        height, width = picture(draw, folder / f'{name}.png')
        if not (folder / f'{name}.png').exists():
            (folder / f'{name}.png').write_bytes(b'')
        pixels = np.zeros((height, width), np.uint8)
        pixels[draw.randrange(height + 1) :] = 255
        Image.fromarray(pixels).save(folder / f'{name}.mask.png')
        said = text(draw)
        said = said if isinstance(said, str) else 'a dog'
        codec = draw.choice(
            ['utf-8', 'utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'utf-32-le', 'cp037']
        )
        (folder / f'{name}.txt').write_bytes(said.encode(codec, 'replace'))
    return f"dict(type='FolderRegionDataset', data_root={str(folder)!r}"


def write_coco(folder: Path, count: int, draw: random.Random) -> str:
    """Instances, and captions in a CSV file of mixed encodings."""
    images, annotations, lines = [], [], [b'annotation_id,caption\n']
    for i in range(count):
        height, width = picture(draw, folder / f'{i}.png')
        size = {'height': height, 'width': width}
        if draw.randrange(10) == 0:
            size['height'] = draw.choice([0, -3, None, 'a', 1e9, float('nan')])
        images.append({'id': i, 'file_name': draw.choice([f'{i}.png'] * 9 + [None]), **size})
        annotations.append(
            {
                'id': i,
                'image_id': draw.choice([i] * 9 + [-1]),
                'segmentation': mask(draw, height, width),
            }
        )
        row = io.StringIO()
        csv.writer(row).writerow([i, text(draw)])
        codec = draw.choice(['utf-8', 'utf-8', 'latin-1'])
        lines.append(row.getvalue().encode(codec, 'replace').replace(b'\0', b'?'))
    (folder / 'instances.json').write_text(
        json.dumps({'images': images, 'annotations': annotations})
    )
    (folder / 'captions.csv').write_bytes(b''.join(lines))
    return (
        f"dict(type='COCORegionDataset', ann_file={str(folder / 'instances.json')!r}, "
        f'image_dir={str(folder)!r}, captions={str(folder / "captions.csv")!r}'
    )


def write_conversations(folder: Path, count: int, draw: random.Random) -> str:
    """LLaVA's JSON."""
    records = []
    for i in range(count):
        picture(draw, folder / f'{i}.png')
        turns = [
            {'from': ('human', 'gpt')[k % 2], 'value': draw.choice([text(draw), 'A dog. ' * 9])}
            for k in range(draw.choice([0, 1, 2, 2, 2, 2, 4, 80]))
        ]
        records.append({'id': f'{i}\n[SEG]', 'image': f'{i}.png', 'conversations': turns})
    (folder / 'chats.json').write_text(json.dumps(records))
    return (
        f"dict(type='ConversationDataset', ann_file={str(folder / 'chats.json')!r}, "
        f'image_dir={str(folder)!r}'
    )


Writer = Callable[[Path, int, random.Random], str]
#: Source -> how its records are written, and how many.
SOURCES: dict[str, tuple[Writer, int]] = {
    'lines': (write_jsonl, 170),
    'folder': (write_folder, 130),
    'coco': (write_coco, 120),
    'chats': (write_conversations, 80),
}

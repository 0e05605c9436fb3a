"""Ordinary conversations about whole images (LLaVA's JSON): description and questions."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.index_cache import cached_index
from projects.llava_sam2_rl.datasets.records import path_inside, read_image, required_file
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

#: ``(question, answer)``
Turn = tuple[str, str]

#: Where the picture was, which is always before the first question here.
_IMAGE = re.compile('<image>')


@DATASETS.register_module()
class ConversationDataset(RegionDataset):
    """One record per conversation, trained on with cross-entropy alone.

    Layout: a JSON list (or one object a line, ``.jsonl``) of ``{id, image, conversations: [{from:
    'human' | 'gpt', value}, …]}``; ``<image>`` stands where the picture was, which here is always
    before the first question. Records without an image are left out, and their number is logged.

    Args:
        ann_file: The JSON file.
        image_dir: Folder that the records' ``image`` is below.
        max_turns: Longest conversation in questions; later ones are dropped. ``None``: all.
        cache_dir: Folder of the index, see :func:`cached_index`.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no list of records, or none has an image.
    """

    def __init__(
        self,
        ann_file: str,
        image_dir: str,
        max_turns: int | None = None,
        cache_dir: str | None = None,
        source: str = 'conversations',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if max_turns is not None and max_turns < 1:
            raise ValueError(f'{source}: max_turns must be at least 1, got {max_turns}')
        path = required_file(
            Path(ann_file),
            'ann_file is a LLaVA-style JSON file, for example llava_v1_5_mix665k.json of '
            'liuhaotian/LLaVA-Instruct-150K',
        )
        self.image_dir = Path(image_dir)
        self.max_turns = max_turns
        self._index = cached_index(
            [path], lambda: index_conversations(path), f'conversations-{path.stem}', cache_dir
        )
        left_out = int(self._index['left_out'][0])
        if not self.num_records:
            raise ValueError(f'{path}: none of {left_out} records has an image')
        if left_out:
            print_log(
                f'{source}: {left_out} records of {path} have no image and are left out',
                logger='current',
                level=logging.INFO,
            )

    @property
    def num_records(self) -> int:
        """Conversations with an image."""
        return len(self._index['ends'])

    def _record_of(self, index: int) -> dict[str, Any]:
        start = int(self._index['ends'][index - 1]) if index else 0
        return json.loads(self._index['text'][start : int(self._index['ends'][index])].tobytes())

    def sample_id(self, index: int) -> str:
        """The record's ``id``, or its number where it has none."""
        return str(self._record_of(index).get('id', index))

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads a conversation; nothing about it is random."""
        record = self._record_of(index)
        sample_id = self.sample_id(index)
        name = f'{self.source}/{sample_id}'
        turns = _turns(record.get('conversations'), name)
        if not isinstance(record['image'], str):
            raise BadRecord('bad_conversation', name, f'image is {record["image"]!r}')
        image = read_image(path_inside(self.image_dir, record['image'], name), name)
        return RegionSample(
            image=image,
            mask=np.zeros((0, *image.shape[:2]), dtype=bool),
            source=self.source,
            sample_id=sample_id,
            conversation=tuple(turns[: self.max_turns]),
        )


def index_conversations(path: Path) -> dict[str, np.ndarray]:
    """The records that have an image, as one text and where each ends.

    Returns:
        ``text`` (bytes,) uint8, JSON after JSON; ``ends`` (N,) int64; ``left_out`` (1,) int64.
    """
    try:
        with open(path, encoding='utf-8') as file:
            if path.suffix == '.jsonl':
                records = [json.loads(line) for line in file if line.strip()]
            else:
                records = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f'{path} is no list of records')
    kept = [json.dumps(record).encode() for record in records if record.get('image')]
    return {
        'text': np.frombuffer(b''.join(kept), np.uint8),
        'ends': np.cumsum([len(record) for record in kept], dtype=np.int64),
        'left_out': np.array([len(records) - len(kept)], np.int64),
    }


def _turns(messages: Any, name: str) -> list[Turn]:
    """Questions with their answers.

    Raises:
        BadRecord: ``bad_conversation``, where they do not alternate or one is empty.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadRecord('bad_conversation', name, f'conversations is {messages!r}')
    texts = []
    for i, message in enumerate(messages):
        who = message.get('from') if isinstance(message, dict) else None
        if who != ('human', 'gpt')[i % 2] or not isinstance(message.get('value'), str):
            raise BadRecord('bad_conversation', name, f'message {i} is {str(message)[:80]!r}')
        texts.append(_IMAGE.sub('', message['value']).strip())
    if len(texts) < 2 or len(texts) % 2 or not all(texts):
        raise BadRecord('bad_conversation', name, f'{len(texts)} messages, or an empty one')
    return list(zip(texts[::2], texts[1::2]))

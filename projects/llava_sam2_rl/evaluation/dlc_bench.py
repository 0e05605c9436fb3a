"""DLC-Bench (Lian et al. 2025): a language model judges descriptions by questions about them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from projects.llava_sam2_rl.datasets.base import BadRecord, RegionDataset
from projects.llava_sam2_rl.datasets.records import (
    fit_mask,
    path_inside,
    read_image,
    required_file,
    segmentation_to_mask,
)
from projects.llava_sam2_rl.engine.checkpoint_files import write_atomically
from projects.llava_sam2_rl.evaluation.per_sample_rows import RowMetric
from projects.llava_sam2_rl.registry import DATASETS, METRICS
from projects.llava_sam2_rl.rewards.base import RewardUnavailableError
from projects.llava_sam2_rl.rewards.dlc import (
    Question,
    RegionScore,
    benchmark_score,
    load_question_file,
)
from projects.llava_sam2_rl.rewards.llm_judge import LLMJudgeReward, QuestionSet
from projects.llava_sam2_rl.structures import RegionSample

CAPTIONS_FILE = 'dlc_bench_captions.json'


@DATASETS.register_module()
class DLCBenchDataset(RegionDataset):
    """The regions of DLC-Bench, in the order of their file; records without a caption.

    Layout: ``{data_root}/annotations.json`` (COCO) and ``{data_root}/images/{file_name}``.
    ``sample_id`` is the annotation's id, by which ``qa.json`` and ``class_names.json`` speak of it.

    Args:
        data_root: Folder of the download.
        annotations: Name of the annotation file.
        image_dir: Folder of the pictures below ``data_root``.
        **kwargs: See `RegionDataset`.

    Raises:
        FileNotFoundError: The annotation file is not there.
    """

    def __init__(
        self,
        data_root: str,
        annotations: str = 'annotations.json',
        image_dir: str = 'images',
        source: str = 'dlc_bench',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        path = required_file(
            Path(data_root) / annotations,
            'download DLC-Bench (nvidia/DLC-Bench) and point data_root at its folder',
        )
        content = json.loads(path.read_text(encoding='utf-8'))
        self.image_dir = Path(data_root) / image_dir
        self._images = {image['id']: image for image in content['images']}
        self._annotations = content['annotations']

    @property
    def num_records(self) -> int:
        """Annotated regions."""
        return len(self._annotations)

    def sample_id(self, index: int) -> str:
        """The annotation's id."""
        return str(self._annotations[index]['id'])

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads one region."""
        annotation = self._annotations[index]
        name = f'{self.source}/{annotation["id"]}'
        picture = self._images.get(annotation['image_id'])
        if picture is None:
            raise BadRecord('missing_image', name, f'image id {annotation["image_id"]}')
        height, width = int(picture['height']), int(picture['width'])
        mask = segmentation_to_mask(annotation['segmentation'], height, width, name)
        image = read_image(
            path_inside(self.image_dir, picture['file_name'], name), name, annotated=mask.shape
        )
        return RegionSample(
            image=image,
            mask=fit_mask(mask, image, name),
            source=self.source,
            sample_id=str(annotation['id']),
        )


@METRICS.register_module()
class DLCBenchMetric(RowMetric):
    """DLC-Bench's ``pos``, ``neg`` and ``avg``.

    The captions are written to ``dlc_bench_captions.json`` in the work directory before the judge
    is asked. Where there is none, that is said and they can be scored later, by
    ``tools/dlc_bench.py``. `notes` says in which words and by which judge they were scored, and
    with which published numbers the result therefore compares; the test loop writes it beside the
    numbers.

    Args:
        questions: ``qa.json``.
        class_names: ``class_names.json``.
        judge: Options of `LLMJudgeReward` (``model``, ``base_url``, ``api_key_env``, ``template``,
            …).
        **kwargs: See `RowMetric`.
    """

    default_prefix = 'dlc_bench'
    task = 'captioning'

    def __init__(
        self, questions: str, class_names: str, judge: dict | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.questions = load_question_file(questions)
        self.class_names = load_class_names(class_names)
        self.judge_options = dict(judge or {})

    def row(self, meta: Any, prediction: Any) -> dict[str, Any]:
        """Keeps one description."""
        return {'caption': prediction['caption']}

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Has the captions judged."""
        captions = {row['sample_id']: row['caption'] for row in rows}
        path = (self.work_dir or Path('.')) / CAPTIONS_FILE
        text = json.dumps(captions, indent=1, ensure_ascii=False)
        write_atomically(path, text.encode())
        numbers: dict[str, float] = {'num_samples': len(rows)}
        self.notes = {}
        try:
            judge = LLMJudgeReward(**self.judge_options)
            scores = score_captions(captions, self.questions, self.class_names, judge)
        except (RewardUnavailableError, ValueError, FileNotFoundError) as error:
            print_log(
                f'DLC-Bench: the captions are not scored: {error}. They are in {path}; score them '
                'with tools/dlc_bench.py',
                logger='current',
                level=logging.ERROR,
            )
            return numbers
        for row in rows:
            region = scores.regions.get(row['sample_id'])
            if region is not None:
                row.update(positive=region.positive, negative=region.negative)
        self.notes = scores.notes
        print_log(f'DLC-Bench: {self.notes["compares"]}', logger='current', level=logging.INFO)
        return {**numbers, **scores.numbers}


class Scores:
    """What the judge made of captions.

    Args:
        regions: Scores by annotation id, ``None`` where a request failed in the end.
        missing: Ids with questions but without a caption.
        notes: See `judge_notes`.
    """

    def __init__(
        self,
        regions: Mapping[str, RegionScore | None],
        missing: list[str],
        notes: dict[str, str],
    ) -> None:
        self.regions = regions
        self.missing = missing
        self.notes = notes
        scored = [region for region in regions.values() if region is not None]
        #: ``pos``, ``neg``, ``avg``, and how many regions they stand for.
        self.numbers: dict[str, float] = {
            **benchmark_score(scored),
            'num_scored': len(scored),
            'num_failed': len(regions) - len(scored),
            'num_missing': len(missing),
        }


def judge_notes(judge: LLMJudgeReward) -> dict[str, str]:
    """``wording`` (name, digest), ``judge``, ``order`` of choices, what it ``compares`` with."""
    wording = judge.wording
    return {
        'wording': f'{wording.name} ({wording.digest})',
        'judge': judge.client.model,
        'order': 'as in the file',
        'compares': f'compares {wording.comparison(judge.client.model)}',
    }


def score_captions(
    captions: Mapping[str, str],
    questions: Mapping[str, tuple[Question, ...]],
    class_names: Mapping[str, str],
    judge: LLMJudgeReward,
) -> Scores:
    """Has every caption judged that there are questions about.

    Captions without questions, questions without a caption and regions without a class name are
    named in the log and left out; the numbers then are not the whole benchmark's. Choices are asked
    in the order of the file, as officially.

    Args:
        captions: By annotation id.
        questions: By annotation id (``qa.json``).
        class_names: By annotation id, for the recognition question.
        judge: Asks the endpoint.

    Raises:
        RewardUnavailableError: The judge does not answer.
        ValueError: Nothing could be scored.
    """
    both = [key for key in questions if key in captions and key in class_names]
    missing = [key for key in questions if key not in captions]
    for what, keys in (
        ('questions but no caption', missing),
        ('a caption but no questions', [key for key in captions if key not in questions]),
        ('questions but no class name', [key for key in questions if key not in class_names]),
    ):
        if keys:
            shown = ', '.join(keys[:10]) + (', …' if len(keys) > 10 else '')
            print_log(
                f'DLC-Bench: {len(keys)} ids with {what} are left out: {shown}',
                logger='current',
                level=logging.WARNING,
            )
    if not both:
        raise ValueError(
            f'none of the {len(captions)} captions has both questions and a class name: the files '
            'do not belong together'
        )
    sets = [(captions[key], QuestionSet(class_names[key], questions[key])) for key in both]
    regions = dict(zip(both, judge.judge(sets, shuffle=False), strict=True))
    if all(region is None for region in regions.values()):
        raise ValueError(
            f'the judge answered about none of {len(both)} captions, the last because: '
            f'{judge.client.last_failure}'
        )
    return Scores(regions, missing, judge_notes(judge))


def load_class_names(path: str | Path) -> dict[str, str]:
    """``{annotation_id: class name}`` (``class_names.json``).

    Raises:
        ValueError: It is something else.
    """
    content = json.loads(Path(path).read_text(encoding='utf-8'))
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ValueError(f'{path}: expected an object of class names by annotation id')
    return content


def load_captions(path: str | Path) -> dict[str, str]:
    """Captions by annotation id, from a JSON object or a list of objects with ``id``, ``caption``.

    Of several captions with the same id the first counts; the log names the ids.

    Raises:
        ValueError: It is something else.
    """
    path = Path(path)
    expected = (
        f'{path}: expected an object of captions by annotation id, or a list of objects with "id" '
        'and "caption"'
    )
    try:
        # The standard reader keeps the last of equal keys, silently.
        content = json.loads(path.read_text(encoding='utf-8'), object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(content, list):
        raise ValueError(expected)
    pairs: list[tuple[Any, Any]] = []
    for item in content:
        if isinstance(item, tuple):
            pairs.append(item)
        elif isinstance(item, list) and all(isinstance(part, tuple) for part in item):
            record = dict(item)
            if 'id' not in record or 'caption' not in record:
                raise ValueError(f'{expected}; one has {sorted(record)}')
            pairs.append((record['id'], record['caption']))
        else:
            raise ValueError(expected)
    captions: dict[str, str] = {}
    repeated: list[str] = []
    for key, text in pairs:
        if not isinstance(text, str):
            raise ValueError(f'{path}: the caption of {key!r} is a {type(text).__name__}')
        if str(key) in captions:
            repeated.append(str(key))
        else:
            captions[str(key)] = text
    if repeated:
        print_log(
            f'{path}: {len(repeated)} captions of ids that came before are left out: '
            f'{", ".join(repeated[:10])}',
            logger='current',
            level=logging.WARNING,
        )
    return captions

"""A language model judges a caption against the reference, question by question, by text alone."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards import dlc
from projects.llava_sam2_rl.rewards.base import RolloutBatch
from projects.llava_sam2_rl.rewards.chat import ChatClient, ChatRequest, UnusableAnswerError
from projects.llava_sam2_rl.rewards.pending import PendingScores
from projects.llava_sam2_rl.rewards.wording import load_wording

#: Part of the cache key: raise it with every change of the generation prompt.
PROMPT_VERSION = 1

GENERATION_PROMPT = """\
Here is a correct description of an object in an image:

{caption}

Write multiple-choice questions that test whether ANOTHER description of the same object is right. \
Use only what the description above says.
- "class_name": the kind of object in one to three words.
- "positive": one question for each attribute that is described (object type, color, shape, \
texture, size, position, state), at least one. Each has exactly four choices: the correct one with \
score 1, a partly correct one with score 0.5, "It is not mentioned" with score 0, and a plausible \
wrong one with score -1.
- "negative": two or three questions about plausible things that are NOT there. Each has exactly \
two choices: that the thing is mentioned with score -1, and that it is not mentioned with score 1.

Answer with one JSON object and nothing else:
{{"class_name": "...", "positive": [{{"question": "...", "choices": [["...", 1], ["...", 0.5], \
["It is not mentioned", 0], ["...", -1]]}}], "negative": [{{"question": "...", "choices": \
[["...", -1], ["...", 1]]}}]}}
"""

POSITIVE_SCORES = {-1.0, 0.0, 0.5, 1.0}
NEGATIVE_SCORES = {-1.0, 0.0, 1.0}


@dataclass(frozen=True)
class QuestionSet:
    """What is asked about captions of one region.

    Args:
        class_name: For the recognition question.
        questions: Positive and negative ones.
    """

    class_name: str
    questions: tuple[dlc.Question, ...]


@REWARDS.register_module()
class LLMJudgeReward:
    """Score in [0, 1] of a caption against its reference caption, by an OpenAI-compatible judge.

    Once per reference caption the judge writes the questions, which are kept on disk; then it
    answers them, and a recognition question, about every completion. The score is
    ``clamp((mean positive + mean negative) / 2, 0, 1)`` (``dlc.py``). An empty completion scores 0
    and is not asked about. ``None`` where there is no reference caption or any request about the
    completion failed in the end.

    Args:
        model: Model name as the endpoint knows it. Defaults to
            ``'meta-llama/Llama-3.1-8B-Instruct'``.
        base_url: Endpoint of an OpenAI-compatible server (vLLM, llama.cpp, a vendor). Defaults to
            ``'http://127.0.0.1:8000/v1'``.
        api_key_env: Name of the environment variable that holds the key, as ``'OPENAI_API_KEY'``.
            The key itself belongs in no config. Defaults to None: the endpoint wants none.
        cache_dir: Folder where questions are kept, by hash of caption, model and prompt version.
            Defaults to ``'work_dirs/judge_cache'``.
        seed: Seed of the order of the choices. Defaults to 0.
        concurrency: Requests under way at a time. Defaults to 16.
        timeout: Seconds for one attempt, from connecting to the last byte. Defaults to 30.
        max_retries: Attempts after the first. Defaults to 3.
        backoff: Seconds before the first retry, doubled each time. Defaults to 0.25.
        max_backoff: Longest wait between attempts, in seconds. Defaults to 8.
        max_consecutive_failures: Failed requests in a row after which the run stops. Defaults to
            50.
        template: TOML file with the words in which the judge is asked (`wording.Wording`). Defaults
            to None: this package's own.
    """

    name = 'llm_judge'
    needs = ('completions',)

    def __init__(
        self,
        model: str = 'meta-llama/Llama-3.1-8B-Instruct',
        base_url: str = 'http://127.0.0.1:8000/v1',
        api_key_env: str | None = None,
        cache_dir: str = 'work_dirs/judge_cache',
        seed: int = 0,
        concurrency: int = 16,
        timeout: float = 30.0,
        max_retries: int = 3,
        backoff: float = 0.25,
        max_backoff: float = 8.0,
        max_consecutive_failures: int = 50,
        template: str | None = None,
    ) -> None:
        self.wording = load_wording(template)
        self.client = ChatClient(
            model,
            base_url,
            api_key_env,
            concurrency=concurrency,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
            max_backoff=max_backoff,
            max_consecutive_failures=max_consecutive_failures,
        )
        self.cache = QuestionCache(cache_dir, model)
        self.seed = seed

    def start(self, rollouts: RolloutBatch) -> PendingScores:
        """The same as the call, without waiting for the answers."""
        return PendingScores(partial(self, rollouts))

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """One score per completion.

        Raises:
            RewardUnavailableError: The judge failed ``max_consecutive_failures`` times in a row.
        """
        references = rollouts.references or [None] * len(rollouts)
        completions = rollouts.required('completions', self)
        pairs = [
            (text.strip(), (reference or '').strip())
            for text, reference in zip(completions, references, strict=True)
        ]
        asked = sorted({pair for pair in pairs if all(pair)})
        question_sets = self.question_sets(sorted({reference for _, reference in asked}))
        judged = self.judge(
            [(text, questions) for text, ref in asked if (questions := question_sets[ref])]
        )
        answered = [pair for pair in asked if question_sets[pair[1]]]
        scores = dict(zip(answered, judged, strict=True))
        result: list[float | None] = []
        for text, reference in pairs:
            region = scores.get((text, reference))
            if not reference:
                result.append(None)
            elif not text:
                result.append(0.0)
            else:
                result.append(None if region is None else region.reward)
        failed = sum(scores.get(pair) is None for pair in asked)
        if failed:
            print_log(
                f'LLM judge {self.client.model!r} at {self.client.base_url}: {failed} of '
                f'{len(asked)} captions could not be scored, last because: '
                f'{self.client.last_failure}',
                logger='current',
                level=logging.WARNING,
            )
        return result

    def question_sets(self, references: Sequence[str]) -> dict[str, QuestionSet | None]:
        """Questions per reference caption: from the cache, else written by the judge and cached.

        ``None`` where the judge failed; asked for again the next time.
        """
        found = {reference: self.cache.load(reference) for reference in references}
        missing = [reference for reference, questions in found.items() if questions is None]
        written = self.client.ask(
            [
                ChatRequest(GENERATION_PROMPT.format(caption=caption), parse_question_set, 4096)
                for caption in missing
            ]
        )
        for reference, questions in zip(missing, written, strict=True):
            if questions is not None:
                self.cache.save(reference, questions)
                found[reference] = questions
        return found

    def judge(
        self, items: Sequence[tuple[str, QuestionSet]], *, shuffle: bool = True
    ) -> list[dlc.RegionScore | None]:
        """Scores of ``(caption, questions)`` pairs; ``None`` where any request failed.

        Args:
            items: The pairs.
            shuffle: Asks the choices in an order of ``seed``; DLC-Bench asks them as they stand.
        """
        requests: list[ChatRequest] = []
        shown: list[list[dlc.Question]] = []
        ask = self.wording.question_prompt
        for caption, question_set in items:
            questions = list(question_set.questions)
            if shuffle:
                questions = [dlc.shuffled(question, self.seed) for question in questions]
            shown.append(questions)
            recognition = self.wording.recognition_question(question_set.class_name)
            requests.append(ChatRequest(ask(caption, recognition), _RecognitionParser(recognition)))
            requests += [
                ChatRequest(ask(caption, question), _ChoiceParser(question))
                for question in questions
            ]
        answers = iter(self.client.ask(requests))
        scores: list[dlc.RegionScore | None] = []
        for questions in shown:
            recognised = next(answers)
            choices = [next(answers) for _ in questions]
            if recognised is None or any(choice is None for choice in choices):
                scores.append(None)
                continue
            read = [None if choice == _UNREADABLE else choice for choice in choices]
            scores.append(dlc.region_score(questions, read, recognised))
        return scores


#: An answer that came but means no choice (scores 0), as against a request that failed (None).
_UNREADABLE = -1


@dataclass(frozen=True)
class _ChoiceParser:
    question: dlc.Question

    def __call__(self, answer: str) -> int:
        choice = dlc.parse_choice(answer, self.question.options)
        return _UNREADABLE if choice is None else choice


@dataclass(frozen=True)
class _RecognitionParser:
    """Yes or no; anything else is asked again."""

    question: dlc.Question

    def __call__(self, answer: str) -> bool:
        choice = dlc.parse_choice(answer, self.question.options)
        if choice is None:
            raise UnusableAnswerError(f'neither yes nor no: {answer[:80]!r}')
        return choice == 0


def parse_question_set(answer: str) -> QuestionSet:
    """The judge's questions from its JSON answer, whatever text stands around it.

    Raises:
        UnusableAnswerError: No JSON object, or not the questions that were asked for.
    """
    start = answer.find('{')
    try:
        content, _ = json.JSONDecoder().raw_decode(answer, max(start, 0))
        class_name = content['class_name']
        if not isinstance(class_name, str) or not class_name.strip():
            raise ValueError('class_name is missing')
        questions: list[dlc.Question] = []
        for kind in (dlc.POSITIVE, dlc.NEGATIVE):
            items = [{**item, 'type': kind} for item in content[kind]]
            questions += _checked(dlc.parse_questions(items, kind), kind)
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableAnswerError(f'no usable questions: {error}') from error
    return QuestionSet(class_name.strip(), tuple(questions))


def _checked(questions: tuple[dlc.Question, ...], kind: str) -> tuple[dlc.Question, ...]:
    if not questions:
        raise ValueError(f'there is no {kind} question')
    allowed, sizes = (POSITIVE_SCORES, (4,)) if kind == dlc.POSITIVE else (NEGATIVE_SCORES, (2, 3))
    for question in questions:
        scores = {score for _, score in question.choices}
        if len(question.choices) not in sizes or not scores <= allowed or max(scores) != 1:
            raise ValueError(f'the choices of {question.text!r} are not as asked for')
    return questions


class QuestionCache:
    """Question sets on disk, one file per reference caption, written whole or not at all.

    Args:
        folder: Created with the first file.
        model: The judge that writes the questions; part of the key.
    """

    def __init__(self, folder: str | Path, model: str) -> None:
        self.folder = Path(folder)
        self.model = model

    def path(self, caption: str) -> Path:
        """The file of a caption's questions."""
        key = json.dumps([PROMPT_VERSION, self.model, caption])
        return self.folder / f'{hashlib.sha256(key.encode()).hexdigest()}.json'

    def load(self, caption: str) -> QuestionSet | None:
        """The questions, or ``None`` where there are none yet or the file is damaged (logged)."""
        path = self.path(caption)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            questions = [
                {'question': item['text'], 'choices': item['choices'], 'type': item['kind']}
                for item in content['questions']
            ]
            return QuestionSet(
                content['class_name'], dlc.parse_questions(questions, f'judge cache {path}')
            )
        except (ValueError, KeyError, TypeError) as error:
            print_log(
                f'LLM judge: {path} is damaged and will be written again: {error}',
                logger='current',
                level=logging.WARNING,
            )
            return None

    def save(self, caption: str, questions: QuestionSet) -> None:
        """Writes beside the target and moves it there, so that no reader sees half a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            'caption': caption,
            'model': self.model,
            'prompt_version': PROMPT_VERSION,
            **asdict(questions),
        }
        path = self.path(caption)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix='.', suffix='.tmp')
        try:
            with os.fdopen(handle, 'w', encoding='utf-8') as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

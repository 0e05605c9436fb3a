"""Whether the judge that a reward or a benchmark asks has its key, is there, and answers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from projects.llava_sam2_rl.preflight.keys import find_type
from projects.llava_sam2_rl.preflight.problems import Problem
from projects.llava_sam2_rl.rewards.chat import ChatClient, ChatRequest
from projects.llava_sam2_rl.rewards.llm_judge import LLMJudgeReward
from projects.llava_sam2_rl.rewards.weighted import CAPTION_REWARDS

#: Longest wait for the one answer, in seconds.
SECONDS = 4.0


@dataclass(frozen=True)
class Judge:
    """An endpoint that a config names.

    Args:
        model: As the endpoint knows it.
        base_url: Its address.
        api_key_env: Variable that holds its key, or None.
    """

    model: str
    base_url: str
    api_key_env: str | None


def check_judges(cfg: Config, stage: str) -> list[Problem]:
    """Asks each judge of the config one question, once.

    Args:
        cfg: Config of a run.
        stage: ``'train'``: those of the objective and of the validation. ``'test'``: of the test.
    """
    found: dict[Judge, str] = {}
    sections = {
        'train': ('model.objective', 'val_evaluator'),
        'test': ('test_evaluator',),
    }
    for section in sections[stage]:
        value: Any = cfg
        for part in section.split('.'):
            value = (value or {}).get(part)
        for where, judge in _judges(value, section):
            found.setdefault(judge, where)
    return [problem for judge, where in found.items() for problem in _ask(judge, where)]


def _judges(value: Any, where: str) -> Iterator[tuple[str, Judge]]:
    """Every judge in a section: a dictionary with an address, or of a class that takes one."""
    if isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield from _judges(item, f'{where}.{n}')
    if not isinstance(value, Mapping):
        return
    options = dict(_defaults(value))
    options.update({key: item for key, item in value.items() if key in options or key != 'type'})
    if isinstance(options.get('base_url'), str) and isinstance(options.get('model'), str):
        key = options.get('api_key_env')
        yield where, Judge(options['model'], options['base_url'], key)
    kind = value.get('type')
    if getattr(kind, '__name__', kind) == 'WeightedRewards' and value.get('rewards') is None:
        yield from _judges(list(CAPTION_REWARDS), f'{where}.rewards')
    for key in value:
        if key != 'type':
            yield from _judges(value[key], f'{where}.{key}')


def _defaults(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The endpoint's options that the class of a node, or the judge, has where none are given."""
    target: Any = None
    if 'type' in node:
        try:
            target = find_type(node)
        except (KeyError, ImportError, AttributeError):
            return  # `check_keys` names it
    elif 'base_url' in node:
        target = LLMJudgeReward
    if target is None:
        return
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    for name in ('model', 'base_url', 'api_key_env'):
        if 'base_url' in parameters and name in parameters:
            yield name, parameters[name].default


def _ask(judge: Judge, where: str) -> list[Problem]:
    """What is wrong with a judge: its key, its address, its name of the model, or nothing."""
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        return [
            Problem(
                f'{where}.api_key_env',
                f'the environment variable {judge.api_key_env} with the key of {judge.base_url} is '
                'not set',
                f'export {judge.api_key_env}=…, or --cfg-options {where}.api_key_env=None for a '
                'server that asks for no key',
            )
        ]
    client = ChatClient(
        judge.model, judge.base_url, judge.api_key_env, timeout=SECONDS, max_retries=0
    )
    (answer,) = client.ask([ChatRequest('Is a cat an animal? Answer Yes or No.', str, 8)])
    if answer is not None:
        return []
    if client.last_failure.startswith('no answer within'):
        return [
            Problem(
                f'{where}.base_url',
                f'{judge.model!r} at {judge.base_url} is slow: no answer to a short question '
                f'within {SECONDS:g} s',
                f'start the server before the run, or raise {where}.timeout',
                fatal=False,
            )
        ]
    return [
        Problem(
            f'{where}.base_url',
            f'{judge.model!r} at {judge.base_url} does not answer ({client.last_failure})',
            f'start the server (vllm serve {judge.model}), or correct {where}.base_url or '
            f'{where}.model',
        )
    ]

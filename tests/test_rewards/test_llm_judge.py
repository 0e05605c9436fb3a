import asyncio
import json
import logging
import pickle
import random
import socket
import time

import pytest
from mmengine.config import Config

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards import (
    LLMJudgeReward,
    RewardUnavailableError,
    RolloutBatch,
    chat,
    dlc,
    llm_judge,
    score,
)
from projects.llava_sam2_rl.rewards.chat import ChatClient, ChatRequest
from projects.llava_sam2_rl.rewards.llm_judge import (
    QuestionCache,
    QuestionSet,
    parse_question_set,
)
from test_rewards.judge_server import (
    CLOSE,
    GARBAGE,
    GARBAGE_JSON,
    HANG,
    NO_CHOICES,
    Fault,
    judge_server,
)

KEY = 'sk-very-secret-0123456789'
WRITTEN = {
    'class_name': 'car',
    'positive': [
        {
            'question': 'What color is it?',
            'choices': [['red', 1], ['orange', 0.5], ['no color is given', 0], ['blue', -1]],
        }
    ],
    'negative': [
        {'question': 'Is a driver mentioned?', 'choices': [['a driver', -1], ['nobody', 1]]},
    ],
}


@pytest.fixture(autouse=True)
def key_in_environment(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')


def honest_judge(prompt, number):
    """Reads the caption out of the prompt and answers as a careful person would."""
    if 'Write multiple-choice questions' in prompt:
        return 'Sure:\n```json\n' + json.dumps(WRITTEN) + '\n```'
    caption = prompt.split('Description: ')[1].split('\n')[0]
    if 'object likely a' in prompt:
        return 'Yes' if 'car' in caption else 'No.'
    if 'What color' in prompt:
        found = [color for color in ('red', 'orange', 'blue') if color in caption]
        return found[0] if found else 'no color is given'
    return 'a driver' if 'driver' in caption else 'nobody'


def reward(server, tmp_path, **options):
    options = {'backoff': 0.01, 'timeout': 5.0, 'api_key_env': 'OPENAI_API_KEY', **options}
    return LLMJudgeReward('judge', server.url, cache_dir=str(tmp_path / 'cache'), **options)


def rollouts(completions, references):
    return RolloutBatch(completions, 1, 'caption_to_mask', references=references)


def test_scores_by_hand(tmp_path):
    captions = {
        'a red car': 1.0,  # (1 + 1) / 2
        'an orange car': 0.75,  # (0.5 + 1) / 2
        'a car': 0.5,  # (0 + 1) / 2: the vague caption's half
        'a red car and its driver': 0.0,  # (1 - 1) / 2
        'a blue car': 0.0,  # (-1 + 1) / 2
        'a blue car and its driver': 0.0,  # clamped
        'a red bird': 0.0,  # not recognised: min(0, ...)
        '  ': 0.0,
    }
    with judge_server(honest_judge) as server:
        judge = reward(server, tmp_path)
        scores = judge(rollouts(list(captions), ['the red car'] * len(captions)))
        assert scores == pytest.approx(list(captions.values()))
        # one generation, and three questions about each of the seven captions that say something
        assert len(server.requests) == 1 + 7 * 3
        assert server.keys == {f'Bearer {KEY}'}
        assert {request['model'] for request in server.requests} == {'judge'}
        assert {request['temperature'] for request in server.requests} == {0}


def test_declines_without_a_reference(tmp_path):
    with judge_server(honest_judge) as server:
        judge = reward(server, tmp_path)
        assert judge(rollouts(['a red car', 'a red car'], [None, ' '])) == [None, None]
        batch = RolloutBatch(['a red car'], 1, 'mask_to_caption')
        assert judge(batch) == [None]
        assert server.requests == []


def test_questions_are_cached_and_equal_captions_asked_once(tmp_path):
    with judge_server(honest_judge) as server:
        judge = reward(server, tmp_path)
        batch = rollouts(['a red car'] * 4 + ['a car'], ['the red car'] * 5)
        first = judge(batch)
        assert len(server.requests) == 1 + 2 * 3
        assert reward(server, tmp_path)(batch) == first
        assert len(server.requests) == 1 + 4 * 3
        assert sum('Write multiple' in prompt for prompt in server.prompts) == 1
        files = list((tmp_path / 'cache').iterdir())
        assert [path.suffix for path in files] == ['.json']
        # another model writes its own questions
        LLMJudgeReward('other', server.url, cache_dir=str(tmp_path / 'cache'))(batch)
        assert sum('Write multiple' in prompt for prompt in server.prompts) == 2


def test_damaged_cache_file_is_written_again(tmp_path, caplog):
    with judge_server(honest_judge) as server:
        judge = reward(server, tmp_path)
        path = judge.cache.path('the red car')
        path.parent.mkdir()
        path.write_text('{"class_name": "car", "ques')
        with caplog.at_level(logging.WARNING):
            assert judge(rollouts(['a red car'], ['the red car'])) == [1.0]
        assert json.loads(path.read_text())['class_name'] == 'car'


def test_cache_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = QuestionCache(tmp_path, 'judge')
    questions = QuestionSet('car', (dlc.Question('Q', (('a', 1.0), ('b', -1.0)), 'negative'),))
    cache.save('caption', questions)
    assert cache.load('caption') == questions
    assert cache.load('another') is None
    with cache.path('caption').open() as reader:  # a reader that is under way keeps what it opened
        cache.save('caption', QuestionSet('a much longer class name', questions.questions))
        assert json.load(reader)['class_name'] == 'car'
    cache.save('caption', questions)

    def crash(*args, **kwargs):
        raise OSError('disk full')

    monkeypatch.setattr(json, 'dump', crash)
    with pytest.raises(OSError, match='disk full'):
        cache.save('caption', QuestionSet('bus', questions.questions))
    assert cache.load('caption') == questions
    assert len(list(tmp_path.iterdir())) == 1


def filled_cache(judge, num_questions):
    """A reference whose questions are already there: ``num_questions`` - 1 and the recognition."""
    positive = dlc.Question(
        'What color is it?',
        (('red', 1.0), ('pink', 0.5), ('none', 0.0), ('blue', -1.0)),
        'positive',
    )
    questions = [
        dlc.Question(f'{positive.text} {i}', positive.choices, positive.kind)
        for i in range(num_questions - 1)
    ]
    judge.cache.save('the red car', QuestionSet('car', tuple(questions)))


def test_two_hundred_questions_in_under_two_seconds(tmp_path):
    with judge_server(honest_judge, latency=0.05) as server:
        judge = reward(server, tmp_path, concurrency=16)
        filled_cache(judge, 10)
        batch = rollouts([f'a red car {i}' for i in range(20)], ['the red car'] * 20)
        seconds = []
        for _ in range(3):  # the best of three: the machine may be busy with something else
            start = time.perf_counter()
            scores = judge(batch)
            seconds.append(time.perf_counter() - start)
            if seconds[-1] < 2:
                break
        assert scores == [1.0] * 20
        assert len(server.requests) == 200 * len(seconds)
        assert server.most_active <= 16
        assert min(seconds) < 2, seconds


def test_thirty_percent_failures_cost_only_those_scores(tmp_path):
    rng = random.Random(0)
    faults = [HANG, CLOSE, GARBAGE, GARBAGE_JSON, NO_CHOICES, '', Fault('slow down', 429)]
    faults += [Fault('broken', 500)]

    def flaky(prompt, number):
        return rng.choice(faults) if rng.random() < 0.3 else honest_judge(prompt, number)

    with judge_server(flaky, latency=0.005) as server:
        judge = reward(server, tmp_path, timeout=1.5, max_retries=0)
        filled_cache(judge, 2)
        texts = [f'a red car {i}' if i % 2 else f'a blue car {i}' for i in range(60)]
        scores = judge(rollouts(texts, ['the red car'] * 60))
        failed = [score is None for score in scores]
        # 1 - 0.7^2 = 51 % of the captions lose one of their two questions
        assert 15 < sum(failed) < 46
        for index, value in enumerate(scores):
            assert value in (None, 1.0 if index % 2 else 0.0)
        # With retries the same server costs almost nothing: 0.3^6 per question.
        judge = reward(server, tmp_path, timeout=1.5, max_retries=5)
        scores = judge(rollouts(texts, ['the red car'] * 60))
        assert sum(score is None for score in scores) <= 3


def test_dead_server_stops_after_the_limit(tmp_path):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{unused.getsockname()[1]}/v1'
    judge = LLMJudgeReward(
        'judge',
        url,
        cache_dir=str(tmp_path),
        max_retries=1,
        backoff=0.01,
        max_consecutive_failures=5,
    )
    batch = [rollouts(['x', 'y'], [f'caption {i}', f'other {i}']) for i in range(3)]
    assert judge(batch[0]) == [None, None]
    assert judge(batch[1]) == [None, None]
    words = rf'5 requests in a row .*{url} failed.*Connection'
    with pytest.raises(RewardUnavailableError, match=words):
        judge(batch[2])
    # Asked again although it gave up: nobody stopped the run, so it does.
    with pytest.raises(RuntimeError, match='[67] requests in a row') as error:
        score(judge, batch[2])
    assert not isinstance(error.value, RewardUnavailableError)


def test_in_a_training_step_giving_up_is_told_and_not_raised(tmp_path):
    with judge_server(honest_judge) as server:
        url = server.url
    judge = LLMJudgeReward(
        'judge', url, cache_dir=str(tmp_path), max_retries=0, max_consecutive_failures=1
    )
    output = score(judge, rollouts(['x', 'y'], ['a', 'b']))
    assert output.rewards.isnan().all()
    assert f'1 requests in a row to {"judge"!r} at {url} failed' in output.failure


def test_a_success_resets_the_count(tmp_path):
    def every_other(prompt, number):
        return Fault('broken', 500) if number % 2 else 'Yes'

    with judge_server(every_other) as server:
        client = ChatClient(
            'judge', server.url, concurrency=1, max_retries=0, max_consecutive_failures=2
        )
        assert client.ask([ChatRequest('?', str)] * 6) == ['Yes', None] * 3
        assert (client.num_requests, client.num_failures) == (6, 3)


@pytest.mark.parametrize(
    ('status', 'attempts'), [(401, 1), (404, 1), (400, 1), (429, 3), (500, 3), (503, 3)]
)
def test_what_is_tried_again(status, attempts):
    with judge_server(lambda prompt, number: Fault('no', status)) as server:
        client = ChatClient('judge', server.url, max_retries=2, backoff=0.01)
        assert client.ask([ChatRequest('?', str)]) == [None]
        assert len(server.requests) == attempts
        assert f'HTTP {status}' in client.last_failure


def test_retry_after_is_obeyed_up_to_the_limit():
    def answer_after(seconds):
        return lambda prompt, number: (
            'Yes' if number else Fault('no', 429, {'retry_after': seconds})
        )

    with judge_server(answer_after('0.4')) as server:
        start = time.perf_counter()
        client = ChatClient('judge', server.url, backoff=0.001)
        assert client.ask([ChatRequest('?', str)]) == ['Yes']
        assert time.perf_counter() - start > 0.4
    with judge_server(answer_after('60')) as server:
        start = time.perf_counter()
        client = ChatClient('judge', server.url, backoff=0.001, max_backoff=0.05)
        assert client.ask([ChatRequest('?', str)]) == ['Yes']
        assert time.perf_counter() - start < 40


def test_timeout_covers_the_whole_attempt():
    with judge_server(lambda prompt, number: HANG) as server:
        client = ChatClient('judge', server.url, timeout=0.2, max_retries=1, backoff=0.01)
        start = time.perf_counter()
        assert client.ask([ChatRequest('?', str)]) == [None]
        # The server itself hangs for ten seconds, twice.
        assert 0.4 < time.perf_counter() - start < 10
        assert 'no answer within 0.2 s' in client.last_failure


def test_unreadable_answer_counts_zero_unreadable_recognition_is_asked_again(tmp_path):
    def mumbling(prompt, number):
        if 'object likely a' in prompt:
            return 'Maybe' if number == 0 else 'Yes'
        return honest_judge(prompt, number) if 'Is a driver' in prompt else 'hard to say'

    with judge_server(mumbling) as server:
        judge = reward(server, tmp_path, concurrency=1)
        judge.cache.save('the red car', parse_question_set(json.dumps(WRITTEN)))
        assert judge(rollouts(['a red car'], ['the red car'])) == [0.5]
        assert len(server.requests) == 4
        temperatures = [request['temperature'] for request in server.requests]
        assert sorted(temperatures) == [0, 0, 0, 0.5]
    with judge_server(lambda prompt, number: 'Maybe') as server:
        judge = reward(server, tmp_path)
        assert judge(rollouts(['a red car'], ['the red car'])) == [None]


def test_bad_questions_are_written_again(tmp_path):
    broken = [
        'no json',
        '[]',
        json.dumps({**WRITTEN, 'negative': []}),
        json.dumps({**WRITTEN, 'class_name': ''}),
        json.dumps({**WRITTEN, 'positive': WRITTEN['negative']}),
    ]

    def answer(prompt, number):
        return broken[number] if number < len(broken) else honest_judge(prompt, number)

    with judge_server(answer) as server:
        judge = reward(server, tmp_path, max_retries=len(broken))
        assert judge(rollouts(['a red car'], ['the red car'])) == [1.0]
        assert len(server.requests) == len(broken) + 1 + 3


def test_the_key_shows_nowhere(tmp_path, caplog, capfd):
    config = Config(
        {'reward': {'type': 'LLMJudgeReward', 'model': 'judge', 'cache_dir': str(tmp_path)}}
    )

    def echo(prompt, number):
        return Fault(f'Incorrect API key provided: {KEY}', 401)

    with judge_server(echo) as server, caplog.at_level(logging.DEBUG):
        config.reward.base_url = server.url
        config.reward.api_key_env = 'OPENAI_API_KEY'
        config.reward.max_consecutive_failures = 2
        judge = REWARDS.build(config.reward)
        assert judge(rollouts(['x'], ['caption'])) == [None]
        assert 'Incorrect API key provided: ***' in judge.client.last_failure
        with pytest.raises(RuntimeError) as error:
            judge(rollouts(['x'], ['caption']))
    assert caplog.records, 'the client logs at debug level, so there was something to look at'
    captured = capfd.readouterr()
    seen = [caplog.text, captured.out, captured.err, config.dump(), str(error.value)]
    seen += [repr(judge), str(vars(judge.client)), repr(pickle.dumps(judge))]
    seen += [repr(getattr(error.value, '__cause__', None))]
    seen += [path.read_text() for path in tmp_path.rglob('*.json')]
    for text in seen:
        assert KEY not in text


def test_no_key_is_needed_and_none_is_sent_unless_one_is_named(monkeypatch):
    with judge_server(lambda prompt, number: 'Yes') as server:
        assert ChatClient('judge', server.url).ask([ChatRequest('?', str)]) == ['Yes']
        assert KEY not in str(server.keys)
    monkeypatch.delenv('OPENAI_API_KEY')
    LLMJudgeReward()
    with pytest.raises(ValueError, match='OPENAI_API_KEY .* not set'):
        LLMJudgeReward(api_key_env='OPENAI_API_KEY')


def test_the_first_refused_connection_names_the_address(tmp_path, monkeypatch):
    with judge_server(lambda prompt, number: 'Yes') as server:
        url = server.url
    said: list[str] = []
    monkeypatch.setattr(chat, 'print_log', lambda text, **_: said.append(text))
    judge = LLMJudgeReward('judge', url, cache_dir=str(tmp_path), max_retries=1, backoff=0.01)
    assert judge(rollouts(['x', 'y', 'z'], ['a', 'b', 'c'])) == [None] * 3
    # Once, though three requests were made twice.
    assert len(said) == 1
    assert f"nobody answers at {url}, where the judge 'judge' should be" in said[0]


def test_the_warning_about_unscored_captions_names_the_address(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(llm_judge, 'print_log', lambda text, **_: said.append(text))
    with judge_server(lambda prompt, number: Fault('busy', 500)) as server:
        judge = reward(server, tmp_path, max_retries=0)
        assert judge(rollouts(['x'], ['a'])) == [None]
    assert f"LLM judge 'judge' at {server.url}: 1 of 1 captions could not be scored" in said[0]


def test_works_inside_a_running_event_loop():
    async def notebook(url):
        return ChatClient('judge', url).ask([ChatRequest('?', str)])

    with judge_server(lambda prompt, number: 'Yes') as server:
        assert asyncio.run(notebook(server.url)) == ['Yes']


def test_global_random_state_is_left_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    with judge_server(lambda prompt, number: 'Yes' if number else CLOSE) as server:
        client = ChatClient('judge', server.url, backoff=0.001)
        assert client.ask([ChatRequest('?', str)]) == ['Yes']
    assert random.random() == expected


@pytest.mark.parametrize('options', [{'concurrency': 0}, {'timeout': 0}, {'max_retries': -1}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LLMJudgeReward(**options)

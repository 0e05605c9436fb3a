"""Many short questions to an OpenAI-compatible endpoint at a time, failures included."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmengine.logging import print_log

from projects.llava_sam2_rl.rewards.base import RewardUnavailableError

if TYPE_CHECKING:
    # At run time it is imported where a question is asked: every start would wait for it.
    import openai

#: Statuses for which asking again cannot help.
_FINAL_STATUSES = (400, 401, 403, 404, 422)
#: For asking again after an answer that could not be used: at 0 it would come out the same.
_SECOND_TEMPERATURE = 0.5


class UnusableAnswerError(ValueError):
    """The endpoint answered, but with nothing that can be used; worth asking again."""


@dataclass(frozen=True)
class ChatRequest:
    """One user message and how to read its answer.

    Args:
        prompt: The message.
        parse: Turns the answer's text into the result; raises :class:`UnusableAnswerError` to have
            it asked again.
        max_tokens: Limit of the answer.
    """

    prompt: str
    parse: Callable[[str], Any]
    max_tokens: int = 64


class ChatClient:
    """Asks concurrently, with a limit, a timeout, and retries with backoff and jitter.

    The API key is read from the environment at each call and never kept on the object.

    Args:
        model: Model name as the endpoint knows it.
        base_url: Endpoint, e.g. ``http://127.0.0.1:8000/v1``.
        api_key_env: Name of the environment variable that holds the key. Defaults to None: the
            endpoint wants none.
        concurrency: Requests under way at a time.
        timeout: Seconds for one attempt, from connecting to the last byte.
        max_retries: Attempts after the first. Timeouts, broken connections, 408/409/429/5xx and
            unusable answers are tried again; refusals (400, 401, 403, 404, 422) are not.
        backoff: Seconds before the first retry; doubles each time, times a random 0.5 to 1. A
            longer ``Retry-After`` of the server is obeyed.
        max_backoff: Upper limit of both, in seconds.
        max_consecutive_failures: Requests that may fail in a row, all attempts spent and across
            calls, before :meth:`ask` gives up.
        temperature: Sampling temperature.

    Raises:
        ValueError: An option is out of range or the environment variable is not set.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key_env: str | None = None,
        *,
        concurrency: int = 16,
        timeout: float = 30.0,
        max_retries: int = 3,
        backoff: float = 0.25,
        max_backoff: float = 8.0,
        max_consecutive_failures: int = 50,
        temperature: float = 0.0,
    ) -> None:
        if concurrency < 1 or max_consecutive_failures < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError(
                f'concurrency={concurrency} and max_consecutive_failures='
                f'{max_consecutive_failures} must be at least 1, max_retries={max_retries} at '
                f'least 0 and timeout={timeout} positive'
            )
        self.model = model
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.max_consecutive_failures = max_consecutive_failures
        self.temperature = temperature
        self.num_requests = 0
        self.num_failures = 0
        self.consecutive_failures = 0
        self.last_failure = ''
        self._unreachable = False
        # Its own generator: jitter must not move the training's random numbers.
        self._random = random.Random()
        self._read_key()

    def ask(self, requests: Sequence[ChatRequest]) -> list[Any]:
        """Results in the order of the requests; ``None`` for each that failed to the end.

        Raises:
            RewardUnavailableError: ``max_consecutive_failures`` requests in a row failed; names
                the endpoint and the last reason. Requests still under way are dropped.
            RuntimeError: The same, asked once more after that: nobody stopped the run.
        """
        if not requests:
            return []
        return _run(self._ask_all(requests))

    async def _ask_all(self, requests: Sequence[ChatRequest]) -> list[Any]:
        import openai

        key = self._read_key()
        limit = asyncio.Semaphore(self.concurrency)
        async with openai.AsyncOpenAI(
            # The client refuses an empty key, the endpoint will not look at this one.
            api_key=key or 'none',
            base_url=self.base_url,
            max_retries=0,
            timeout=self.timeout,
        ) as client:
            tasks = [
                asyncio.create_task(self._ask_one(client, limit, request, key))
                for request in requests
            ]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    async def _ask_one(
        self, client: openai.AsyncOpenAI, limit: asyncio.Semaphore, request: ChatRequest, key: str
    ) -> Any:
        import openai

        temperature = self.temperature
        reason = ''
        for attempt in range(self.max_retries + 1):
            wait = 0.0
            try:
                async with limit:
                    text = await asyncio.wait_for(
                        self._complete(client, request, temperature), self.timeout
                    )
                result = request.parse(text)
            except UnusableAnswerError as error:
                reason = str(error)
                temperature = max(temperature, _SECOND_TEMPERATURE)
            except (TimeoutError, openai.APITimeoutError):
                reason = f'no answer within {self.timeout} s'
            except openai.APIStatusError as error:
                reason = f'HTTP {error.status_code}: {error.message}'
                if error.status_code in _FINAL_STATUSES:
                    break
                wait = _retry_after(error)
            except openai.OpenAIError as error:
                reason = f'{error} {error.__cause__ or ""}'.strip()
                if isinstance(error, openai.APIConnectionError):
                    self._say_unreachable(reason.replace(key, '***') if key else reason)
            else:
                self.num_requests += 1
                self.consecutive_failures = 0
                self._unreachable = False
                return result
            if attempt < self.max_retries:
                pause = self.backoff * 2**attempt * self._random.uniform(0.5, 1.0)
                await asyncio.sleep(min(self.max_backoff, max(pause, wait)))
        self._count_failure(reason.replace(key, '***') if key else reason)
        return None

    async def _complete(
        self, client: openai.AsyncOpenAI, request: ChatRequest, temperature: float
    ) -> str:
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=[{'role': 'user', 'content': request.prompt}],
                temperature=temperature,
                max_tokens=request.max_tokens,
            )
            text = completion.choices[0].message.content
        # The client neither checks the schema nor catches a body that is no JSON.
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnusableAnswerError('the answer is no chat completion') from error
        if not isinstance(text, str) or not text.strip():
            raise UnusableAnswerError('the answer is empty')
        return text

    def _say_unreachable(self, reason: str) -> None:
        """Names the address at the first connection that is refused, before the retries."""
        if not self._unreachable:
            self._unreachable = True
            print_log(
                f'nobody answers at {self.base_url}, where the judge {self.model!r} should be '
                f'({reason}): start it there, or correct base_url. Requests are tried again',
                logger='current',
                level=logging.WARNING,
            )

    def _count_failure(self, reason: str) -> None:
        self.num_requests += 1
        self.num_failures += 1
        self.consecutive_failures += 1
        self.last_failure = reason[:300]
        if self.consecutive_failures >= self.max_consecutive_failures:
            first = self.consecutive_failures == self.max_consecutive_failures
            raise (RewardUnavailableError if first else RuntimeError)(
                f'{self.consecutive_failures} requests in a row to {self.model!r} at '
                f'{self.base_url} failed, the last because: {self.last_failure}. Check the '
                'endpoint, or raise max_consecutive_failures'
            )

    def _read_key(self) -> str:
        if self.api_key_env is None:
            return ''
        key = os.environ.get(self.api_key_env, '')
        if not key:
            raise ValueError(
                f'environment variable {self.api_key_env} with the API key for {self.base_url} is '
                'not set: set it, or api_key_env=None for an endpoint that wants no key'
            )
        return key


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds the server asked to wait; 0 where it did not, or gave a date."""
    value = error.response.headers.get('retry-after', '')
    return float(value) if value.replace('.', '', 1).isdecimal() else 0.0


def _run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Runs to the end from ordinary code, also inside a notebook's running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()

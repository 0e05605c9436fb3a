"""How a conversation becomes one text: the chat templates of Sa2VA checkpoints.

A checkpoint's ``config.json`` names its template; models of one family were trained with different
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Texts of a turn that refers to something in an image: the template's own, or what the first code
#: base of Sa2VA (until October 2025) put in its place, whatever the template was called.
REFERRING_INSTRUCTIONS = ('template', 'v1')
_V1_INSTRUCTION = '<|user|>\n{input}<|end|><|assistant|>\n'


def check_referring_instruction(instruction: str) -> str:
    """The name, if it is one of `REFERRING_INSTRUCTIONS`.

    Raises:
        ValueError: It is not.
    """
    if instruction not in REFERRING_INSTRUCTIONS:
        raise ValueError(
            f'referring_instruction is {instruction!r}, expected one of '
            f'{", ".join(map(repr, REFERRING_INSTRUCTIONS))}'
        )
    return instruction


@dataclass(frozen=True)
class ChatTemplate:
    """The strings around what user and assistant say; those of xtuner's ``PROMPT_TEMPLATE``.

    Written out, since every data loading process imports this file and xtuner brings 175 MiB with
    it. A test compares the two. Sa2VA is trained and asked without a system turn.

    Args:
        name: As ``template`` in ``config.json``.
        instruction: The user's turn and the beginning of the assistant's; holds ``{input}`` once.
        suffix: Ends an answer. It stands for the end token too: no further one is added.
        separator: Between two turns, and behind the last one in training.
        stop_strings: Texts that end a generated answer.
    """

    name: str
    instruction: str
    suffix: str
    separator: str
    stop_strings: tuple[str, ...]

    def ask(self, text: str) -> str:
        """The user's turn that says ``text``, through the beginning of the answer."""
        before, behind = self.instruction.split('{input}')
        return f'{before}{text}{behind}'

    def answer(self, text: str) -> str:
        """The assistant's turn that says ``text``."""
        return f'{text}{self.suffix}'

    def referring(self, instruction: str = 'template') -> ChatTemplate:
        """The template of turns that refer to something in an image, for training data.

        Args:
            instruction: ``'template'``: this one, which all inference sends. ``'v1'``: as the first
                code base trained Sa2VA-1B, -4B, -8B and -26B: phi3_chat's instruction without the
                newline before ``<|assistant|>``, this template's suffix, and no separators.

        Raises:
            ValueError: There is no such instruction.
        """
        if check_referring_instruction(instruction) == 'template':
            return self
        return replace(self, instruction=_V1_INSTRUCTION, separator='')


_IM_INSTRUCTION = '<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n'

#: By name.
TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate(
            name='phi3_chat',
            instruction='<|user|>\n{input}<|end|>\n<|assistant|>\n',
            suffix='<|end|>',
            separator='\n',
            stop_strings=('<|end|>',),
        ),
        ChatTemplate(
            name='qwen_chat',
            instruction=_IM_INSTRUCTION,
            suffix='<|im_end|>',
            separator='\n',
            stop_strings=('<|im_end|>', '<|endoftext|>'),
        ),
        ChatTemplate(
            name='internlm2_chat',
            instruction=_IM_INSTRUCTION,
            suffix='<|im_end|>',
            separator='\n',
            stop_strings=('<|im_end|>',),
        ),
    )
}

#: What ends an answer in any of them.
ALL_STOP_STRINGS = tuple(
    dict.fromkeys(stop for template in TEMPLATES.values() for stop in template.stop_strings)
)


def find_template(name: str | ChatTemplate) -> ChatTemplate:
    """The template of that name; ``-`` counts as ``_``, as some ``config.json`` write it.

    Args:
        name: One of `TEMPLATES`, or a template, which is returned as it is.

    Raises:
        ValueError: There is none of that name; the message lists those there are.
    """
    if isinstance(name, ChatTemplate):
        return name
    template = TEMPLATES.get(str(name).replace('-', '_'))
    if template is None:
        raise ValueError(
            f'chat template {name!r} is unknown: Sa2VA checkpoints are trained with '
            f'{", ".join(TEMPLATES)}'
        )
    return template


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    return text[: min(found)] if found else text

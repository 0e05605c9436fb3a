import collections
import importlib.util
import re

import pytest


@pytest.fixture(scope='module')
def tool(root):
    path = root / 'tools/document_options.py'
    spec = importlib.util.spec_from_file_location('document_options', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Base:
    """A base.

    Args:
        size: How large.
            On two lines.
    """


class Child(Base):
    """What it is,
    in one sentence.

    More.

    Args:
        mode: ``'a' | 'b'``.

    Raises:
        ValueError: Never.
    """

    def __init__(self, mode, size=3, *args, **kwargs):
        pass


def test_a_table_has_the_signature_and_the_docstrings(tool):
    assert tool.table(Child).splitlines() == [
        '### Child',
        '',
        'What it is, in one sentence.',
        '',
        '| option | default | meaning |',
        '|---|---|---|',
        "| `mode` | required | `'a' \\| 'b'`. |",
        '| `size` | `3` | How large. On two lines. |',
    ]


class Outside(collections.UserString):
    """Not ours."""


def test_options_of_others_are_theirs_to_explain(tool):
    assert tool.table(Outside).endswith("| `seq` | required | as of collections's `UserString` |")


def test_the_page_is_that_of_the_code(tool):
    assert tool.PAGE.read_text() == tool.page(), 'run: python tools/document_options.py'


def test_no_option_lacks_a_meaning(tool):
    text = tool.PAGE.read_text()
    assert not re.findall(r'^\| `\w+` \|.*\|\s+\|$', text, re.MULTILINE)
    for name in ('num_generations', 'min_pseudo_tokens', 'max_bad_fraction', 'withhold_captions'):
        assert f'| `{name}` |' in text

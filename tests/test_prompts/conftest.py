from __future__ import annotations

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope='session')
def tokenizer(shared_dir):
    """The real one of Sa2VA-4B."""
    return AutoTokenizer.from_pretrained(shared_dir / 'fixtures' / 'sa2va_4b_tokenizer')

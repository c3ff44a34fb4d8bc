from __future__ import annotations

import pytest
from tiny import tiny

from broadsheet.core.microworld.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random model that speaks the microworld's tokens."""
    path = tmp_path_factory.mktemp("model")
    model = tiny("gqa", vocab_size=2048, max_position_embeddings=2048)
    model.save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return str(path)

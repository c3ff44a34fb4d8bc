"""The pocket tokenizer: byte-level BPE of at most 2,048 tokens, trained on the microworld's own text.

Words carry their leading space, numbers are cut into pairs of digits, so an invented word and a number below 100 are one
token each wherever they stand. The chat template opens every message with a space for the same reason.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .lexicon import CATEGORIES, CITIES, PEOPLE, WORDS
from .tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
VOCABULARY = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }}<|end|>"
    "{% else %}<|user|> {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PIECES = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on text of every task; the same seed gives the same file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)

    def corpus():
        # Every word a few hundred times, so that each becomes one token before the vocabulary is full.
        for _ in range(200):
            yield " " + " ".join(WORDS) + " " + " ".join(map(str, range(100)))
            yield " " + " ".join(f"#{n}" for n in range(1, 100))
            yield " " + " ".join(word for words in CATEGORIES.values() for word in words)
        for _ in range(20):
            yield " " + " ".join(PEOPLE + CITIES)
        for _ in range(40):
            for task in TASKS.values():
                session = task(rng, 256, 4)
                yield " " + session.context
                for turn in session.turns:
                    yield " " + turn.input
                    yield " " + (" ".join(turn.answer) if isinstance(turn.answer, tuple) else turn.answer)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )

"""The model that needs no download: a Llama of about 30 M parameters and its own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.data import Record

VOCABULARY = 6144
END_OF_TEXT = "<|endoftext|>"
_TRAINING_CHARACTERS = 2 << 20  # enough text for good merges, and a second of work


def tiny_config() -> Any:
    """A ``LlamaConfig`` of 29.5 M parameters: 8 layers of width 512, grouped-query attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(records: Iterable[Record]) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) of at most ``VOCABULARY`` tokens.

    Trained on the first 2 Mi characters of the data; any text can be encoded, since all 256
    bytes are tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(records), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=tiny_config().max_position_embeddings,
    )


def _texts(records: Iterable[Record]) -> Iterator[str]:
    left = _TRAINING_CHARACTERS
    for record in records:
        for text in (record.text, *(turn.content for turn in record.turns)):
            if text and left > 0:
                yield text[:left]
                left -= len(text)

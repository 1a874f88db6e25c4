"""Tiny tokenizers of both kinds, and texts for them."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["a", "the", "good", "bad", "film", "plot", "was", "not", "very", "long", "and"]
WORDS += ["short", "is", "so", "dull", "bright", "why", "yes", "no"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def bert_like(**options: object) -> PreTrainedTokenizerFast:
    """Words, [CLS] and [SEP], token types: an encoder's tokenizer."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )


def gpt_like(**options: object) -> PreTrainedTokenizerFast:
    """Bytes, an end-of-text token, no pad and no separator token: a decoder's tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{char: i + 1 for i, char in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


def texts_of(lengths: list[int]) -> list[str]:
    """One text for each number of words, no two alike."""
    return [
        " ".join(WORDS[(i + k) % len(WORDS)] for k in range(length))
        for i, length in enumerate(lengths)
    ]

"""Which class of transformers a text model of a configuration is loaded as."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """For an encoder-decoder the one with both; else, by default, the causal one.

    Some encoder-decoders have a causal class too, which is their decoder alone: it would load, say
    that weights are unused, and write nonsense.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    both = getattr(config, "is_encoder_decoder", False)
    return AutoModelForSeq2SeqLM if both else AutoModelForCausalLM

"""Language models: loading them, and continuing, sampling and scoring sequences with them quickly."""

from .cached import RaggedKV
from .engine import Engine
from .forward import join_responses, pad_sequences, padded_logits, response_logits, response_logprobs, right_padded
from .generate import Responses, generate
from .load import PACKAGED_MODELS, LanguageModel, disable_dropout, load_language_model, load_tokenizer
from .lstm import LSTMConfig, LSTMForCausalLM
from .make import make_engine
from .matmul import fast_linear
from .recompute import Recompute
from .recurrent import Recurrent
from .sampling import TokenFilter, sample_tokens

__all__ = [
    "PACKAGED_MODELS",
    "Engine",
    "LSTMConfig",
    "LSTMForCausalLM",
    "LanguageModel",
    "RaggedKV",
    "Recompute",
    "Recurrent",
    "Responses",
    "TokenFilter",
    "disable_dropout",
    "fast_linear",
    "generate",
    "join_responses",
    "load_language_model",
    "load_tokenizer",
    "make_engine",
    "pad_sequences",
    "padded_logits",
    "response_logits",
    "response_logprobs",
    "right_padded",
    "sample_tokens",
]

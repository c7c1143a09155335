"""
What we ask of Hugging Face: configs, tokenizers and their templates, models; logits and the token they choose; a cache.
"""
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as hf_logging

from common import UserError

hf_logging.disable_progress_bar()  # one bar per shard of weights says nothing that the scripts do not

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_tokenizer(path, trust_remote_code=False):
    """The model's own tokenizer. Raises UserError with the path."""
    try:
        # a tokenizer saved without a family is loaded as it was saved: AutoTokenizer would take the model's family's
        generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        return loader.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"no tokenizer at {path}: {str(e).splitlines()[0]}") from None


def template_text(tokenizer, messages, add_generation_prompt):
    """The tokenizer's chat template, rendered. Llama's templates write today's date: here it is always the same."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                                         date_string="26 Jul 2024")


def load_config(path, trust_remote_code=False):
    """The model's config, cheap: sizes are checked before any weight is read."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError, KeyError) as e:
        if "trust_remote_code" in str(e):
            raise UserError(f"{path} ships code of its own: read it, then give --trust_remote_code true") from None
        raise UserError(f"no model at {path}: {str(e).splitlines()[0]}") from None


def load_lm(path, dtype="fp32", trust_remote_code=False):
    """AutoModelForCausalLM, in eval mode, parameters in `dtype` (bf16, fp16 or fp32)."""
    load_config(path, trust_remote_code)
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"cannot load the model at {path}: {str(e).splitlines()[0]}") from None
    return lm.eval()


def scale_logits(config, logits):
    """The last touch that some families give to logits (Gemma's soft cap, Granite's and Cohere's scale)."""
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits


def lm_logits(lm, hidden_states):
    """Post-norm states (..., D) -> logits (..., V), fp32."""
    return scale_logits(lm.config.get_text_config(), lm.get_output_embeddings()(hidden_states).float())


def next_tokens(logits, uniforms=None):
    """Each row's likeliest token, or one drawn with its own number in [0, 1) by inverting the CDF, so that a row says
    the same beside any neighbours. (b, V), (b,) float64 -> (b,)."""
    if uniforms is None:
        return logits.argmax(-1)
    cdf = logits.double().softmax(-1).cumsum(-1)  # (b, V)
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return drawn.squeeze(1).clamp(max=cdf.shape[1] - 1)


class GrowingLayer(DynamicLayer):
    """One layer's KV cache with spare room: new tokens are written in place, where transformers' own layer copies all
    that it holds for each of them (up to half the time of a long conversation). For decoding without gradients."""
    room = None  # two tensors (B, heads, capacity, D); keys and values are views of their first columns

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, states = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.room = [x.new_empty(*x.shape[:2], end + max(64, end // 4), x.shape[-1]) for x in states]
            if start:
                self.room[0][:, :, :start], self.room[1][:, :, :start] = self.keys, self.values
        for room, new in zip(self.room, states):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.room = None  # keys and values are now copies of their own


def growing_cache():
    """An empty KV cache for decoding without gradients, in place of DynamicCache."""
    return Cache(layer_class_to_replicate=GrowingLayer)

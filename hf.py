"""
What is asked of Hugging Face: any causal LM, run by its input embeddings and its last hidden states.

    1. load     config, tokenizer, model
    2. run      input embeddings -> states -> logits, with the family's own cache
    3. check    can this model be used at all?
    4. decode   the one decode loop, of plans and of answers
"""
import functools
import os
import re
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig,
                          PreTrainedTokenizerFast)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import cached_file, logging as hf_logging

from common import UserError

# ---- 1. Load -------------------------------------------------------------------------------------
hf_logging.disable_progress_bar()  # one bar per shard of weights says nothing that the scripts do not
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}  # rounding is a tenth of it


def first_line(error):
    """What a library says, short: its first line, and the next one where that is only a heading."""
    lines = re.split(r"\s*\n\s*", str(error).strip() or type(error).__name__)
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def load_config(path, trust_remote_code=False):
    """The model's (text) config, read before any weight. Raises UserError, at once for a directory that is
    not here or holds no model: the hub's client would try for a minute to find it there."""
    there = os.listdir(path) if os.path.isdir(path) else []
    if not there and (path.count("/") != 1 or os.path.isdir(os.path.dirname(path))):
        raise UserError(f"no directory {path} here, or an empty one (and a hub id has the form owner/name)")
    if "adapter_config.json" in there:
        raise UserError(f"{path} is a LoRA adapter: merge it into its model (peft's merge_and_unload) and save that")
    if there and "config.json" not in there:
        hint = "not finished: run it again, or give its checkpoint-N" if "loss_log.csv" in there else "no model"
        raise UserError(f"{path} has no config.json: {hint}")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # a config that contradicts itself has an error class of its own
        if "trust_remote_code" in str(error):
            raise UserError(f"{path} ships code: read it, then give --trust_remote_code true") from None
        raise UserError(f"no model at {path}: {first_line(error)}") from None


def context_length(config):
    """How many positions a model reads; 2**31 where nothing bounds them. RoPE schemes that change with the
    longest sample of a batch (longrope, dynamic) count up to their original length."""
    length = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    for scheme in (rope, *rope.values()):  # one scheme, or one for each type of layer
        if isinstance(scheme, dict) and scheme.get("rope_type") in ("longrope", "dynamic"):
            length = min(length, scheme.get("original_max_position_embeddings") or length)
    return length


def load_tokenizer(path, trust_remote_code=False, chat_template_kwargs=None):
    """A model's tokenizer, or one alone; its template always gets chat_template_kwargs. Raises UserError."""
    alone = os.path.exists(f"{path}/tokenizer_config.json") and not os.path.exists(f"{path}/config.json")
    vocab_size = None if alone else getattr(load_config(path, trust_remote_code), "vocab_size", None)
    try:
        # tokenizer.json is what the model was trained with; the class that tokenizer_config.json names would
        # rebuild its pre-tokenizer and normalizer from the vocabulary (transformers 5)
        as_it_stands = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        loader = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
        tokenizer = loader.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of tokenizers, a plain Exception
        raise UserError(f"no tokenizer at {path}: {first_line(error)}") from None
    ids = tokenizer.get_vocab().values()
    if len(ids) < 10:  # what transformers makes of a folder without any tokenizer file
        raise UserError(f"no tokenizer at {path}: its tokenizer.json or tokenizer.model is missing")
    if vocab_size and max(ids) >= vocab_size:
        raise UserError(f"{path}: its tokenizer has ids up to {max(ids)}, its table of embeddings {vocab_size} rows: "
                        f"resize the table, or give the tokenizer it was trained with")
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its {type(tokenizer).__name__} does not say where in a text each token ends: "
                        f"convert it to a tokenizer.json")
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # Command-R's, Hermes-3's: one for tools, one for documents
        if "default" not in templates:
            raise UserError(f"{path} has the chat templates {', '.join(templates)} and no default one: "
                            f"set tokenizer.chat_template to one of them and save it")
        tokenizer.chat_template = templates["default"]
    if chat_template_kwargs is None:
        chat_template_kwargs = {"enable_thinking": False}
    tokenizer.chat_template_kwargs = chat_template_kwargs
    return tokenizer


def load_lm(path, dtype="fp32", device="cpu", trust_remote_code=False, check=True):
    """AutoModelForCausalLM, in eval mode, parameters in `dtype` (bf16, fp16 or fp32). Raises UserError:
    no model there, a package missing, or (with `check`) a family whose answers would be wrong."""
    load_config(path, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        lm, report = AutoModelForCausalLM.from_pretrained(
            path, config=without_dropout(config), dtype=DTYPES[dtype], trust_remote_code=trust_remote_code,
            output_loading_info=True)
        lm.to(device).eval()
    except Exception as error:  # torch.load's, of a file that is an LFS pointer, is a pickle error
        raise UserError(f"cannot load the model at {path}: {first_line(error)}") from None
    family = type(lm).__name__
    missing = report["missing_keys"]
    masks = re.compile(r"attn(\.attention)?\.(masked_)?bias$")  # in files of old GPT-2 and GPT-Neo models
    unused = [name for name in report["unexpected_keys"] if not masks.search(name)]
    if missing:  # transformers would make them at random
        raise UserError(f"{path} has no {min(missing)}, which {family} needs: is it a causal LM, "
                        "and are all its files there?")
    if check and unused:  # scales of FP8, biases, LoRA keys: without them it is another model
        raise UserError(f"{path} holds {min(unused)}, which {family} does not use: "
                        "--self_check false runs it all the same")
    if check:
        self_check(lm)
    parts = nn.ModuleList([decoder_of(lm), lm.get_input_embeddings(), lm.get_output_embeddings()])
    lm.requires_grad_(False)  # a vision tower gets no gradient, and DDP would wait for one
    parts.requires_grad_(True)
    return lm


def without_dropout(config):
    """Sets every dropout and jitter to 0, nested configs' too: with them a loss depends on the batch."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and re.search("drop|jitter", name):
            setattr(config, name, 0.0)
    return config


def word_embeddings(lm, most=4096):
    """What the embedding module, not its table (Gemma's scales it), gives for some words, (n, D) fp32."""
    module = lm.get_input_embeddings()
    V = module.weight.shape[0]
    ids = torch.arange(0, V, max(1, V // most), device=lm.device)
    with torch.no_grad():
        return module(ids[None])[0].float()


def embedding_rms(lm):
    """Root mean square of the LM's word embeddings: how loud a word is."""
    return word_embeddings(lm).square().mean().sqrt().item()


# ---- 2. Run: every script runs a model by decoder_states (or layer_states) and lm_logits ---------
def decoder_of(lm):
    """What stands between input embeddings and head: get_decoder(), or in it where that is all (Llama-4's text)."""
    from transformers import PreTrainedModel  # takes as long as torch, and --help needs no model
    decoder = lm.get_decoder()
    if decoder is not lm and isinstance(decoder, PreTrainedModel):
        return decoder
    return next((child for child in lm.children() if isinstance(child, PreTrainedModel)), decoder)


def decoder_layers(lm):
    """The ModuleList of layers, of which FSDP2 and --compile take one at a time. Raises UserError."""
    for module in decoder_of(lm).modules():  # from the outside in: a layer's list of experts comes later
        if isinstance(module, nn.ModuleList):
            return module
    raise UserError(f"{type(lm).__name__} has no list of layers: leave --fsdp and --compile false")


def new_cache(lm):
    """The family's empty cache: windows, recurrent states. `cache.reorder_cache(index)` keeps samples."""
    cache = DynamicCache(config=lm.config)
    for layer in cache.layers:
        if hasattr(layer, "update_recurrent_state"):
            layer.update_recurrent_state = functools.partial(set_recurrent_state, layer)
    return cache


def set_recurrent_state(layer, states, state_idx=0, **kwargs):
    """Takes the new state as it is: transformers 5.24 overwrites the old one, which a student's gradient needs."""
    layer.recurrent_states[state_idx] = states
    layer.is_recurrent_states_initialized[state_idx] = True
    return states


def decoder_states(lm, inputs_embeds, attention_mask, cache=None):
    """Last hidden states (B, T, D), after the final norm, at T new positions. attention_mask (B, past + T) covers
    what is cached as well: with T columns the new positions would not see the prompt (a defect of the released
    collector). Position ids skip what is masked: mask 0 0 1 1 1 -> ids 0 0 0 1 2."""
    return layer_states(lm, inputs_embeds, attention_mask, cache, all_layers=False)[-1]


def layer_states(lm, inputs_embeds, attention_mask, cache=None, all_layers=True):
    """The same of all layers as transformers counts them, 0 the embeddings -> a tuple of (B, T, D), which without
    all_layers holds the last ones alone. Raises UserError for a family that keeps its layers' states to itself."""
    T = inputs_embeds.shape[1]
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T)
    output = decoder_of(lm)(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                            cache=cache, use_cache=cache is not None, output_hidden_states=all_layers)
    if not all_layers:
        return (output.last_hidden_state,)
    if not output.hidden_states:
        raise UserError(f"{type(lm).__name__} does not give the states of its layers, only the last ones")
    return (*output.hidden_states[:-1], output.last_hidden_state)


class GivenStates(BaseModelOutputWithPast):
    """A decoder's output that is its last hidden states; what else it may hold (router logits) is None."""

    def __getattr__(self, name):
        return None if not name.startswith("_") else super().__getattribute__(name)


def lm_logits(lm, hidden_states):
    """Last hidden states (..., D) -> logits (..., V), fp32. Llama: `lm.lm_head(hidden_states)`. Others scale
    or cap them (Gemma-2, Cohere): so the model itself is run, while its decoder gives back these states."""
    states, decoder = hidden_states.flatten(0, -2)[None], decoder_of(lm)  # (1, N, D)
    decoder.forward = lambda *args, **kwargs: GivenStates(last_hidden_state=states)
    try:  # .forward, not a call: a hook on the model (FSDP2's, accelerate's) is meant for the whole of it
        logits = lm.forward(inputs_embeds=states, use_cache=False).logits  # (1, N, V)
    finally:
        del decoder.forward  # the class's own is seen again
    return logits[0].unflatten(0, hidden_states.shape[:-1]).float()


# ---- 3. Check ------------------------------------------------------------------------------------
def check_same(states, expected):
    """Raises ValueError unless both (1, T, D) are the same but for rounding, which in bf16 makes 1 or 2 % of a
    real model's states (shapes of batches differ), where padding that is seen makes 40 to 60 %."""
    difference = (states - expected).float().norm(dim=-1)  # (1, T)
    error = (difference / expected.float().norm(dim=-1)).mean().item()
    if not error < TOLERANCE[expected.dtype]:  # NaN is not less
        raise ValueError(f"{error:.1%} off")


def some_embeds(lm, batch, length):
    """Random ids (B, T), always the same, of the middle of the vocabulary, and their embeddings (B, T, D)."""
    words = lm.get_input_embeddings()
    V, generator = words.weight.shape[0], torch.Generator().manual_seed(0)
    ids = torch.randint(V // 4, V // 2, (batch, length), generator=generator).to(lm.device)
    return ids, words(ids)


@torch.inference_mode()
def self_check(lm):
    """Try on two short samples what the scripts do with a model. Raises UserError in one line that says
    what this one does not do. No family is named here: any that passes is as good as another."""
    what = "its decoder can be run by itself"  # what is tried now: the error says it
    try:
        ids, embeds = some_embeds(lm, 2, 25)  # (2, 25), (2, 25, D)
        mask = torch.ones_like(ids)
        mask[1, :16] = 0  # the second sample is 9 tokens long, padded on the left
        alone, embeds_alone, mask_alone = ids[1:, 16:], embeds[1:, 16:], mask[1:, 16:]
        states = decoder_of(lm)(input_ids=alone, use_cache=False).last_hidden_state  # (1, 9, D)
        what = "its embeddings and states are as wide as its config says"
        widths = {lm.config.get_text_config().hidden_size, embeds.shape[-1], states.shape[-1]}
        if len(widths) > 1:  # OPT-350m projects its embeddings
            raise ValueError(f"widths {sorted(widths)}")
        what = "its logits follow from its last hidden states"
        check_same(lm_logits(lm, states), lm(input_ids=alone, use_cache=False).logits)
        what = "it reads input embeddings as it reads ids, and others than those of words"
        between = (embeds_alone + embeds_alone.flip(1)) / 2  # (1, 9, D)
        both = decoder_states(lm, torch.cat([embeds_alone, between]), mask_alone.expand(2, -1))
        check_same(both[:1], states)
        what = "a sample padded on the left says what it says alone"
        check_same(decoder_states(lm, embeds, mask)[1:, 16:], states)
        what = "decoding with a cache gives the states of one pass"
        cache = new_cache(lm)
        decoded = [decoder_states(lm, embeds[:, :22], mask[:, :22], cache)[1:, -1:]]
        cache.reorder_cache(torch.tensor([1], device=lm.device))  # the first sample is finished
        for t in range(22, 25):
            decoded.append(decoder_states(lm, embeds[1:, t:t + 1], mask[1:, :t + 1], cache))
        check_same(torch.cat(decoded, dim=1), states[:, -4:])
        what = "training computes what evaluation does"  # noise would change with the batch
        check_same(decoder_states(lm.train(), embeds_alone, mask_alone), states)
    except Exception as error:  # whatever a family's code raises when asked for what it does not do
        name = lm.name_or_path or type(lm).__name__
        hint = "try bf16 or fp32, or " if lm.dtype == torch.float16 else ""
        raise UserError(f"{name} cannot be used, because this does not hold: {what} ({first_line(error)}): {hint}"
                        "--self_check false runs it all the same") from None
    finally:
        lm.eval()


@torch.inference_mode()
def holes_allowed(lm):
    """True if a later turn may be read into the cache while samples wait for each other: masked columns in the
    middle. False where a family counts columns (alibi, windows), keeps a state, or reads no second turn."""
    if any(getattr(layer, "is_sliding", False) for layer in new_cache(lm).layers):
        return False
    ids, embeds = some_embeds(lm, 1, 42)
    mask = torch.ones_like(ids)
    mask[0, 5:37] = 0  # a turn of 5 tokens, a hole, a turn of 3 tokens, two decoded ones
    cache, parts = new_cache(lm), []
    try:
        for start, end in ((0, 5), (5, 40), (40, 41), (41, 42)):
            parts.append(decoder_states(lm, embeds[:, start:end], mask[:, :end], cache))
        whole = torch.cat([embeds[:, :5], embeds[:, 37:]], dim=1)  # (1, 10, D)
        expected = decoder_states(lm, whole, torch.ones_like(ids[:, :10]))
        check_same(torch.cat(parts, dim=1)[:, 37:], expected[:, 5:])
    except Exception:  # whatever a family raises that reads no second turn
        return False
    return True


# ---- 4. Decode -----------------------------------------------------------------------------------
def left_pad(prompts, device="cpu"):
    """Lists of ids -> input_ids, attention_mask (B, T), padding on the left, so that all end together."""
    T = max(map(len, prompts))
    ids = [[0] * (T - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def next_tokens(logits, uniforms=None):
    """The likeliest tokens, or drawn with numbers in [0, 1) by inverting the CDF: (b, V), (b,) -> (b,)."""
    if uniforms is None:
        return logits.argmax(-1)
    cdf = logits.double().softmax(-1).cumsum(-1)  # (b, V)
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=cdf.shape[1] - 1)


def uniform_numbers(seed, steps):
    """A prompt's number in [0, 1) for each step, whatever its neighbours in a batch -> (steps,) float64."""
    return torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.inference_mode()
def decode(lm, inputs_embeds, attention_mask, limits, stops, choose, keep=None, all_layers=False):
    """Write on from B prompts, padded on the left -> [{"ids", "kept", "ms", "cut"}], one for each.
    inputs_embeds (B, T, D), attention_mask (B, T). limits: most new tokens of each; a text of so many is "cut".
    stops: ids that end a text, no part of it. choose(logits (b, V), active, step) -> next ids (b,), `active` the
    b of B prompts still at it; keep(hidden_states, logits) -> (b, d): what is kept, on the CPU, of the state that
    predicts each token; hidden_states as in `layer_states`, of (b, D). Prompt [a b c], text [y1 y2]:

        read       a   b   c   y1  y2
        state              h1  h2  h3
        predicts           y1  y2  stop"""
    replies = [{"ids": [], "kept": [], "ms": 0.0, "cut": True} for _ in limits]
    active = list(range(len(limits)))
    cache = new_cache(lm)
    for step in range(max(limits)):
        start = time.perf_counter()
        layers = layer_states(lm, inputs_embeds, attention_mask, cache, all_layers)
        hidden_states = tuple(states[:, -1] for states in layers)  # of (b, D)
        logits = lm_logits(lm, hidden_states[-1])  # (b, V)
        next_ids = choose(logits, active, step)  # (b,)
        kept = keep(hidden_states, logits).cpu() if keep else None
        written = next_ids.tolist()  # now the GPU is done
        elapsed = 1000 * (time.perf_counter() - start)
        going_on = []  # places in the batch whose text is not over
        for b, n in enumerate(active):
            reply, token = replies[n], written[b]
            reply["ms"] += elapsed / len(active)
            if token in stops:
                reply["cut"] = False
                continue
            reply["ids"].append(token)
            if keep:
                reply["kept"].append(kept[b])
            if len(reply["ids"]) < limits[n]:
                going_on.append(b)
        if not going_on:
            break
        if len(going_on) < len(active):  # active [0, 2, 5], going_on [0, 2] -> active [0, 5]
            active = [active[b] for b in going_on]
            index = torch.tensor(going_on, device=lm.device)
            cache.reorder_cache(index)  # drops the others' keys and values, and recurrent states
            next_ids, attention_mask = next_ids[index], attention_mask[index]
        inputs_embeds = lm.get_input_embeddings()(next_ids[:, None])  # (b, 1, D)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # as long as the cache
    return replies

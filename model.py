"""
The method of Interlat (arXiv 2511.09149), whole: agents that talk in latent space instead of text.

A *sender* LLM thinks about a task; instead of its plan's text it hands over the last-layer hidden
states H = [h_1 ... h_L], one per plan token. An *actor* LLM takes them as input embeddings between
<bop> and <eop>, at the end of the first human turn, and then acts. Read in this order:

    1. adapter        H (L, d_s) -> a message (L, d_a) in the actor's embedding space
    2. insertion      ids and latents of some samples -> one padded batch of input embeddings
    3. losses         task, plan similarity, separation; logits only where a label is, chunk by chunk
    4. actor          LM + adapter
    5. latent sender  the student that says it in K latent steps
    6. messages       latent shards on disk
    7. Hugging Face   what we ask of a model and its tokenizer: load, template, logits, cache
"""
import datetime
import functools
import glob
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig,
                          PreTrainedTokenizerFast)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as hf_logging

from common import UserError, atomic_path, read_json, write_json

BOP, EOP = "<bop>", "<eop>"  # begin / end of plan: what stands between them is the message
ADAPTER_FORMAT = 2  # of latent_adapter.json

# ------------------------------------------------------------------------------------------------
# 1. Adapter: sender states -> actor embeddings


class AdaptiveProjection(nn.Module):
    """out = g * (r + Linear(LayerNorm(GELU(Linear(r))))), r = s * o; s, g learned scalars. (B, L, D) ->
    (B, L, D)."""

    def __init__(self, dim, scale=0.2, output_scale=0.1):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([float(scale)]))  # (1,): FSDP shards no 0-d tensors
        self.output_scale = nn.Parameter(torch.tensor([float(output_scale)]))
        self.fc_in = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.fc_out = nn.Linear(dim, dim)
        nn.init.normal_(self.fc_in.weight, std=0.02)
        nn.init.xavier_uniform_(self.fc_out.weight, gain=0.01)  # starts next to the identity
        nn.init.zeros_(self.fc_in.bias)
        nn.init.zeros_(self.fc_out.bias)

    def forward(self, hidden_states):
        r = self.scale * hidden_states
        return self.output_scale * (r + self.fc_out(self.norm(F.gelu(self.fc_in(r)))))


class HiddenStateProcessor(nn.Module):
    """The adapter (paper, section on the communication adapter): sender states -> vectors as loud as
    the actor's words.

    `output_scale` starts at (RMS of the actor's word embeddings) / scale: the LayerNorm before it gives
    RMS 1, so a message starts as loud as a word. The released code fixes 0.1, which is this for Qwen's
    table only. An adapter of your own takes L states and gives L vectors; its arguments are kept in
    latent_adapter.json."""

    def __init__(self, sender_dim, dim, num_heads=8, dropout=0.1, scale=0.2, output_scale=0.1):
        super().__init__()
        self.input_projector = nn.Linear(sender_dim, dim) if sender_dim != dim else nn.Identity()
        self.norm_in = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm_out = nn.LayerNorm(dim)
        self.projection = AdaptiveProjection(dim, scale, output_scale)

    def forward(self, hidden_states, mask):
        """hidden_states (B, L, d_s), mask (B, L) bool, True where a state is real -> (B, L, d_a)."""
        n = self.norm_in(self.input_projector(hidden_states))  # (B, L, d_a)
        # a sample without a message may attend to its padding, because attention to nothing is NaN
        padding = ~mask & mask.any(dim=1, keepdim=True)
        a, _ = self.attention(n, n, n, key_padding_mask=padding, need_weights=False)
        return self.projection(self.norm_out(n + a))


# ------------------------------------------------------------------------------------------------
# 2. Insertion: ids and latents of some samples -> one batch

def build_sample(before, after, labels, plan_ids=(), latents=None, ratio=0.0):
    """One sample: the ids `before` the message, the message, the ids `after` it; labels are those of
    `after`.

    The curriculum: the first floor(ratio * L) positions of the message carry the plan's words, the rest
    latents:

        L = 5, ratio = 0.4 -> [p1 p2 h3 h4 h5]      ratio = 0: all latents      ratio = 1: the plan as text

    The paper's order; the released code has it the other way round and never reaches ratio 0, the pure
    latent message that evaluation uses. Where sender and actor split the plan differently, each part is
    cut at its share of its length. No plan and no latents: no message.

    In the result `n_replaced` counts the states that words replace, and `latents_start` is where the
    states begin, after those words: 2 and len(before) + 2 in the example."""
    L = 0 if latents is None else len(latents)
    n_replaced = share_of(ratio, L)
    plan = list(plan_ids)[:share_of(ratio, len(plan_ids))]
    message = plan + [0] * (L - n_replaced)  # any id: latents take these places in `LatentActor.embed`
    return {"input_ids": before + message + after,
            "labels": [-100] * len(before + message) + labels,
            "latents_start": len(before) + len(plan),
            "message_length": len(message),
            "latents": latents,
            "n_replaced": n_replaced}


def share_of(ratio, length):
    """floor(ratio * length), where 0.7 * 10 may be a little more than 7 and other products a little
    less."""
    return math.floor(ratio * length + 1e-9)


def collate(samples, device="cpu", padding_side="right"):
    """Samples -> input_ids, attention_mask, labels, message_mask (B, T) and, where some sample has
    latents, latents (B, L, d_s), latents_mask (B, L) of those that are real and keep_mask (B, L) of
    those inserted."""
    batch = {"input_ids": [], "attention_mask": [], "labels": [], "message_mask": []}
    for sample in samples:
        t = len(sample["input_ids"])
        first = sample["latents_start"]
        message_mask = torch.zeros(t, dtype=torch.bool)
        if sample["latents"] is not None:
            message_mask[first:first + len(sample["latents"]) - sample["n_replaced"]] = True
        batch["input_ids"].append(torch.tensor(sample["input_ids"]))
        batch["attention_mask"].append(torch.ones(t, dtype=torch.long))
        batch["labels"].append(torch.tensor(sample["labels"]))
        batch["message_mask"].append(message_mask)
    fill = {"labels": -100}  # elsewhere 0
    batch = {name: pad_sequence(tensors, batch_first=True, padding_value=fill.get(name, 0),
                                padding_side=padding_side) for name, tensors in batch.items()}
    with_latents = [sample["latents"] for sample in samples if sample["latents"] is not None]
    if with_latents:
        none = with_latents[0][:0]  # (0, d_s): a sample without latents beside others that have some
        latents = [none if sample["latents"] is None else sample["latents"] for sample in samples]
        lengths = torch.tensor([len(states) for states in latents])[:, None]  # (B, 1)
        skips = torch.tensor([sample["n_replaced"] for sample in samples])[:, None]  # (B, 1)
        positions = torch.arange(lengths.max())  # (L,)
        batch["latents"] = pad_sequence([states.float() for states in latents], batch_first=True)
        batch["latents_mask"] = positions < lengths
        batch["keep_mask"] = (positions < lengths) & (positions >= skips)
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ------------------------------------------------------------------------------------------------
# 3. Losses, per supervised position, in nats

def supervised(hidden_states, labels):
    """The states that predict a label: token t is predicted from position t - 1, in CE and in the
    auxiliary losses.

    (B, T, D), (B, T) -> (N, D), (N,). The released code forgets this shift in the auxiliary losses."""
    next_labels = labels[:, 1:]  # (B, T - 1)
    mask = next_labels != -100
    return hidden_states[:, :-1][mask], next_labels[mask]


def kl_divergence(log_q, log_p):
    """KL(q || p). (n, V), (n, V) -> (n,)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def js_divergence(log_p, log_q):
    """Jensen-Shannon divergence, 0 <= JS <= ln 2, symmetric. (n, V), (n, V) -> (n,).

    The released code swaps the arguments of its KLs, which is neither bounded nor JS."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # the mixture (p + q) / 2
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


def plan_similarity(log_p_plan, log_p, beta=0.7, alpha=0.3):
    """L_align = beta KL(p_P || p_H) + alpha (1 - cos(p_P, p_H)) and its parts: a dict of (n,).

    KL's direction is the released code's (the paper writes it reversed); the cosine is of
    probabilities, per position (the paper: of normalised logits; released: flattened over all
    tokens)."""
    kl = kl_divergence(log_p_plan, log_p)
    cosine_distance = 1 - F.cosine_similarity(log_p_plan.exp(), log_p.exp(), dim=-1)
    return {"align": beta * kl + alpha * cosine_distance, "kl": kl, "cosine_distance": cosine_distance}


def actor_loss(logits, targets):
    """The terms of the actor's loss at n positions -> {name: (n,)}. A loss of your own is one more line
    here.

    logits: {"latent": (n, V)} of the sample with its latent message and, without gradient, "plan" with
    the plan as text and "other" with another task's message. targets: {"labels": (n,)}."""
    log_probs = {name: F.log_softmax(z, dim=-1) for name, z in logits.items()}
    log_p = log_probs["latent"]
    terms = {"task": F.nll_loss(log_p, targets["labels"], reduction="none")}
    if "plan" in log_probs:
        terms |= plan_similarity(log_probs["plan"], log_p)
    if "other" in log_probs:
        terms["sep"] = math.log(2) - js_divergence(log_p, log_probs["other"])
    return terms


def head_loss(lm, hidden_states, loss_fn, targets, chunk_logits=2**22):
    """Sum over N positions of the terms that loss_fn gives for their logits -> {name: scalar}.

    hidden_states: {name: (N, D)}, targets: {"labels": (N,), name: (N, ...)}; loss_fn gets the same dicts for n
    positions at a time, with logits (n, V), fp32, in place of states. No (N, V) is ever in memory: a
    chunk's logits are made again in the backward pass, one more product with the head. Each chunk adds
    to the whole head's gradient, so small chunks are slow, and large ones wait for memory: 2^22 logits
    were fastest on two CPU cores."""
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    n = max(1, chunk_logits // vocabulary)

    def chunk_terms(states, chunk_targets):
        logits = {}
        for name, h in states.items():
            with torch.set_grad_enabled(h.requires_grad):  # a fixed branch gives the head no gradient either
                logits[name] = lm_logits(lm, h)
        terms = loss_fn(logits, chunk_targets)
        return {name: term.sum() for name, term in terms.items()}

    totals = {}
    for start in range(0, len(targets["labels"]), n):
        states = {name: h[start:start + n] for name, h in hidden_states.items()}
        chunk_targets = {name: values[start:start + n] for name, values in targets.items()}
        terms = checkpoint(chunk_terms, states, chunk_targets, use_reentrant=False, preserve_rng_state=False)
        for name, term in terms.items():
            totals[name] = totals.get(name, 0) + term
    return totals


def adaptive_weight(ceiling, loss, scale):
    """Between ceiling / 10 and ceiling, which is reached where the (detached) loss is `scale`: a term
    that is satisfied steps back."""
    return ceiling * min(max(loss / scale, 0.1), 1.0)


# ------------------------------------------------------------------------------------------------
# 4. Actor: LM + adapter

class LatentActor(nn.Module):
    """The receiver. `lm` is any Hugging Face causal LM; `adapter` is None for the text and no-message
    baselines.

    `info` is what latent_adapter.json holds: {"message", "plan_announcement", "adapter": {arguments},
    "sender", ...}."""

    def __init__(self, lm, tokenizer, adapter=None, info=None):
        super().__init__()
        self.lm, self.tokenizer, self.adapter, self.info = lm, tokenizer, adapter, info or {}

    def embed(self, batch):
        """A batch of `collate` -> inputs_embeds (B, T, D), latents in their places."""
        inputs_embeds = self.lm.get_input_embeddings()(batch["input_ids"])  # (B, T, D)
        if "latents" in batch:
            latents = batch["latents"].to(next(self.adapter.parameters()).dtype)  # bf16 in an evaluation
            # the adapter always reads the whole message, also the states that words replace
            message = self.adapter(latents, batch["latents_mask"])  # (B, L, D)
            message = message[batch["keep_mask"]].to(inputs_embeds.dtype)  # (all inserted states, D)
            inputs_embeds = inputs_embeds.masked_scatter(batch["message_mask"].unsqueeze(-1), message)
        return inputs_embeds

    def hidden_states(self, batch):
        """Last-layer states at supervised positions -> (N, D), labels (N,)."""
        states = decoder_states(self.lm, self.embed(batch), batch["attention_mask"])  # (B, T, D)
        return supervised(states, batch["labels"])

    def forward(self, batch, plan_batch=None, other_batch=None):
        """The terms of `actor_loss`, summed over supervised positions -> {name: scalar}.

        L = L_task + w_sep (ln 2 - JS(p_H, p_N)) + w_align (beta KL(p_P || p_H) + alpha (1 - cos)),
        where H reads the latent message, P the plan as text (plan_batch), N another task's message
        (other_batch)."""
        hidden_states, labels = self.hidden_states(batch)  # (N, D), (N,)
        branches = {"latent": hidden_states}
        with torch.no_grad():
            for name, fixed in (("plan", plan_batch), ("other", other_batch)):
                if fixed is not None:
                    branches[name], _ = self.hidden_states(fixed)
        return head_loss(self.lm, branches, actor_loss, {"labels": labels})

    def save(self, directory, state_dict=None):
        """The actor directory: what save_pretrained writes, plus latent_adapter.safetensors and .json.
        `state_dict` is given where the parameters themselves are split over ranks."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        self.lm.save_pretrained(directory, state_dict=part_of(state_dict, "lm."))
        self.tokenizer.save_pretrained(directory)
        if self.adapter is not None:  # s and g are parameters: what they learned is saved, not where they started
            save_file(part_of(state_dict, "adapter."), os.path.join(directory, "latent_adapter.safetensors"))
        write_json(os.path.join(directory, "latent_adapter.json"), self.info)

    @classmethod
    def load(cls, directory, dtype="fp32", device="cpu", trust_remote_code=False, chat_template_kwargs=None,
             check=True):
        """An actor directory, or any causal LM (then without an adapter: `info` is empty). In eval mode."""
        info, adapter = read_info(directory), None
        lm = load_lm(directory, dtype, device, trust_remote_code, check)
        if chat_template_kwargs is None:
            chat_template_kwargs = info.get("chat_template_kwargs")
        tokenizer = load_tokenizer(directory, trust_remote_code, chat_template_kwargs)
        if info.get("message") == "latent":
            adapter = HiddenStateProcessor(**info["adapter"])
            load_part(adapter, os.path.join(directory, "latent_adapter.safetensors"))
            adapter.to(device, lm.dtype)
        return cls(lm, tokenizer, adapter, info).eval()


def read_info(directory):
    """latent_adapter.json of an actor, {} of a plain model. Raises UserError if it is not what `save`
    writes."""
    path = os.path.join(directory, "latent_adapter.json")
    info = read_json(path) if os.path.exists(path) else {}
    if isinstance(info, dict) and info.get("message") == "latent":
        adapter = info.get("adapter")
        if isinstance(adapter, dict) and isinstance(adapter.get("sender_dim"), int):
            return info
    elif isinstance(info, dict):
        return info
    raise UserError(f"{path} is not what train_actor.py writes today: expected 'adapter' with 'sender_dim', found "
                    f"{str(info)[:80]}: train the actor again")


def load_part(module, path):
    """Load a file of `save`: all parameters of a module but those of its `lm`. Raises UserError if they
    do not fit."""
    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
        missing = [name for name in missing if not name.startswith("lm.")]
        if missing or unexpected:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged or does not fit the model beside it: {error}: train it again") from None


def part_of(state_dict, prefix):
    """The tensors of one submodule, under the names that it gives them, on the CPU."""
    part = {}
    for name, tensor in state_dict.items():
        if name.startswith(prefix):
            part[name.removeprefix(prefix)] = tensor.cpu().contiguous()
    return part


def add_markers(tokenizer):
    """Make <bop> and <eop> single tokens -> the ids that are new (none if the tokenizer has them
    already)."""
    new = [token for token in (BOP, EOP) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([BOP, EOP], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(new)


def init_markers(lm, new_ids):
    """Give new tokens the mean of the tables, in and out; a table grows only if it must (Qwen's has
    spare places)."""
    if not new_ids:
        return
    if max(new_ids) >= lm.get_input_embeddings().weight.shape[0]:
        lm.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):  # the same one twice where they are tied
        table = module.weight.data
        table[new_ids] = table[:min(new_ids)].mean(0)


# ------------------------------------------------------------------------------------------------
# 5. Latent sender (paper, section on compression)

class LatentSender(nn.Module):
    """A student that reads the task and thinks K steps without writing: z_1 is the state at a learned
    start vector, each next input is bridge(z_k) = Linear(LayerNorm(z_k)), the Linear bias-free and
    starting at the identity."""

    def __init__(self, lm):
        super().__init__()
        words = word_embeddings(lm)  # (n, D)
        dim = words.shape[1]
        self.lm = lm
        self.start = nn.Parameter(words.mean(0))
        self.norm = nn.LayerNorm(dim)
        self.bridge = nn.Linear(dim, dim, bias=False)
        nn.init.constant_(self.norm.weight, embedding_rms(lm))  # a thought enters as loud as a word
        nn.init.eye_(self.bridge.weight)

    def forward(self, input_ids, attention_mask, steps):
        """input_ids, attention_mask (B, T), left-padded -> latents (B, steps, d_s). Gradients flow
        through all steps: the KV cache is part of the graph (so no gradient checkpointing of the
        student, which drops the cache)."""
        embeds = self.lm.get_input_embeddings()(input_ids)  # (B, T, D)
        start = self.start.to(embeds.dtype).expand(len(embeds), 1, -1)
        embeds = torch.cat([embeds, start], dim=1)  # (B, T + 1, D)
        cache, latents = new_cache(self.lm), []
        for _ in range(steps):
            attention_mask = F.pad(attention_mask, (0, 1), value=1)  # grows with the cache
            states = decoder_states(self.lm, embeds, attention_mask, cache)
            latents.append(states[:, -1:])  # (B, 1, D)
            embeds = self.bridge(self.norm(latents[-1])).to(embeds.dtype)
        return torch.cat(latents, dim=1)

    def save(self, directory, state_dict=None):
        """The student directory: what save_pretrained writes, plus latent_bridge.safetensors."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        self.lm.save_pretrained(directory, state_dict=part_of(state_dict, "lm."))
        bridge = {name: state_dict[name].cpu() for name in state_dict if not name.startswith("lm.")}
        save_file(bridge, os.path.join(directory, "latent_bridge.safetensors"))

    @classmethod
    def load(cls, directory, dtype="fp32", device="cpu", trust_remote_code=False, check=True):
        """A student directory, or any causal LM (then with an untrained bridge). In eval mode."""
        sender = cls(load_lm(directory, dtype, device, trust_remote_code, check))
        path = os.path.join(directory, "latent_bridge.safetensors")
        if os.path.exists(path):
            load_part(sender, path)
        return sender.to(device, DTYPES[dtype]).eval()


def check_student(sender):
    """Raises UserError where no gradient passes a student's steps: in decoding, Mamba's layers overwrite the
    state that it needs."""
    lm = sender.lm
    ids = torch.ones(1, 2, dtype=torch.long, device=lm.device)
    try:
        sender(ids, torch.ones_like(ids), steps=3).sum().backward()
    except RuntimeError as error:
        raise UserError(f"{lm.name_or_path or type(lm).__name__} cannot be a student: no gradient passes its "
                        f"latent steps ({first_line(error)})") from None
    sender.zero_grad()


# ------------------------------------------------------------------------------------------------
# 6. Messages on disk

def write_shard(path, latents, records, sender):
    """One self-contained safetensors file: latents {id: (L, d_s)}, records {id: {task, plan,
    plan_token_ids, ...}}, sender {model, hidden_size, ...}. Atomic: the name appears only when every
    byte is on disk."""
    metadata = {"records": json.dumps(records), "sender": json.dumps(sender)}
    tensors = {task_id: states.contiguous() for task_id, states in latents.items()}
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:  # save_file's temporary name would stay after a kill
            file.write(save(tensors, metadata))


class LatentShards:
    """The messages of a directory, by task id. Only headers are read up front; shards[id] maps one
    message, (L, d_s).

    Raises UserError: no shards, a truncated or foreign file, two senders or widths, an id twice, NaN, a
    missing id."""

    def __init__(self, directory):
        self.directory = directory
        self.sender = None  # {"model", "hidden_size", ...}: one for all
        self.files = {}  # path -> opened shard
        self.shard_of, self.records, self.lengths = {}, {}, {}  # by task id
        for path in sorted(glob.glob(os.path.join(glob.escape(directory), "*.safetensors"))):
            self.add(path)

    def add(self, path):
        """Read the header of one shard. Raises UserError if it does not fit the shards before it."""
        try:
            file = safe_open(path, framework="pt")  # finds a file that was cut, or grew
            metadata = file.metadata()
            records = json.loads(metadata["records"])
            sender = json.loads(metadata["sender"])
            width = sender["hidden_size"]
            shapes = {task_id: file.get_slice(task_id).get_shape() for task_id in records}
            check_records(records)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is truncated or not a latent shard: delete it and run collect.py "
                            "again, which collects only what is missing") from None
        if self.sender is None:
            self.sender = sender
        differ = [key for key in sender | self.sender if sender.get(key) != self.sender.get(key)]
        if differ:
            raise UserError(f"{self.directory} mixes senders: {os.path.basename(path)} differs from the first "
                            f"shard in {', '.join(differ)}; keep one sender per directory")
        for task_id, shape in shapes.items():
            if len(shape) != 2 or shape[1] != width:
                raise UserError(f"{path}: id {task_id}: expected a tensor (L, {width}), found {shape}: delete "
                                "the shard and collect again")
            if task_id in self.shard_of:
                raise UserError(f"{path}: id {task_id} is also in {self.shard_of[task_id]}: delete one of them")
            self.shard_of[task_id] = path
            self.lengths[task_id] = shape[0]
        self.records |= records
        self.files[path] = file

    @property
    def hidden_size(self):
        return self.sender["hidden_size"]

    def __len__(self):
        return len(self.shard_of)

    def __contains__(self, task_id):
        return task_id in self.shard_of

    def __getitem__(self, task_id):
        """The message of one task, (L, d_s) in the stored dtype. Raises UserError for an unknown id and
        for NaN."""
        if task_id not in self.shard_of:
            raise UserError(f"{self.directory} has no message for id {task_id}: run collect.py on this task first")
        path = self.shard_of[task_id]
        try:
            latents = self.files[path].get_tensor(task_id)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: id {task_id} cannot be read: {error}: delete the shard and collect "
                            f"again") from None
        if not torch.isfinite(latents).all():
            raise UserError(f"{path}: id {task_id}: NaN or infinity in the message: delete the shard and collect "
                            f"again, in bf16 or fp32 if the sender overflows fp16")
        return latents


def check_records(records):
    """Raises TypeError or KeyError where a shard's records are not those of `write_shard`."""
    for record in records.values():
        record["task"] + record["plan"] + ""
        record["plan_token_ids"] + []


def open_shards(directory):
    """LatentShards, or one line if the directory is missing or holds none."""
    if not os.path.isdir(directory):
        raise UserError(f"no directory {directory}: give the --output_dir of collect.py")
    shards = LatentShards(directory)
    if not len(shards):
        raise UserError(f"{directory} holds no latent shards: run collect.py with --output_dir {directory}")
    return shards


# ------------------------------------------------------------------------------------------------
# 7. Hugging Face: what we ask of a model and its tokenizer

hf_logging.disable_progress_bar()  # one bar per shard of weights says nothing that the scripts do not

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLOCK = datetime.datetime(2024, 7, 26)  # what a template that writes today's date always writes here


def first_line(error):
    """What a library says, short: its first line, and the next one where that is only a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def load_config(path, trust_remote_code=False):
    """The model's (text) config, cheap: sizes are checked before any weight is read. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # a config that contradicts itself has an error class of its own
        if "trust_remote_code" in str(error):
            raise UserError(f"{path} ships code: read it, then give --trust_remote_code true") from None
        raise UserError(f"no model at {path}: {first_line(error)}") from None


def context_length(config):
    """How many positions a model reads; 2**31 where nothing bounds them. RoPE schemes that change with
    the longest sample of a batch (longrope, dynamic) are the same for all only up to their original
    length."""
    length = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    for scheme in (rope, *rope.values()):  # one scheme, or one for each type of layer
        if isinstance(scheme, dict) and scheme.get("rope_type") in ("longrope", "dynamic"):
            length = min(length, scheme.get("original_max_position_embeddings") or length)
    return length


def load_tokenizer(path, trust_remote_code=False, chat_template_kwargs=None):
    """The model's tokenizer; `chat_template_kwargs` goes into every use of its template. Raises
    UserError."""
    try:
        # a tokenizer saved without a family is loaded as it was saved: AutoTokenizer would take the
        # model's family's
        generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception for a tokenizer.json of a newer format
        if "untagged enum" in str(error):
            raise UserError(f"{path}: tokenizer.json is of a newer format: pip install -U transformers tokenizers "
                            f"({first_line(error)})") from None
        raise UserError(f"no tokenizer at {path}: {first_line(error)}") from None
    if len(tokenizer.get_vocab()) < 10:  # what transformers makes of a folder without any tokenizer file
        raise UserError(f"no tokenizer at {path}: its tokenizer.json or tokenizer.model is missing")
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its {type(tokenizer).__name__} does not say where in a text each token ends: "
                        f"convert it to a tokenizer.json")
    if chat_template_kwargs is None:
        chat_template_kwargs = {"enable_thinking": False}
    tokenizer.chat_template_kwargs = chat_template_kwargs
    return tokenizer


# A clock in a template always shows the same day, or a collection that goes on tomorrow would ask another prompt.
# Templates see no functions but those of transformers (5.24), so strftime_now is a macro that goes before them:
# https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
STOPPED_CLOCK = "{% macro strftime_now(format) %}{{ format"
for code in "aAbBcdefFHIjmMpSTxXyYZ":
    STOPPED_CLOCK += f" | replace('%{code}', '{CLOCK:%{code}}')"
STOPPED_CLOCK += " }}{% endmacro %}{{ '' }}"


def template_text(tokenizer, messages, add_generation_prompt):
    """The tokenizer's chat template, rendered. Raises UserError without a template, else whatever the
    template raises."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: use the Instruct model, or "
                        f"set tokenizer.chat_template and save it")
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = STOPPED_CLOCK + template
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt,
        date_string=f"{CLOCK:%d %b %Y}", **tokenizer.chat_template_kwargs)


def load_lm(path, dtype="fp32", device="cpu", trust_remote_code=False, check=True):
    """AutoModelForCausalLM, in eval mode, parameters in `dtype` (bf16, fp16 or fp32). Raises UserError:
    no model there, a package missing, or (with `check`) a family whose answers would be wrong."""
    config = load_config(path, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        lm, report = AutoModelForCausalLM.from_pretrained(
            path, config=without_dropout(config), dtype=DTYPES[dtype], trust_remote_code=trust_remote_code,
            output_loading_info=True)
        lm = lm.to(device).eval()
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load the model at {path}: {first_line(error)}") from None
    if report["missing_keys"]:  # transformers would make them at random
        raise UserError(f"{path} has no {min(report['missing_keys'])}, which {type(lm).__name__} needs: is it a "
                        "causal language model, and are all its files there?")
    if check:
        self_check(lm)
    return lm


def without_dropout(config):
    """Sets every dropout and jitter of the model itself to 0, nested configs too: with them a loss
    depends on how samples are batched. The adapter's dropout stays."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and re.search("drop|jitter", name):
            setattr(config, name, 0.0)
    return config


def word_embeddings(lm, most=4096):
    """What the embedding module gives for some words, evenly over the vocabulary, (n, D) fp32. The module
    and not its table: Gemma's multiplies by sqrt(D)."""
    module = lm.get_input_embeddings()
    V = module.weight.shape[0]
    ids = torch.arange(0, V, max(1, V // most), device=module.weight.device)
    with torch.no_grad():
        return module(ids[None])[0].float()


def embedding_rms(lm):
    """Root mean square of the LM's word embeddings: how loud a word is."""
    return word_embeddings(lm).pow(2).mean().sqrt().item()


# ---- input embeddings -> states -> logits: every script runs a model by decoder_states and lm_logits

def decoder_of(lm):
    """The module between the input embeddings and the output head: lm.get_decoder() but for the few
    families where that is the whole model (Llama-4's text model)."""
    from transformers import PreTrainedModel  # takes as long as torch, and --help needs no model
    decoder = lm.get_decoder()
    if decoder is not lm and isinstance(decoder, PreTrainedModel):
        return decoder
    return next((child for child in lm.children() if isinstance(child, PreTrainedModel)), decoder)


def decoder_layers(lm):
    """The ModuleList of decoder layers, whatever the family calls it: what FSDP2 and --compile take one
    at a time. Raises UserError if there is none."""
    for module in decoder_of(lm).modules():  # from the outside in: a layer's list of experts comes later
        if isinstance(module, nn.ModuleList):
            return module
    raise UserError(f"{type(lm).__name__} has no list of layers: leave --fsdp and --compile false")


def new_cache(lm):
    """The empty cache that transformers makes for the family: windows, recurrent states. When some
    samples are finished, `cache.reorder_cache(index)` keeps the others."""
    cache = DynamicCache(config=lm.config)
    for layer in cache.layers:
        if hasattr(layer, "update_recurrent_state"):
            layer.update_recurrent_state = functools.partial(set_recurrent_state, layer)
    return cache


def set_recurrent_state(layer, states, state_idx=0, **kwargs):
    """Takes the new state of a recurrent layer as it is. transformers 5.24 writes it over the old one, through
    which a student's gradient has to pass:
    https://github.com/huggingface/transformers/blob/main/src/transformers/cache_utils.py"""
    layer.recurrent_states[state_idx] = states
    layer.is_recurrent_states_initialized[state_idx] = True
    return states


def decoder_states(lm, inputs_embeds, attention_mask, cache=None):
    """Last hidden states (B, T, D), after the final norm, at T new positions.

    attention_mask (B, past + T) covers what is cached as well: with a mask of T columns the new positions
    would not see the prompt (a defect of the released collector). Position ids skip what is masked:

        attention_mask 0 0 1 1 1  ->  position_ids 0 0 0 1 2"""
    T = inputs_embeds.shape[1]
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T)
    output = decoder_of(lm)(inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                            position_ids=position_ids, cache=cache, use_cache=cache is not None)
    return output.last_hidden_state


class GivenStates(BaseModelOutputWithPast):
    """A decoder's output that is its last hidden states; what else it may hold (router logits, ...) is
    None."""

    def __getattr__(self, name):
        return None if not name.startswith("_") else super().__getattribute__(name)


def lm_logits(lm, hidden_states):
    """Last hidden states (..., D) -> logits (..., V), fp32, by the family's code after its decoder: the
    head, Gemma-2's cap, the scales of Cohere, Granite and MiniCPM3. So the model itself is run, while
    its decoder gives back these states."""
    states, decoder = hidden_states.flatten(0, -2)[None], decoder_of(lm)  # (1, N, D)
    decoder.forward = lambda *args, **kwargs: GivenStates(last_hidden_state=states)
    try:
        # .forward, not a call: a hook on the model (FSDP2's, accelerate's) is meant for the whole of it
        logits = lm.forward(inputs_embeds=states, use_cache=False).logits  # (1, N, V)
    finally:
        del decoder.forward  # the class's own is seen again
    return logits[0].unflatten(0, hidden_states.shape[:-1]).float()


# ---- can this model be used?

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}  # rounding: a tenth of it


def check_same(states, expected):
    """Raises ValueError unless both (1, T, D) are the same but for rounding, which is not the same in each
    shape of batch: in bf16 it makes 1 or 2 % of a real model's states, where padding that is seen makes
    40 to 60 %."""
    if states.shape != expected.shape:
        raise ValueError(f"shape {tuple(states.shape)} in place of {tuple(expected.shape)}")
    difference = (states - expected).float().norm(dim=-1)  # (1, T)
    error = (difference / expected.float().norm(dim=-1)).mean().item()
    if not error < TOLERANCE[expected.dtype]:  # NaN is not less
        raise ValueError(f"{error:.1%} off")


def some_embeds(lm, batch, length):
    """Random ids (B, T), always the same, from the middle of the vocabulary (few control tokens are there,
    no spare ones), and their embeddings (B, T, D)."""
    V, generator = lm.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    ids = torch.randint(V // 4, V // 2, (batch, length), generator=generator).to(lm.device)
    return ids, lm.get_input_embeddings()(ids)


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
    """True if a later turn may be read into the cache of the earlier ones while samples of a batch wait
    for each other: masked columns in the middle, which position ids skip. False where a family counts
    columns (MPT's alibi, sliding windows), keeps a recurrent state, or reads no second turn."""
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


# ---- prompts and tokens

def left_pad(prompts, device="cpu"):
    """Lists of ids -> input_ids, attention_mask (B, T), padding on the left, so that all end together."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    masks = [torch.ones_like(prompt) for prompt in ids]
    padded = [pad_sequence(tensors, batch_first=True, padding_side="left") for tensors in (ids, masks)]
    return padded[0].to(device), padded[1].to(device)


def next_tokens(logits, uniforms=None):
    """Each prompt's likeliest token, or one drawn with its number in [0, 1) by inverting the CDF, so
    that a prompt says the same beside any neighbours. (b, V), (b,) float64 -> (b,)."""
    if uniforms is None:
        return logits.argmax(-1)
    probabilities = logits.double().softmax(-1)  # (b, V)
    cdf = probabilities.cumsum(-1)
    heights = uniforms[:, None] * cdf[:, -1:]  # (b, 1)
    drawn = torch.searchsorted(cdf, heights, right=True).squeeze(1)
    return drawn.clamp(max=cdf.shape[1] - 1)

"""
The method of Interlat (arXiv 2511.09149), whole: agents that talk in latent space instead of text.

A *sender* LLM thinks about a task; instead of its plan's text it hands over the last-layer hidden
states H = [h_1 ... h_L], one per plan token. An *actor* LLM takes them as input embeddings between
<bop> and <eop>, at the end of the first human turn, and then acts. Read in this order:

    1. adapter        H (L, d_s) -> a message (L, d_a) in the actor's embedding space
    2. insertion      ids and states of some samples -> one padded batch of input embeddings
    3. losses         task, plan similarity, separation; logits only where a label is, chunk by chunk
    4. actor          LM + adapter
    5. latent sender  the student that says it in K latent steps, and what it learns from
    6. messages       states on disk
"""
import functools
import glob
import itertools
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from common import UserError, atomic_path, fingerprint, load_object, read_json, write_json
from hf import decoder_states, embedding_rms, lm_logits, load_lm, load_tokenizer, new_cache, word_embeddings

BOP, EOP = "<bop>", "<eop>"  # begin / end of plan: what stands between them is the message
LATENT = -1  # in a sample's ids: a place that a latent takes
ADAPTER_FORMAT = 3  # of latent_adapter.json
SHARD_FORMAT = 1  # of the shards
HEADER_LIMIT = 2**26  # bytes of a shard's header: above 100 MB no library opens it

# ---- 1. Adapter: sender states -> actor embeddings -----------------------------------------------


class AdaptiveProjection(nn.Module):
    """out = g * (r + Linear(LayerNorm(GELU(Linear(r))))), r = s * o; s, g learned. (B, L, D) -> (B, L, D)."""

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
    RMS 1, so a message starts as loud as a word. The released code starts at 0.1, which is right for
    word embeddings of RMS 0.02, as Qwen's are. An adapter of your own (train_actor.py --adapter
    module:Class) takes the same arguments and L states, and gives L vectors."""

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


class LinearMap(nn.Module):
    """An adapter that is not trained (--adapter none or procrustes): H W, W (d_s, d_a) at first the identity."""

    def __init__(self, sender_dim, dim, **unused):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(sender_dim, dim), requires_grad=False)

    def forward(self, hidden_states, mask):
        return hidden_states @ self.weight


# ---- 2. Insertion: ids and latents of some samples -> one batch ----------------------------------
def build_sample(before, after, labels, plan_ids=(), latents=None, ratio=0.0):
    """One sample: the ids `before` the message, the message, the ids `after` it; labels are those of
    `after` -> {"input_ids", "labels", "latents"}.

    The curriculum: the first floor(ratio * L) positions of the message carry the plan's words, the rest
    latents, whose places are marked in the ids (x is LATENT, -1):

        L = 5, ratio = 0.4      message    p1 p2 h3 h4 h5
                                input_ids  b  b  p1 p2 x  x  x  a  a       b: before, a: after
        ratio = 0: all latents; ratio = 1: the plan as text; no plan and no latents: no message

    The paper's order; the released code has it the other way round and never reaches ratio 0, the pure
    latent message that evaluation uses. Where sender and actor split the plan differently, each part is
    cut at its share of its length."""
    L = 0 if latents is None else len(latents)
    plan = list(plan_ids)[:share_of(ratio, len(plan_ids))]
    message = plan + [LATENT] * (L - share_of(ratio, L))
    return {"input_ids": before + message + after,
            "labels": [-100] * len(before + message) + labels,
            "latents": latents}


def share_of(ratio, length):
    """floor(ratio * length), where 0.7 * 10 may be a little more than 7 and other products a little less."""
    return math.floor(ratio * length + 1e-9)


def collate(samples, device="cpu", padding_side="right"):
    """Samples -> a batch {name: tensor}, padded to the longest. Of the sample above and a shorter one:

        input_ids       b  b  p1 p2 0  0  0  a  a     attention_mask  1  1  1  1  1  1  1  1  1
                        b  x  x  a  .  .  .  .  .                     1  1  1  1  0  0  0  0  0
        message_mask    0  0  0  0  1  1  1  0  0     where latents go, (B, T)
                        0  1  1  0  0  0  0  0  0
        latents         h1 h2 h3 h4 h5                (B, L, d_s), fp32; the adapter reads all real ones
                        h1 h2 .  .  .
        latents_mask    1  1  1  1  1                 real ones, (B, L)
                        1  1  0  0  0
        keep_mask       0  0  1  1  1                 of these, what is inserted
                        1  1  0  0  0

    labels (B, T) are -100 where there is nothing to learn. The last three are there if a sample has latents."""
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        batch["input_ids"].append(torch.tensor(sample["input_ids"]))
        batch["attention_mask"].append(torch.ones(len(sample["input_ids"]), dtype=torch.long))
        batch["labels"].append(torch.tensor(sample["labels"]))
    fill = {"labels": -100}  # elsewhere 0
    batch = {name: pad_sequence(tensors, batch_first=True, padding_value=fill.get(name, 0),
                                padding_side=padding_side) for name, tensors in batch.items()}
    batch["message_mask"] = batch["input_ids"] == LATENT
    batch["input_ids"] = batch["input_ids"].clamp(min=0)  # any id: latents take these places
    with_latents = [sample["latents"] for sample in samples if sample["latents"] is not None]
    if with_latents:
        nothing = with_latents[0][:0]  # (0, d_s): a sample without latents beside others that have some
        latents = [nothing if sample["latents"] is None else sample["latents"] for sample in samples]
        lengths = torch.tensor([len(states) for states in latents])[:, None]  # (B, 1)
        n_inserted = batch["message_mask"].sum(1, keepdim=True)  # (B, 1): the last ones of each message
        positions = torch.arange(lengths.max())  # (L,)
        batch["latents"] = pad_sequence([states.float() for states in latents], batch_first=True)
        batch["latents_mask"] = positions < lengths
        batch["keep_mask"] = (positions < lengths) & (positions >= lengths - n_inserted)
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ---- 3. Losses, per supervised position, in nats -------------------------------------------------
def supervised(hidden_states, labels):
    """The states that predict a label: token t from position t - 1, in CE and in the auxiliary losses.

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

    KL's direction is the released code's (the paper writes it reversed); the cosine is of probabilities, per
    position (the paper: of normalised logits; released: flattened over all tokens)."""
    kl = kl_divergence(log_p_plan, log_p)
    cosine_distance = 1 - F.cosine_similarity(log_p_plan.exp(), log_p.exp(), dim=-1)
    return {"align": beta * kl + alpha * cosine_distance, "kl": kl, "cosine_distance": cosine_distance}


def actor_loss(logits, targets):
    """The terms of the actor's loss at n positions -> {name: (n,)}. A term of your own is one more line
    here, and one in train_actor.py, where it gets its weight.

    logits: {"sample": (n, V)} of the sample with its message and, without gradient, "plan" with the plan
    as text and "other" with another task's message. targets: {"labels": (n,)}."""
    log_probs = {name: F.log_softmax(z, dim=-1) for name, z in logits.items()}
    log_p = log_probs["sample"]
    terms = {"task": F.nll_loss(log_p, targets["labels"], reduction="none")}
    if "plan" in log_probs:
        terms |= plan_similarity(log_probs["plan"], log_p)
    if "other" in log_probs:
        terms["sep"] = math.log(2) - js_divergence(log_p, log_probs["other"])
    return terms


def head_loss(lm, hidden_states, loss_fn, targets, chunk_logits=2**22):
    """Sum over N positions of the terms that loss_fn gives for their logits -> {name: scalar}.

    hidden_states: {name: (N, D)}, targets: {"labels": (N,), name: (N, ...)}; loss_fn gets the same dicts for n
    positions at a time, with logits (n, V), fp32, in place of states. No (N, V) is ever in memory: a chunk's logits
    are made again in the backward pass, one more product with the head. Each chunk adds to the whole head's gradient,
    so small chunks are slow, and large ones wait for memory: 2^22 logits were fastest on two CPU cores."""
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


# ---- 4. Actor: LM + adapter ----------------------------------------------------------------------
class LatentActor(nn.Module):
    """The receiver. `lm` is any Hugging Face causal LM; `adapter` is None for the baselines of text and no message.

    `info` is what latent_adapter.json holds: {"kind", "plan_announcement", "sender": settings of the
    messages that it learned, "adapter": {"class", "arguments"}, ...}."""

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
        where H reads the message, P the plan as text (plan_batch), N another task's message (other_batch)."""
        hidden_states, labels = self.hidden_states(batch)  # (N, D), (N,)
        branches = {"sample": hidden_states}
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
        if info.get("kind") == "latent":
            adapter = make_adapter(info["adapter"])
            load_part(adapter, os.path.join(directory, "latent_adapter.safetensors"))
            adapter.to(device, lm.dtype)
        return cls(lm, tokenizer, adapter, info).eval()


def make_adapter(spec):
    """latent_adapter.json's {"class": "module:Class", "arguments"} -> an adapter that has learned nothing."""
    return load_object(spec["class"], "--adapter")(**spec["arguments"])


def read_info(directory):
    """latent_adapter.json of an actor, {} of a plain model. Raises UserError if it is of another format."""
    path = os.path.join(directory, "latent_adapter.json")
    if not os.path.exists(path):
        return {}
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format_version") != ADAPTER_FORMAT:
        raise UserError(f"{path} is not what train_actor.py writes today (format {ADAPTER_FORMAT}), found "
                        f"{str(info)[:80]}: train the actor again")
    return info


def check_sender(messages, actor_path):
    """Raises UserError where an actor has not learned to read such messages. messages: some of their settings,
    as in `LatentShards.sender`."""
    learned = read_info(actor_path).get("sender")
    if not learned:
        return
    if messages.get("teacher") and messages["teacher"] == fingerprint(actor_path):
        return  # a student that was trained over this very actor is its own
    who = "fingerprint" if learned.get("fingerprint") else "model"  # a hub id has a name only
    names = [who, "prompt_template", "chat_template", "chat_template_kwargs", "latent_steps", "send"]
    differ = [name for name in names if name in messages and messages[name] != learned.get(name)]
    if differ:
        raise UserError(f"{actor_path} learned to read {learned['model']}, these are messages of "
                        f"{messages['model']} (other {', '.join(differ)}): give the sender that it learned, "
                        f"or, to evaluate them on purpose, collect them and give --messages NAME=DIR")


def load_part(module, path):
    """Load a file of `save`: all parameters of a module but its lm's. Raises UserError if they do not fit."""
    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
        missing = [name for name in missing if not name.startswith("lm.")]
        if missing or unexpected:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged or does not fit the model beside it: {error}: train it again") from None


def part_of(state_dict, prefix):
    """The tensors of one submodule, under the names that it gives them, on the CPU."""
    return {name.removeprefix(prefix): tensor.cpu().contiguous()
            for name, tensor in state_dict.items() if name.startswith(prefix)}


def add_markers(tokenizer):
    """Make <bop> and <eop> single tokens -> the ids that are new (none if they are there already)."""
    new = [token for token in (BOP, EOP) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([BOP, EOP], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(new)


def init_markers(lm, new_ids):
    """Give new tokens the mean of the tables, in and out; a table grows only if it must (Qwen's need not)."""
    if not new_ids:
        return
    if max(new_ids) >= lm.get_input_embeddings().weight.shape[0]:
        lm.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):  # the same one twice where they are tied
        table = module.weight.data
        table[new_ids] = table[:min(new_ids)].mean(0)


# ---- What an adapter can learn from messages alone, without the LM (ours, not the paper's)
def word_targets(table, words):
    """What states should become: the mean embedding of the words that each stands for. table: embeddings
    (V, D); words: for N states their ids, [[7], [8, 9], ...] -> (N, D)."""
    return torch.stack([table[ids].mean(0) for ids in words])


def warmup_loss(vectors, targets):
    """Squared error of an adapter's vectors (N, D) against `word_targets`, over the words' mean square."""
    return F.mse_loss(vectors, targets) / targets.square().mean()


def nearness(vectors, words, table):
    """How near vectors (N, D) are to their words -> (share whose nearest word is right, mean cosine)."""
    table_T = F.normalize(table).T  # (D, V)
    nearest = []
    for part in F.normalize(vectors).split(256):  # no (N, V) is ever in memory
        nearest += (part @ table_T).argmax(-1).tolist()
    right = [token in ids for token, ids in zip(nearest, words)]
    targets = word_targets(table, words)  # (N, D)
    cosine = F.cosine_similarity(vectors, targets)
    return sum(right) / len(right), cosine.mean().item()


def procrustes(states, targets):
    """The rotation and scale that bring states (N, d_s) nearest to their words (N, d_a) -> (d_s, d_a)."""
    U, _, Vh = torch.linalg.svd(states.T @ targets, full_matrices=False)
    rotation = U @ Vh
    rotated = states @ rotation
    scale = (rotated * targets).sum() / rotated.square().sum()
    return scale * rotation


# ---- 5. Latent sender (paper, section on compression) --------------------------------------------
class LatentSender(nn.Module):
    """A student that reads the task and thinks K steps without writing: z_1 is the state at a learned start vector,
    each next input is bridge(z_k) = Linear(LayerNorm(z_k)), the Linear bias-free and starting at the identity."""

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
        """input_ids, attention_mask (B, T), left-padded -> latents (B, steps, d_s). Gradients flow through all steps:
        the KV cache is part of the graph (so no gradient checkpointing of the student, which drops the cache)."""
        embeds = self.lm.get_input_embeddings()(input_ids)  # (B, T, D)
        start = self.start.to(embeds.dtype).expand(len(embeds), 1, -1)
        embeds = torch.cat([embeds, start], dim=1)  # (B, T + 1, D)
        cache, latents = new_cache(self.lm), []
        for _ in range(steps):
            attention_mask = F.pad(attention_mask, (0, 1), value=1)  # grows with the cache
            states = decoder_states(self.lm, embeds, attention_mask, cache)
            latents.append(states[:, -1:])  # (B, 1, D)
            embeds = self.bridge(self.norm(latents[-1].to(self.start.dtype))).to(embeds)
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
        return sender.to(device).eval()  # no dtype: it would round the fp32 frequencies of RoPE, too


def entropy(lm, hidden_states, chunk_logits=2**22):
    """Entropy of the next token at each position, in nats. (N, D) -> (N,); no (N, V) is ever in memory."""
    n = max(1, chunk_logits // lm.get_input_embeddings().weight.shape[0])
    chunks = []
    for chunk in hidden_states.split(n):
        log_p = F.log_softmax(lm_logits(lm, chunk), dim=-1)  # (n, V)
        chunks.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(chunks)


def kl_weights(entropy_silent, entropy_data, owner):
    """How much surer the data message makes the actor at each position. (N,), (N,), owner (N,) -> (N,).

    w_t = max(Ent_B - Ent_D, 0), clipped at the 0.95 quantile of its sample, so that no position takes it
    all, and divided by its sample's sum, so that it does not matter which samples share a batch.
    owner: the sample of each position."""
    weights = (entropy_silent - entropy_data).clamp(min=0)
    for b in owner.unique():
        w = weights[owner == b]
        w = w.clamp(max=torch.quantile(w, 0.95))
        weights[owner == b] = w / w.sum().clamp(min=1e-12)  # 0 where the message helps nowhere
    return weights


def compression_loss(logits, targets, temperature):
    """CE and the weighted KL at n positions -> {name: (n,)}.

    logits: {"student": (n, V), "data": (n, V)} of the actor with the student's and with the full message;
    targets: {"labels": (n,), "weights": (n,)}. T^2 keeps the gradient's size whatever the temperature."""
    task = F.cross_entropy(logits["student"], targets["labels"], reduction="none")
    log_q = F.log_softmax(logits["data"] / temperature, dim=-1)  # (n, V)
    log_p = F.log_softmax(logits["student"] / temperature, dim=-1)
    return {"task": task, "kl": temperature**2 * targets["weights"] * kl_divergence(log_q, log_p)}


def pooled_message(actor, batch):
    """Mean of the vectors that the adapter makes of each message: (B, D), fp32."""
    dtype = next(actor.adapter.parameters()).dtype  # bf16 on CUDA
    latents = batch["latents"].to(dtype)  # (B, L, d_s)
    vectors = actor.adapter(latents, batch["latents_mask"]).float()  # (B, L, D)
    mask = batch["latents_mask"].unsqueeze(-1)
    return (vectors * mask).sum(1) / mask.sum(1)


def compression_terms(actor, batch, data_batch, silent_batch, temperature):
    """The three terms of the loss -> {"task": summed over labels, "kl" and "align": summed over samples}. The
    actor reads batch, whose latents carry the gradient, the full message and none; it is frozen."""
    # labels [[-100 -100 7 8] [-100 9 -100 -100]] -> owner [0 0 1], the sample of each position
    owner = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]  # (N,)
    with torch.no_grad():
        data_states, _ = actor.hidden_states(data_batch)  # (N, D)
        silent_states, _ = actor.hidden_states(silent_batch)
        weights = kl_weights(entropy(actor.lm, silent_states), entropy(actor.lm, data_states), owner)
        pooled_data = pooled_message(actor, data_batch)  # (B, D)
    hidden_states, labels = actor.hidden_states(batch)
    loss_fn = functools.partial(compression_loss, temperature=temperature)
    terms = head_loss(actor.lm, {"student": hidden_states, "data": data_states}, loss_fn,
                      {"labels": labels, "weights": weights})
    cosine = F.cosine_similarity(pooled_message(actor, batch), pooled_data, dim=-1)  # (B,)
    return {**terms, "align": (1 - cosine).sum()}


# ---- 6. Messages on disk -------------------------------------------------------------------------
def make_record(task, plan="", plan_token_ids=(), ms=0.0, token_ends=()):
    """What a shard keeps of a message beside its states. token_ends: where in the plan's text each of its
    tokens ends."""
    record = {
        "task": task["task"],
        "plan": plan,
        "plan_token_ids": list(plan_token_ids),
        "token_ends": list(token_ends),
        "sender_ms": round(ms, 3),
    }
    return record | {label: task[label] for label in ("type", "level") if label in task}


def header_bytes(task_id, record):
    """About how much a message adds to its shard's header, where JSON stands inside JSON."""
    return 2 * len(json.dumps({task_id: record})) + 100


def free_name(directory, rank=0):
    """The first shard name that a rank has not used: latents-rank00000-00000.safetensors, ..."""
    for number in itertools.count():
        path = os.path.join(directory, f"latents-rank{rank:05d}-{number:05d}.safetensors")
        if not os.path.exists(path):
            return path


def write_shard(path, latents, records, sender):
    """One self-contained safetensors file: latents {id: (L, d_s)}, records {id: what `make_record` gives},
    sender {model, hidden_size, ...}. Atomic: the name appears only when every byte is on disk."""
    metadata = {"records": json.dumps(records), "sender": json.dumps(sender)}
    tensors = {task_id: states.contiguous() for task_id, states in latents.items()}
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:  # save_file's temporary name would stay after a kill
            file.write(save(tensors, metadata))


class LatentShards:
    """The messages of a directory, by task id. Only headers are read up front; shards[id] maps one message,
    (L, d_s). Raises UserError for a truncated or foreign file, two senders or widths, an id twice."""

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
            for record in records.values():  # TypeError or KeyError where `write_shard` has not written it
                record["task"] + record["plan"] + ""
                record["plan_token_ids"] + []
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is truncated or not a latent shard: if collect.py wrote it, delete it "
                            "and run that again, which collects only what is missing") from None
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
        """The message of one task, (L, d_s) in the stored dtype. Raises UserError for an unknown id and NaN."""
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


def open_shards(directory):
    """LatentShards, or one line if the directory is missing or holds none."""
    if not os.path.isdir(directory):
        raise UserError(f"no directory {directory}: give the --output_dir of collect.py")
    shards = LatentShards(directory)
    if not len(shards):
        raise UserError(f"{directory} holds no latent shards: run collect.py with --output_dir {directory}")
    return shards

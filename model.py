"""
The method of Interlat (arXiv 2511.09149), whole: agents that talk in latent space instead of text.

A *sender* LLM thinks about a task; instead of its plan's text it hands over the last-layer hidden states
H = [h_1 ... h_L], one per plan token. An *actor* LLM takes them as input embeddings between <bop> and <eop>, at the
end of the first human turn, and then acts. Read in this order:

    1. prompts      one function builds the token ids for training and for evaluation
    2. adapter      H (L, d_s) -> message rows in the actor's embedding space (L, d_a)
    3. insertion    rows of ids and latents -> one padded batch of input embeddings
    4. losses       task, plan similarity, separation; logits only where a label is, chunk by chunk
    5. actor        LM + adapter
    6. sender       the student that says it in K latent steps
    7. messages     latent shards on disk
"""
import contextlib
import gc
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from common import UserError, atomic_path, is_text, read_json, remove, write_json
from lm import DTYPES, load_lm, load_tokenizer, scale_logits, template_text

BOP, EOP = "<bop>", "<eop>"  # begin / end of plan: what stands between them is the message
PLAN_ANNOUNCEMENT = "Another agent has thought about this task. Its plan:"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Prompts: conversations -> token ids and labels

ROLES = {"human": "user", "user": "user", "system": "system", "gpt": "assistant", "assistant": "assistant"}


def to_messages(conversations, task_turn=0, where="conversation"):
    """[{"from", "value"}] -> [{"role", "content"}]. task_turn t > 0 folds turns 0 and t into the first human turn and
    drops what lies between (ETO's files open with instruction, "OK", task). Raises UserError naming `where`."""
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"{where}: 'conversations' must be a non-empty list of {{'from', 'value'}} turns")
    messages = []
    for turn in conversations:
        if not isinstance(turn, dict) or not is_text(turn.get("value")) or not (
                isinstance(turn.get("from"), str) and turn["from"] in ROLES):
            raise UserError(f"{where}: each turn needs 'from' (one of {', '.join(ROLES)}) and a text 'value', "
                            f"found {str(turn)[:80]}")
        # many templates trim, so everything is trimmed: training and evaluation then agree under any template
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"].strip()})
    if task_turn:
        if len(messages) <= task_turn:
            raise UserError(f"{where}: --task_turn {task_turn}, but the conversation has {len(messages)} turns")
        task = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[task_turn]["content"]}
        messages = [task] + messages[task_turn + 1:]
    roles = [m["role"] for m in messages]
    if "user" not in roles or "assistant" in roles[:roles.index("user")]:
        raise UserError(f"{where}: a conversation starts with a human turn (after an optional system turn)")
    return messages


def text_ids(tokenizer, text):
    """Ids of user-supplied text: a control token spelled inside it ('<bop>', '<|im_end|>') stays plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def special_ids(tokenizer):
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def render_turn(tokenizer, messages, announcement=None, add_generation_prompt=True, where="conversation"):
    """Ids of all that follows the last assistant turn in `messages` -> (before, after), two lists of ints.

    The tokenizer's own chat template is rendered with a mark in place of each turn's text, so template and text are
    told apart exactly, whatever the template. Where the first human turn is part of the answer, the message goes
    between `before` (which then ends with the announcement and <bop>) and `after` (which starts with <eop>);
    announcement None leaves all of that out. Training and evaluation build every prompt here, turn by turn."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: use the Instruct model, or "
                        f"set tokenizer.chat_template and save it")
    roles = [m["role"] for m in messages]
    first = roles.index("user") if "user" in roles else -1
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
    marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    try:
        text = template_text(tokenizer, marked, add_generation_prompt)
    except Exception as e:  # jinja's TemplateError: roles that must alternate, no system turn allowed, ...
        raise UserError(f"{where}: the chat template refuses the turns {' '.join(roles)}: {e}") from None
    pieces = re.split("\ue000(\\d+)\ue001", text)  # template, turn number, template, turn number, ..., template
    turns = [int(n) for n in pieces[1::2]]
    start = turns.index(last) + 1 if last in turns else 0
    if sorted(turns[start:]) != list(range(last + 1, len(roles))):
        raise UserError(f"{where}: the chat template drops or repeats a turn ({' '.join(roles)})")
    before, after = [], []
    ids = before if first > last else after
    ids += tokenizer(pieces[2 * start], add_special_tokens=False).input_ids
    for n in range(start, len(turns)):
        content = messages[turns[n]]["content"]
        if turns[n] == first and announcement is not None:
            ids += text_ids(tokenizer, f"{content}\n{announcement}") + [tokenizer.convert_tokens_to_ids(BOP)]
            after.append(tokenizer.convert_tokens_to_ids(EOP))
        else:
            ids += text_ids(tokenizer, content)
        if turns[n] == first:
            ids = after
        ids += tokenizer(pieces[2 * n + 2], add_special_tokens=False).input_ids
    return before, after


def end_of_turn(tokenizer):
    """Ids with which the template closes an assistant turn, up to its first special token (ChatML: <|im_end|>)."""
    turn = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
    ids, special = render_turn(tokenizer, turn, add_generation_prompt=False)[1], special_ids(tokenizer)
    for n, token in enumerate(ids):
        if token in special:
            return ids[:n + 1]
    raise UserError(f"the chat template of {tokenizer.name_or_path} ends assistant turns without a special token, so "
                    f"a reply would never end: use a template that writes the end-of-turn token")


def reply_lead(tokenizer):
    """What a template writes between its generation prompt and a reply: a space in Mistral's, mostly nothing."""
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "\ue000"}]
    prompt, whole = template_text(tokenizer, turns[:1], True), template_text(tokenizer, turns, False)
    return whole[len(prompt):whole.index("\ue000")] if whole.startswith(prompt) else ""


def encode_conversation(tokenizer, messages, announcement=None, where="conversation"):
    """A training row -> (before, after, labels): the message goes between `before` and `after`; labels (for `after`)
    are the ids of every assistant token including its end of turn, -100 elsewhere. No label ever lies in `before`."""
    before, after, labels = [], [], []
    eot, lead = end_of_turn(tokenizer), reply_lead(tokenizer)
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head, tail = render_turn(tokenizer, messages[:k], announcement, where=where)
        reply = text_ids(tokenizer, lead + message["content"])
        n_eot = len(eot) if labels else 0  # a later prompt opens with the end of the reply before it
        before += head
        labels += tail[:n_eot] + [-100] * (len(tail) - n_eot) + reply
        after += tail + reply
    if not labels:
        raise UserError(f"{where}: no assistant turn, nothing to learn from")
    return before, after + eot, labels + eot


def plan_ids_for(tokenizer, plan, plan_token_ids):
    """Ids of the plan in this tokenizer: the sender's own ids where both share a vocabulary, else the text's."""
    if plan_token_ids and max(plan_token_ids) < len(tokenizer):
        if tokenizer.decode(plan_token_ids, skip_special_tokens=True).strip() == plan.strip():
            return list(plan_token_ids)
    return text_ids(tokenizer, plan)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Adapter: sender states -> actor embeddings

class AdaptiveProjection(nn.Module):
    """out = g * (r + Linear(LayerNorm(GELU(Linear(r))))), r = s * o; s, g learned scalars. (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, scale=0.2, output_scale=0.1):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([float(scale)]))  # (1,): FSDP shards no 0-d tensors
        self.output_scale = nn.Parameter(torch.tensor([float(output_scale)]))
        self.fc_in, self.norm, self.fc_out = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Linear(dim, dim)
        nn.init.normal_(self.fc_in.weight, std=0.02)
        nn.init.xavier_uniform_(self.fc_out.weight, gain=0.01)  # starts next to the identity
        nn.init.zeros_(self.fc_in.bias)
        nn.init.zeros_(self.fc_out.bias)

    def forward(self, hidden_states):
        r = self.scale * hidden_states
        return self.output_scale * (r + self.fc_out(self.norm(F.gelu(self.fc_in(r)))))


class HiddenStateProcessor(nn.Module):
    """The adapter: raw sender states (B, L, d_s) -> message rows (B, L, d_a) of the size of the actor's embeddings.

    `output_scale` starts at (RMS of the actor's token embeddings) / scale: the LayerNorm before it gives RMS 1, so a
    message starts as loud as a word. The paper's code fixes 0.1, which is this for Qwen's table only."""

    def __init__(self, sender_dim, dim, num_heads=8, dropout=0.1, scale=0.2, output_scale=0.1):
        super().__init__()
        self.input_projector = nn.Linear(sender_dim, dim) if sender_dim != dim else nn.Identity()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.projection = AdaptiveProjection(dim, scale, output_scale)

    def forward(self, hidden_states, mask):
        """hidden_states (B, L, d_s), mask (B, L) bool, True where a row is real. Padding is never attended to."""
        n = self.norm_in(self.input_projector(hidden_states))  # (B, L, D)
        empty = ~mask.any(dim=1, keepdim=True)  # a message of no rows: attend to padding rather than to nothing (NaN)
        a, _ = self.attention(n, n, n, key_padding_mask=~(mask | empty), need_weights=False)
        return self.projection(self.norm_out(n + a))


def embedding_rms(lm):
    """Root mean square of the LM's token-embedding table."""
    return lm.get_input_embeddings().weight.detach().float().pow(2).mean().sqrt().item()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Insertion: ids and latents -> one batch

def assemble(before, after, labels, plan_ids=(), latents=None, tenths=0):
    """One row. The first floor(r*L) positions of the message carry the plan's tokens, the rest latents, r = tenths/10.

    Paper: plan prefix, latent suffix, r in {0, ..., 1}; the released code has them swapped and never reaches r = 0,
    the pure latent message that evaluation uses. Sender and actor may tokenize the plan differently, so each part is
    cut at r of its own length. r = 1 is the text message; no plan and no latents: no message."""
    length = 0 if latents is None else len(latents)
    plan = list(plan_ids[:tenths * len(plan_ids) // 10])
    skip = tenths * length // 10
    return {"input_ids": before + plan + [0] * (length - skip) + after,  # the 0s are overwritten by latents
            "labels": [-100] * (len(before) + len(plan) + length - skip) + labels,
            "start": len(before) + len(plan), "skip": skip, "latents": latents}


def collate(rows, device="cpu"):
    """Rows of `assemble` -> a right-padded batch: input_ids, attention_mask, labels, message_mask (B, T) and, where a
    row has latents, latents (B, L, d_s) with latents_mask (B, L) and keep_mask (B, L), the latents that are used."""
    B, T = len(rows), max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.zeros(B, T, dtype=torch.long), "labels": torch.full((B, T), -100),
             "attention_mask": torch.zeros(B, T, dtype=torch.long), "message_mask": torch.zeros(B, T, dtype=torch.bool)}
    for b, row in enumerate(rows):
        t = len(row["input_ids"])
        batch["input_ids"][b, :t] = torch.tensor(row["input_ids"])
        batch["labels"][b, :t] = torch.tensor(row["labels"])
        batch["attention_mask"][b, :t] = 1
    lengths = [0 if row["latents"] is None else len(row["latents"]) for row in rows]
    if max(lengths) > 0:
        dim = next(row["latents"].shape[1] for row in rows if row["latents"] is not None)
        batch["latents"] = torch.zeros(B, max(lengths), dim)
        batch["latents_mask"] = torch.zeros(B, max(lengths), dtype=torch.bool)
        batch["keep_mask"] = torch.zeros(B, max(lengths), dtype=torch.bool)
        for b, (row, length) in enumerate(zip(rows, lengths)):
            if length:
                batch["latents"][b, :length] = row["latents"].float()
                batch["latents_mask"][b, :length] = True
                batch["keep_mask"][b, row["skip"]:length] = True
                batch["message_mask"][b, row["start"]:row["start"] + length - row["skip"]] = True
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Losses, per supervised position in nats, each with its gradient in the logits z of log_p = log_softmax(z), written
# out: over a vocabulary of 152k, autograd would move more (N, V) temporaries than the products with the head cost

def cross_entropy(log_p, labels):
    """CE and dCE/dz = p - onehot(label). (N, V) fp32, (N,) -> (N,), (N, V)."""
    grad, labels = log_p.exp(), labels[:, None]
    grad.scatter_add_(1, labels, -torch.ones_like(labels, dtype=grad.dtype))
    return -log_p.gather(1, labels).squeeze(1), grad


def kl_divergence(log_q, log_p):
    """KL(q || p) and dKL/dz = p - q. (N, V), (N, V) -> (N,), (N, V)."""
    q = log_q.exp()
    return torch.linalg.vecdot(q, log_q - log_p), log_p.exp() - q


def js_divergence(log_p, log_q):
    """Jensen-Shannon divergence, 0 <= JS <= ln 2, symmetric, and dJS/dz = p/2 (log(p/m) - KL(p || m)) with the mixture
    m = (p + q) / 2. (N, V), (N, V) -> (N,), (N, V). The released code swaps KL's arguments: not bounded, not JS."""
    p, log_ratio = log_p.exp(), log_q - log_p
    s = F.softplus(log_ratio)  # log(p/m) = ln 2 - s, log(q/m) = ln 2 - s + log_ratio
    p_s = torch.linalg.vecdot(p, s)  # (N,), ln 2 - KL(p || m)
    q_s = torch.linalg.vecdot(log_q.exp(), s - log_ratio)
    return math.log(2) - (p_s + q_s) / 2, s.sub_(p_s[:, None]).mul_(p).mul_(-0.5)


def plan_similarity(log_p_plan, log_p, beta=0.7, alpha=0.3):
    """L_align = beta KL(p_P || p_H) + alpha (1 - cos(p_P, p_H)), KL, 1 - cos, and dL_align/dz. The direction of KL is
    the released code's (the paper writes it reversed); the cosine is of probabilities, per position."""
    p_plan, p, dot = log_p_plan.exp(), log_p.exp(), torch.linalg.vecdot
    kl, sq = dot(p_plan, log_p_plan - log_p), dot(p, p)
    norm = (dot(p_plan, p_plan) * sq).sqrt()
    cosine = dot(p_plan, p) / norm  # d cos/dz = p (p_plan / norm - cos p / |p|^2): the bracket's mean under p is 0
    grad = (p * (cosine / sq)[:, None]).sub_(p_plan / norm[:, None]).mul_(p).mul_(alpha)
    return beta * kl + alpha * (1 - cosine), kl, 1 - cosine, grad.add_(p.sub_(p_plan), alpha=beta)


def adaptive_weight(ceiling, loss, scale):
    """Between ceiling / 10 and ceiling, growing with the (detached) loss: a term that is satisfied steps back."""
    return ceiling * min(max(loss / scale, 0.1), 1.0)


# On a CPU: glibc keeps free memory up to twice the largest block it was given back (of at most 32 MB) and returns other
# pages, and touching new ones takes longer than the loss of a few rows. So a large block, never touched, is freed first
torch.empty(31 * 2**20, dtype=torch.uint8)


class ChunkedHeadLoss(torch.autograd.Function):
    """Sum of a loss over N positions through the output head, without ever holding (N, V).

    A chunk's logits live only inside the loop, where their gradient takes their place and becomes d loss / d hidden and
    d loss / d weight at once: to recompute them in the backward pass would cost one more product with the head per
    branch. A product takes a whole chunk of all branches, because it reads all of the head; the loss, more memory
    traffic than arithmetic, takes a few rows at a time, which stay in the CPU's cache."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, config, loss_fn, fixed_states, chunk, block, dtype):
        grad_hidden, grad_weight, grad_bias = (torch.zeros_like(x) if needed else None for x, needed in zip(
            (hidden_states, weight, bias), ctx.needs_input_grad))
        needs, total, stats = any(ctx.needs_input_grad[:3]), 0.0, 0.0
        head = weight.to(dtype)  # once, not for each product
        branches = torch.stack([hidden_states, *fixed_states.values()]).to(dtype)  # (1 + fixed, N, D)
        # on a CPU every chunk writes to the same memory: touching new pages costs as much as the product itself
        room = None if head.is_cuda else branches.new_empty(len(branches) * min(chunk, len(hidden_states)), len(head))
        for i in range(0, len(hidden_states), chunk):
            h = branches[:, i:i + chunk].flatten(0, 1)  # (branches n, D)
            logits = torch.mm(h, head.T, out=None if room is None else room[:len(h)])
            logits = (logits if bias is None else logits.add_(bias)).unflatten(0, (len(branches), -1))
            grad, h = logits[0], branches[0, i:i + chunk]  # (n, V), (n, D)
            for j in range(0, len(h), block):
                part = slice(j, min(j + block, len(h)))
                fixed = {name: scale_logits(config, z[part].float()) for name, z in zip(fixed_states, logits[1:])}
                with torch.enable_grad():  # it is off in here, and some families have a last touch for logits
                    leaf = grad[part].detach().requires_grad_(needs)
                    z = scale_logits(config, leaf.float())
                loss, values, grad_z = loss_fn(z.detach(), slice(i + part.start, i + part.stop), **fixed)
                if needs:
                    grad[part], = torch.autograd.grad(z, leaf, grad_z)
                total, stats = total + loss, stats + values
            if grad_hidden is not None:
                grad_hidden[i:i + chunk] = grad @ head
            if grad_weight is not None and dtype == weight.dtype:
                grad_weight.addmm_(grad.T, h)  # in place: the table's gradient is as large as the table
            elif grad_weight is not None:
                grad_weight += grad.T @ h  # bf16 product under autocast, fp32 sum
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(stats)
        return total, stats

    @staticmethod
    def backward(ctx, grad_total, _):
        return *(None if g is None else g * grad_total for g in ctx.saved_tensors), *[None] * 6


def head_rows(lm, log2_logits):
    """How many rows of logits (n, V) hold about 2^log2_logits numbers."""
    return max(1, 2**log2_logits // lm.get_output_embeddings().weight.shape[0])


def head_loss(lm, hidden_states, loss_fn, fixed_states=None, chunk=None, block=None):
    """Sum over positions of a loss of the logits (N, V) -> (loss, stats). hidden_states (N, D); fixed_states
    {name: (N, D)} give further logits of the same positions, without gradient.

    loss_fn(logits (n, V) fp32, slice, **fixed logits) -> summed loss, stats, d loss / d logits (n, V)."""
    head, config, kind = lm.get_output_embeddings(), lm.config.get_text_config(), hidden_states.device.type
    chunk = chunk or head_rows(lm, 26 if kind == "cuda" else 24)  # per branch 128 MB of bf16 or 64 MB of fp32
    block = block or head_rows(lm, 24 if kind == "cuda" else 19)  # each temporary of the loss: 64 MB of fp32, or 2 MB
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    inputs = [hidden_states, head.weight, getattr(head, "bias", None)]
    if not torch.is_grad_enabled():  # needs_input_grad does not know, and an evaluation would form the table's gradient
        inputs = [None if x is None else x.detach() for x in inputs]
    with torch.autocast(kind, enabled=False):  # for it a dot product is a product: the losses would be sums in bf16
        return ChunkedHeadLoss.apply(*inputs, config, loss_fn, fixed_states or {}, chunk, block, dtype)


def supervised(hidden_states, labels):
    """The states that predict a label: token t is predicted from position t-1, in CE and in the auxiliary losses
    (the released code forgets the shift in the latter). (B, T, D), (B, T) -> (N, D), (N,)."""
    mask = labels[:, 1:] != -100
    return hidden_states[:, :-1][mask], labels[:, 1:][mask]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Actor: LM + adapter

class LatentActor(nn.Module):
    """The receiver. `lm` is any Hugging Face causal LM; `adapter` is None for the text and no-message baselines.

    `info` is what latent_adapter.json holds: message kind, announcement, sender width, heads."""

    def __init__(self, lm, tokenizer, adapter=None, info=None):
        super().__init__()
        self.lm, self.tokenizer, self.adapter, self.info = lm, tokenizer, adapter, info or {}

    def embed(self, batch):
        """A batch of `collate` -> inputs_embeds (B, T, D), latents in their places."""
        inputs_embeds = self.lm.get_input_embeddings()(batch["input_ids"])
        if "latents" in batch:
            latents = batch["latents"].to(next(self.adapter.parameters()).dtype)  # bf16 in an evaluation
            message = self.adapter(latents, batch["latents_mask"])[batch["keep_mask"]]  # (rows, D)
            inputs_embeds = inputs_embeds.masked_scatter(batch["message_mask"].unsqueeze(-1),
                                                         message.to(inputs_embeds.dtype))
        return inputs_embeds

    def states(self, batch):
        """Last-layer states at supervised positions -> (N, D), labels (N,)."""
        out = self.lm.get_decoder()(inputs_embeds=self.embed(batch), attention_mask=batch["attention_mask"],
                                    use_cache=False)
        return supervised(out.last_hidden_state, batch["labels"])

    def forward(self, batch, plan_batch=None, other_batch=None, align_weight=0.0, sep_weight=0.0):
        """Summed training loss over supervised positions and its parts (5,): task, align, kl, cosine, sep.

        L = L_task + w_sep (ln 2 - JS(p_H, p_N)) + w_align (beta KL(p_P || p_H) + alpha (1 - cos)), where H reads the
        latent message, P the plan as text (plan_batch), N another task's message (other_batch). P and N carry no
        gradient. Divide by the number of labels for the mean over S."""
        hidden_states, labels = self.states(batch)  # (N, D), (N,)
        with torch.no_grad():
            fixed_states = {name: self.states(fixed)[0] for name, fixed in (
                ("plan_logits", plan_batch), ("other_logits", other_batch)) if fixed is not None}

        def loss_fn(logits, part, plan_logits=None, other_logits=None):
            log_probs = F.log_softmax(logits, dim=-1)  # (n, V)
            task, grad = cross_entropy(log_probs, labels[part])  # (n,), (n, V)
            align = kl = cosine = sep = torch.zeros_like(task)
            if plan_logits is not None:
                align, kl, cosine, grad_align = plan_similarity(F.log_softmax(plan_logits, dim=-1), log_probs)
                grad.add_(grad_align, alpha=align_weight)
            if other_logits is not None:
                js, grad_js = js_divergence(log_probs, F.log_softmax(other_logits, dim=-1))
                sep = math.log(2) - js
                grad.add_(grad_js, alpha=-sep_weight)
            terms = torch.stack([task, align, kl, cosine, sep]).sum(1)
            return terms[0] + align_weight * terms[1] + sep_weight * terms[4], terms, grad

        return head_loss(self.lm, hidden_states, loss_fn, fixed_states)

    def save(self, directory, state_dict=None):
        """The actor directory: what save_pretrained writes, plus latent_adapter.safetensors and .json. `state_dict` is
        given where the parameters themselves are split over ranks."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        self.lm.save_pretrained(directory, state_dict=part_of(state_dict, "lm."))
        self.tokenizer.save_pretrained(directory)
        if self.adapter is not None:  # s and g are parameters, so their learned values are saved, not the initial ones
            save_file(part_of(state_dict, "adapter."), os.path.join(directory, "latent_adapter.safetensors"))
        write_json(os.path.join(directory, "latent_adapter.json"), self.info)

    @classmethod
    def load(cls, directory, dtype="fp32", device="cpu", trust_remote_code=False):
        """An actor directory, or any causal LM (then without an adapter: `info` is empty). In eval mode."""
        info, adapter = read_info(directory), None
        lm, tokenizer = load_lm(directory, dtype, trust_remote_code), load_tokenizer(directory, trust_remote_code)
        if info.get("message") == "latent":
            adapter = HiddenStateProcessor(info["sender_hidden_size"], lm.get_input_embeddings().weight.shape[1],
                                           info["num_heads"])
            load_own(adapter, os.path.join(directory, "latent_adapter.safetensors"))
            adapter.to(lm.dtype)
        return cls(lm, tokenizer, adapter, info).to(device).eval()


def read_info(directory):
    """latent_adapter.json of an actor, {} of a plain model. Raises UserError if it is not what `save` writes."""
    path = os.path.join(directory, "latent_adapter.json")
    info = read_json(path) if os.path.exists(path) else {}
    sizes = ("sender_hidden_size", "num_heads")
    if not isinstance(info, dict) or info.get("message") == "latent" and not all(
            isinstance(info.get(k), int) for k in sizes):
        raise UserError(f"{path} is not what train_actor.py writes: expected {sizes}, found {str(info)[:80]}")
    return info


def load_own(module, path):
    """Load a file of `save`: all parameters of a module but those of its `lm`. Raises UserError if they do not fit."""
    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
        missing = [name for name in missing if not name.startswith("lm.")]
        if missing or unexpected:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")
    except (OSError, SafetensorError, RuntimeError, ValueError) as e:
        raise UserError(f"{path} is damaged or does not fit the model beside it: {e}: train it again") from None


def part_of(state_dict, prefix):
    """The tensors of one submodule, under its own names, on the CPU."""
    return {k[len(prefix):]: v.cpu().contiguous() for k, v in state_dict.items() if k.startswith(prefix)}


def add_markers(tokenizer):
    """Make <bop> and <eop> single tokens -> the ids that are new (none if the tokenizer has them already)."""
    new = [token for token in (BOP, EOP) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([BOP, EOP], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(new)


def init_markers(lm, new_ids):
    """Give new tokens rows at the mean of the table, in and out; it grows only if it must (Qwen's has spares)."""
    if not new_ids:
        return
    if max(new_ids) >= lm.get_input_embeddings().weight.shape[0]:
        lm.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    for table in {id(t.weight): t for t in (lm.get_input_embeddings(), lm.get_output_embeddings())}.values():
        table.weight.data[new_ids] = table.weight.data[:min(new_ids)].mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Sender in K latent steps (paper, section on compression)

class LatentSender(nn.Module):
    """A student that reads the task and thinks K steps without writing: z_1 is the state at a learned start vector,
    each next input is bridge(z_k) = Linear(LayerNorm(z_k)), the Linear bias-free and starting at the identity."""

    def __init__(self, lm):
        super().__init__()
        self.lm, dim = lm, lm.get_input_embeddings().weight.shape[1]
        self.start = nn.Parameter(lm.get_input_embeddings().weight.detach().float().mean(0))
        self.norm, self.bridge = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        nn.init.constant_(self.norm.weight, embedding_rms(lm))  # a thought enters as loud as a word
        nn.init.eye_(self.bridge.weight)

    def forward(self, input_ids, attention_mask, steps):
        """input_ids, attention_mask (B, T), left-padded -> latents (B, steps, d_s). Gradients flow through all steps:
        the KV cache is part of the graph (so no gradient checkpointing of the student, which drops the cache)."""
        # the mask grows with the cache: with a mask of length 1 the latents would see one prompt token only
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        embeds = self.lm.get_input_embeddings()(input_ids)  # (B, T, D)
        embeds = torch.cat([embeds, self.start.to(embeds.dtype).expand(len(embeds), 1, -1)], dim=1)  # (B, T + 1, D)
        cache, latents = DynamicCache(), []
        for _ in range(steps):
            out = self.lm.get_decoder()(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=True,
                                        position_ids=position_ids, cache=cache)
            latents.append(out.last_hidden_state[:, -1:])  # (B, 1, D)
            embeds = self.bridge(self.norm(latents[-1])).to(embeds.dtype)
            attention_mask, position_ids = F.pad(attention_mask, (0, 1), value=1), position_ids[:, -1:] + 1
        return torch.cat(latents, dim=1)

    def save(self, directory, state_dict=None):
        """The student directory: what save_pretrained writes, plus latent_bridge.safetensors."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        self.lm.save_pretrained(directory, state_dict=part_of(state_dict, "lm."))
        bridge = {k: v for k, v in state_dict.items() if not k.startswith("lm.")}
        save_file(part_of(bridge, ""), os.path.join(directory, "latent_bridge.safetensors"))

    @classmethod
    def load(cls, directory, dtype="fp32", device="cpu", trust_remote_code=False):
        """A student directory, or any causal LM (then with an untrained bridge). In eval mode."""
        sender = cls(load_lm(directory, dtype, trust_remote_code))
        path = os.path.join(directory, "latent_bridge.safetensors")
        if os.path.exists(path):
            load_own(sender, path)
        return sender.to(device, DTYPES[dtype]).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 7. Messages on disk

def write_shard(path, latents, records, sender):
    """One self-contained safetensors file: latents {id: (L, d_s)}, records {id: {task, plan, plan_token_ids, ...}},
    sender {model, hidden_size, ...}. Atomic: the name appears only when every byte is on disk."""
    with atomic_path(path) as temporary:
        folder = temporary + ".d"  # save_file has a temporary name of its own, which a kill would leave where it is
        os.makedirs(folder, exist_ok=True)
        try:
            save_file({k: v.contiguous() for k, v in latents.items()}, os.path.join(folder, "shard"),
                      metadata={"records": json.dumps(records), "sender": json.dumps(sender)})
            os.rename(os.path.join(folder, "shard"), temporary)
        finally:
            remove(folder)


@contextlib.contextmanager
def paused_gc():
    """The collector would walk all records again at every few thousand new ones: three times the time for a million."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.enable() if enabled else None


class LatentShards:
    """The messages of a directory, by task id. Only headers are read up front; shards[id] maps one row, (L, d_s).

    Raises UserError: no shards, a truncated or foreign file, two senders or widths, an id twice, NaN, a missing id."""

    @paused_gc()
    def __init__(self, directory):
        self.directory, self.sender, self.open = directory, None, {}
        self.shard_of, self.records, self.lengths = {}, {}, {}
        names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        for name in (n for n in names if n.endswith(".safetensors")):
            path = os.path.join(directory, name)
            header, records, sender = self.read_header(path)
            if self.sender is None:
                self.sender = sender
            elif sender != self.sender:
                differ = [k for k in {**sender, **self.sender} if sender.get(k) != self.sender.get(k)]
                raise UserError(f"{directory} mixes senders: {name} differs from the first shard in "
                                f"{', '.join(differ)}; keep one sender per directory")
            for task_id, record in records.items():
                shape = header.get(task_id, {}).get("shape")
                if not isinstance(shape, list) or len(shape) != 2 or shape[1] != sender["hidden_size"]:
                    raise UserError(f"{path}: id {task_id}: expected a tensor (L, {sender['hidden_size']}), found "
                                    f"{shape}")
                if task_id in self.shard_of:
                    raise UserError(f"{path}: id {task_id} is also in {self.shard_of[task_id]}: delete one of the "
                                    f"shards")
                self.shard_of[task_id], self.records[task_id], self.lengths[task_id] = path, record, shape[0]

    @staticmethod
    def read_header(path):
        """Header, records and sender, checked against the file's size, so that a truncated shard is found at once."""
        try:
            with open(path, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size)) if size < 2**31 else None
            records, sender = (json.loads(header["__metadata__"][k]) for k in ("records", "sender"))
            end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
            if os.path.getsize(path) != 8 + size + end or not header.keys() - {"__metadata__"} <= records.keys():
                raise ValueError
            if not all(isinstance(r["task"] + r["plan"], str) and isinstance(r["plan_token_ids"], list)
                       for r in records.values()):
                raise ValueError
            sender["hidden_size"]
            return header, records, sender
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError, OSError):
            raise UserError(f"{path} is truncated or not a latent shard: delete it and run collect.py again, which "
                            f"collects only what is missing") from None

    @property
    def hidden_size(self):
        return self.sender["hidden_size"]

    def __len__(self):
        return len(self.shard_of)

    def __contains__(self, task_id):
        return task_id in self.shard_of

    def __getitem__(self, task_id):
        """The message of one task, (L, d_s) in the stored dtype. Raises UserError for an unknown id and for NaN."""
        if task_id not in self.shard_of:
            raise UserError(f"{self.directory} has no message for id {task_id}: run collect.py on this task first")
        path = self.shard_of[task_id]
        try:
            if path not in self.open:
                self.open[path] = safe_open(path, framework="pt")
            latents = self.open[path].get_tensor(task_id)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: id {task_id} cannot be read: {e}: delete the shard and collect again") from None
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

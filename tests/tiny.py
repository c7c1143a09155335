"""Tiny random models, tokenizers with chat templates, data: made on the spot. And what a run leaves, read."""
import csv
import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from common import read_json
from data import PLAN_ANNOUNCEMENT, encode_conversation, to_turns
from hf import embedding_rms
from model import ADAPTER_FORMAT, LatentActor, add_markers, init_markers, make_adapter, write_shard
from templates import CHATML, SENTENCEPIECE, SPECIAL  # noqa: F401


def byte_level():
    """No merges: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_like(dummy_prefix):
    """Spaces are "▁", which joins the letter after it; `dummy_prefix` says when one is put before a text."""
    letters = [chr(c) for c in range(33, 127)]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *("▁" + c for c in letters)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>",
                                     merges=[("▁", c) for c in letters], byte_fallback=True, fuse_unk=True))
    if dummy_prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prefix = [normalizers.Prepend("▁")] if dummy_prefix == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make_tokenizer(template="chatml"):
    """A small tokenizer with a family's special tokens, template and BOS habit."""
    chat_template, special, eos, bos = SPECIAL[template]
    tokenizer = sentencepiece_like(SENTENCEPIECE[template]) if template in SENTENCEPIECE else byte_level()
    tokenizer.add_special_tokens(special)
    if bos:  # Llama's and Mistral's tokenizers add a BOS of their own: the classic double BOS
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    unk = "<unk>" if template in SENTENCEPIECE else None
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, unk_token=unk,
                                   pad_token=special[0])
    fast.chat_template = chat_template
    fast.chat_template_kwargs = {"enable_thinking": False}  # as load_tokenizer sets it
    return fast


def make_lm(family="qwen2", width=32, layers=2, vocab=280, tied=False, seed=0, context=4096):
    """A random causal LM of a family, initialised loudly enough that its logits differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=context,
        tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        pad_token_id=None)
    return AutoModelForCausalLM.from_config(config).eval()


def save_lm(directory, lm, tokenizer):
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def save_model(directory, family="qwen2", template="chatml", **kwargs):
    tokenizer = make_tokenizer(template)
    return save_lm(directory, make_lm(family, **{"vocab": max(280, len(tokenizer)), **kwargs}), tokenizer)


def write_tasks(path, n=6):
    tasks = [{"id": f"t{i}", "task": f"put {'a very ' * (i % 3)}old cup {i} on shelf {i * i}"}
             for i in range(n)]
    with open(path, "w") as f:
        json.dump(tasks, f)
    return tasks


def conversation(i):
    turns = []
    for k in range(1 + i % 3):
        turns += [{"from": "human", "value": f"task {i}: you see shelf {k}."},
                  {"from": "gpt", "value": "go " * (i % 4 + 1)}]
    return {"id": f"t{i}", "conversations": turns}


def write_messages(directory, latents, records, **sender):
    """A shard of messages; its sender is `tiny` but for what is given."""
    width = next(iter(latents.values())).shape[1]
    write_shard(os.path.join(directory, "latents-rank00000-00000.safetensors"), latents, records,
                {"model": "tiny", "hidden_size": width} | sender)
    return str(directory)


def make_data(directory, n=8, width=32, seed=0):
    """A train file and a directory of random messages for it -> (train.json, messages)."""
    os.makedirs(directory, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    latents = {f"t{i}": torch.randn(3 + i % 5, width, generator=generator) for i in range(n)}
    records = {k: {"task": f"task {k}", "plan": "abcdefgh"[:len(v)], "plan_token_ids": [], "sender_ms": 1.0,
                   "token_ends": list(range(1, len(v) + 1))}
               for k, v in latents.items()}
    messages = write_messages(os.path.join(directory, "messages"), latents, records)
    train = os.path.join(directory, "train.json")
    with open(train, "w") as f:
        json.dump([conversation(i) for i in range(n)], f)
    return train, messages


def make_actor(family="qwen2", template="chatml", width=32, sender_dim=32, kind="latent", seed=0, context=4096,
               tied=False):
    """A random actor with its adapter (kind "latent"), or a baseline's actor ("text", "none")."""
    lm, tokenizer = make_lm(family, width=width, seed=seed, context=context, tied=tied), make_tokenizer(template)
    adapter = None
    init_markers(lm, add_markers(tokenizer))
    info = {"kind": kind, "plan_announcement": PLAN_ANNOUNCEMENT, "format_version": ADAPTER_FORMAT}
    if kind == "latent":
        arguments = {"sender_dim": sender_dim, "dim": width, "num_heads": 4,
                     "output_scale": embedding_rms(lm) / 0.2}
        info |= {"sender": None,  # any messages of this width
                 "adapter": {"class": "model:HiddenStateProcessor", "arguments": arguments}}
        adapter = make_adapter(info["adapter"])
    return LatentActor(lm, tokenizer, adapter, info).eval()


def logits_by_hand(lm, before, message, after, labels):
    """Logits (S, V) at the supervised positions of a sample, and their labels (S,), by plain Hugging Face: one
    sample, no padding. `message`: embeddings (L, D)."""
    table, labels = lm.get_input_embeddings(), torch.tensor(labels)
    parts = [table(torch.tensor(before, dtype=torch.long)), message, table(torch.tensor(after))]
    logits = lm(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(after) - 1:-1]
    return logits[labels != -100], labels[labels != -100]


@torch.no_grad()
def loss_by_hand(actor, records, message):
    """Mean CE over the supervised tokens of conversations; message(record): the embeddings (L, D) that are read."""
    announcement = actor.info["plan_announcement"] if actor.info["kind"] != "none" else None
    total = tokens = 0
    for record in records:
        before, after, labels = encode_conversation(actor.tokenizer, to_turns(record), announcement)
        logits, labels = logits_by_hand(actor.lm, before, message(record), after, labels)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        tokens += len(labels)
    return total / tokens


def message_of(actor, latents):
    """(L, d_s) -> (L, D): one message through the adapter, no padding."""
    return actor.adapter(latents[None], torch.ones(1, len(latents), dtype=torch.bool))[0]


# ---- what a run of a trainer leaves
TIMING = {"tokens_per_s", "memory_gb", "sender_ms"}  # of no two runs the same


def argv_of(flags):
    """{"K": 3, "curriculum": [0, 1], "fsdp": None} -> ["--K", "3", "--curriculum", "0", "1"]."""
    argv = []
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def without_timing(record):
    return {name: value for name, value in record.items() if name not in TIMING}


def read_log(out):
    """The rows of loss_log.csv, without timing."""
    with open(os.path.join(out, "loss_log.csv")) as file:
        return [without_timing(row) for row in csv.DictReader(file)]


def column(out, name):
    return [float(row[name]) for row in read_log(out) if row[name]]


def assert_same_training(a, b, tolerance):
    """Two runs have the same log, the gradient's norm of each step too, and the same kept model, but for rounding."""
    for x, y in zip(read_log(a), read_log(b), strict=True):
        assert x.keys() == y.keys() and [name for name in x if x[name]] == [name for name in y if y[name]]
        for name in filter(x.get, x):
            expected = pytest.approx(float(y[name]), rel=tolerance, abs=tolerance)
            assert float(x[name]) == expected, (x["step"], name)
    torch.testing.assert_close(tensors(a), tensors(b), rtol=10 * tolerance, atol=10 * tolerance)


def tensors(directory):
    """{(file, name): tensor} of the safetensors files in a directory."""
    return {(file, name): tensor for file in sorted(os.listdir(directory)) if file.endswith(".safetensors")
            for name, tensor in load_file(os.path.join(directory, file)).items()}


def same_tensors(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(out):
    return sorted(name for name in os.listdir(out) if name.startswith("checkpoint-"))


def same_run(a, b):
    """Two output directories hold the same files, logs, weights and states, bit for bit; but for timing."""
    if sorted(os.listdir(a)) != sorted(os.listdir(b)) or read_log(a) != read_log(b):
        return False
    for name in ("", *checkpoints(b)):
        x, y = os.path.join(a, name), os.path.join(b, name)
        state = "trainer_state.json"
        if not same_tensors(x, y) or read_json(os.path.join(x, state)) != read_json(os.path.join(y, state)):
            return False
        if name:
            p, q = (torch.load(os.path.join(d, "optimizer.pt"), weights_only=True) for d in (x, y))
            # as JSON: a tuple may come back as a list
            if json.dumps(p["param_groups"]) != json.dumps(q["param_groups"]):
                return False
            p, q = p["state"], q["state"]
            if p.keys() != q.keys() or not all(torch.equal(p[n][k], q[n][k]) for n in p for k in p[n]):
                return False
    return True


def snapshot(directory):
    """{path: time of its last change} of all files."""
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    return {path: os.stat(path).st_mtime_ns for path in paths}

"""Tiny random models, tokenizers with real chat templates, and data: what the hub would give, made on the spot."""
import json
import os

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from data import PLAN_ANNOUNCEMENT
from model import (HiddenStateProcessor, LatentActor, add_markers, embedding_rms, init_markers, write_shard)

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are helpful."
          "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m['role'] }}"
          "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("<s>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
           "'roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
           "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}")
SPECIAL = {"chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None),
           "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
                      "<|begin_of_text|>"),
           "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "<s>")}


def make_tokenizer(kind="chatml"):
    """Byte-level (no merges: one token per byte), with the family's special tokens, template and BOS habit."""
    template, special, eos, bos = SPECIAL[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos:  # Llama's and Mistral's tokenizers add a BOS of their own: the classic double BOS
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=special[0])
    fast.chat_template = template
    fast.chat_template_kwargs = {"enable_thinking": False}  # as load_tokenizer sets it
    return fast


def make_lm(family="qwen2", width=32, layers=2, vocab=280, tied=False, seed=0, context=4096):
    """A random causal LM of a family, initialised loudly enough that its logits differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=context,
        tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config).eval()


def save_model(directory, family="qwen2", kind="chatml", **kwargs):
    make_lm(family, **kwargs).save_pretrained(directory)
    make_tokenizer(kind).save_pretrained(directory)
    return str(directory)


def write_tasks(path, n=6):
    tasks = [{"id": f"t{i}", "task": f"put {'a very ' * (i % 3)}old cup {i} on shelf {i * i}"} for i in range(n)]
    with open(path, "w") as f:
        json.dump(tasks, f)
    return tasks


def conversation(i):
    turns = []
    for k in range(1 + i % 3):
        turns += [{"from": "human", "value": f"task {i}: you see shelf {k}."}, {"from": "gpt", "value": "go " * (i % 4 + 1)}]
    return {"id": f"t{i}", "conversations": turns}


def make_data(directory, n=8, width=32, seed=0):
    """A train file and a directory of random messages for it -> (train.json, messages)."""
    os.makedirs(directory, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    latents = {f"t{i}": torch.randn(3 + i % 5, width, generator=generator) for i in range(n)}
    records = {k: {"task": f"task {k}", "plan": "abcdefgh"[:len(v)], "plan_token_ids": [], "sender_ms": 1.0}
               for k, v in latents.items()}
    messages = os.path.join(directory, "messages")
    write_shard(os.path.join(messages, "latents-rank00000-00000.safetensors"), latents, records,
                {"model": "tiny", "hidden_size": width})
    train = os.path.join(directory, "train.json")
    with open(train, "w") as f:
        json.dump([conversation(i) for i in range(n)], f)
    return train, messages


def make_actor(family="qwen2", kind="chatml", width=32, sender_dim=32, message="latent", seed=0, context=4096):
    """A random actor with its adapter (message "latent"), or a baseline's actor ("text", "none")."""
    lm, tokenizer, adapter = make_lm(family, width=width, seed=seed, context=context), make_tokenizer(kind), None
    init_markers(lm, add_markers(tokenizer))
    info = {"message": message, "plan_announcement": PLAN_ANNOUNCEMENT, "format_version": 2}
    if message == "latent":
        arguments = {"sender_dim": sender_dim, "dim": width, "num_heads": 4, "output_scale": embedding_rms(lm) / 0.2}
        adapter = HiddenStateProcessor(**arguments)
        info |= {"sender": "tiny", "adapter": arguments}
    return LatentActor(lm, tokenizer, adapter, info).eval()

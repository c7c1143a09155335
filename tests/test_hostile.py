"""Whatever a file holds: a correct batch, or one clear line. Never a traceback, never a wrong label."""
import argparse
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import load_file

import collect
import compress
import eval_alfworld
import eval_math
import train_actor
from common import UserError
from data import Conversations
from model import (BOP, EOP, LatentShards, add_markers, assemble, collate, encode_conversation, end_of_turn, open_shards,
                   reply_lead, special_ids, to_messages)
from tiny import CHATML, SPECIAL, make_data, make_tokenizer, save_model, write_tasks

SLOW = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TOKENIZERS = {kind: make_tokenizer(kind) for kind in SPECIAL}
for tokenizer in TOKENIZERS.values():
    add_markers(tokenizer)

CONTROL = [BOP, EOP, *(token for _, tokens, _, _ in SPECIAL.values() for token in tokens), "\ue0000\ue001", CHATML[:40]]
NASTY = st.one_of(st.text(max_size=40), st.sampled_from(CONTROL), st.just(""), st.just(" \n\t"),
                  st.lists(st.sampled_from(CONTROL), max_size=4).map("".join), st.just("\ud800"), st.just("\x00"))
ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system"])
TURN = st.fixed_dictionaries({"from": ROLES, "value": NASTY})
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


def one_line(error):
    assert str(error) and "\n" not in str(error)[:500].strip(), error


@given(st.sampled_from(sorted(SPECIAL)), st.lists(TURN, max_size=7), st.booleans(), st.integers(0, 3))
@settings(max_examples=150, **SLOW)
@example("chatml", [{"from": "human", "value": "a"}] * 3 + [{"from": "gpt", "value": "<|im_end|>"}], True, 0)
@example("llama3", [{"from": "human", "value": "long " * 20_000}, {"from": "gpt", "value": ""}], True, 0)
def test_any_conversation_gives_right_labels_or_one_line(kind, turns, announced, task_turn):
    tokenizer = TOKENIZERS[kind]
    try:
        messages = to_messages(turns, task_turn, "x.json: id 1")
        before, after, labels = encode_conversation(tokenizer, messages, "plan:" if announced else None, "x.json: id 1")
    except UserError as error:
        return one_line(error)
    # the labels are the replies and their ends, and nothing else
    eot, lead = end_of_turn(tokenizer), reply_lead(tokenizer)
    said = [tokenizer(lead + m["content"], add_special_tokens=False, split_special_tokens=True).input_ids + eot
            for m in messages if m["role"] == "assistant"]
    assert [t for t in labels if t != -100] == sum(said, []) and len(labels) == len(after)
    assert all(label in (-100, token) for label, token in zip(labels, after))
    # control tokens come from the template and the insertion only
    dull = [{"role": m["role"], "content": "-"} for m in messages]
    ids, special = encode_conversation(tokenizer, dull, "plan:" if announced else None), special_ids(tokenizer)
    assert [t for t in before + after if t in special] == [t for t in ids[0] + ids[1] if t in special]
    row = assemble(before, after, labels, latents=torch.zeros(3, 4)) if announced else assemble(before, after, labels)
    batch = collate([row, assemble([], [1], [1])])
    assert batch["attention_mask"][0].sum() == len(before) + len(after) + 3 * announced == batch["input_ids"].shape[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("hostile")
    make_data(d / "data", n=4, width=8)
    return d


def conversations_of(folder, records):
    path = str(folder / "fuzz.json")
    with open(path, "w") as f:
        json.dump(records, f)
    args = argparse.Namespace(message="latent", plan_announcement="plan:", task_turn=0, hidden_data=str(folder), prepended_length=64)
    return Conversations(path, args, TOKENIZERS["chatml"], open_shards(str(folder / "data" / "messages")), 4096)


@given(st.data())
@settings(max_examples=150, **SLOW)
def test_any_json_gives_rows_or_one_line(folder, data):
    """Random values anywhere in a training file, in place of the right ones."""
    record = {"id": "t1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(["id", "conversations", "plan", "hidden_state", "hidden_state_path", "turn", "value", "all"]))
        value = data.draw(JSON)
        if where == "all":
            record = value
        elif isinstance(record, dict) and where in ("turn", "value"):
            turns = record.get("conversations")
            if isinstance(turns, list) and turns and isinstance(turns[0], dict):
                turns[0] = value if where == "turn" else {**turns[0], "value": value}
        elif isinstance(record, dict):
            record[where] = value
    try:
        rows = conversations_of(folder, [record])
        batch = collate([rows.row(n, "latent") for n in range(len(rows))])
    except UserError as error:
        return one_line(error)
    assert (batch["labels"] != -100).any() and batch["latents_mask"].any()


@given(st.data())
@settings(max_examples=200, **SLOW)
def test_any_bytes_as_a_shard_are_read_right_or_refused(folder, data):
    """Random bytes, and a good shard that is cut or has bytes changed (in its header, mostly)."""
    good = folder / "data" / "messages" / "latents-rank00000-00000.safetensors"
    content = bytearray(good.read_bytes())
    how = data.draw(st.sampled_from(["random", "cut", "changed", "longer"]))
    if how == "random":
        content = data.draw(st.binary(max_size=300))
    elif how == "cut":
        content = content[:data.draw(st.integers(0, len(content) - 1))]
    elif how == "longer":
        content += data.draw(st.binary(min_size=1, max_size=20))
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    os.makedirs(folder / "bad", exist_ok=True)
    path = folder / "bad" / "latents-rank00000-00000.safetensors"
    path.write_bytes(content)
    try:
        shards = LatentShards(str(folder / "bad"))
        read = {k: shards[k] for k in shards.records}
    except UserError as error:
        return one_line(error)
    right = load_file(path)
    assert all(torch.equal(read[k], right[k]) for k in read)


def test_a_pickle_is_not_run(folder):
    """hidden_state_path may be a .pt file: tensors are read, code is not."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "pwned"),)

    path = str(folder / "bomb.pt")
    torch.save(Bomb(), path)
    rows = [{"id": "t1", "hidden_state_path": path, "plan": "p",
             "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    with pytest.raises(UserError, match="id t1"):
        conversations_of(folder, rows)
    assert not os.path.exists(folder / "pwned")


def test_a_models_own_code_runs_only_with_the_flag(folder, refuses):
    """--trust_remote_code, in every script."""
    model, tasks = folder / "with_code", folder / "tasks.json"
    save_model(model)
    (model / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n"
                                  "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
                                  "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
                                  "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n")
    config = json.loads((model / "config.json").read_text()) | {
        "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    write_tasks(tasks, 1)
    data, out = folder / "data", ["--output_dir", folder / "o"]
    train = ["--train_file", data / "train.json", "--hidden_data", data / "messages"]
    collecting = ["custom", "--model_name_or_path", model, "--dataset_path", tasks, *out, "--max_new_tokens", 2]
    for script, argv in [
            (collect, collecting), (train_actor, ["--model_name_or_path", model, *train, *out]),
            (compress, ["--teacher_model_name_or_path", model, "--student_model_name_or_path", model, *train, *out]),
            (eval_alfworld, ["--model_path", model, "--env", "test_eval_alfworld:Game", "--split", "test", "--variants", "no_comm",
                             "--output_path", folder / "o"]),
            (eval_math, ["--model_path", model, "--dataset", write_problem(folder), "--variants", "no_comm", *out])]:
        refuses(script.main, argv, str(model), "--trust_remote_code true")
    assert not os.path.exists(folder / "ran")
    collect.main([str(a) for a in [*collecting, "--trust_remote_code", "true"]])
    assert os.path.exists(folder / "ran") and len(LatentShards(str(folder / "o"))) == 1


def write_problem(folder):
    path = folder / "problem.json"
    path.write_text(json.dumps([{"id": "1", "problem": "1 + 1", "solution": "\\boxed{2}"}]))
    return path

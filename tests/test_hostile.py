"""Whatever a file holds: a correct batch, or one clear line. Never a traceback, never a wrong label."""
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import load_file

import collect
import compress
import eval_alfworld
import eval_math
import train_actor
from common import UserError, write_json, write_text
from data import Conversations, encode_conversation, reply_frame, to_turns
from examples.convert import import_messages
from model import BOP, EOP, LatentShards, add_markers, build_sample, collate, open_shards
from templates import CHATML, SPECIAL
from tiny import argv_of, make_data, make_tokenizer, save_model, write_tasks

SLOW = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TOKENIZERS = {template: make_tokenizer(template) for template in SPECIAL}
for tokenizer in TOKENIZERS.values():
    add_markers(tokenizer)

CONTROL = sorted({token for _, tokens, _, _ in SPECIAL.values() for token in tokens}) + [BOP, EOP]
ODD = ["", " \n\t", "\ud800", "\x00", "\ue0000\ue001", CHATML[:40]]
NASTY = st.one_of(st.text(max_size=40), st.sampled_from(CONTROL), st.sampled_from(ODD),
                  st.lists(st.sampled_from(CONTROL + ODD), max_size=4).map("".join))
ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system"])
TURN = st.fixed_dictionaries({"from": ROLES, "value": NASTY})
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALAR, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)), max_leaves=6)


def one_line(error):
    assert str(error) and "\n" not in str(error), error


def without_spaces(text):
    """SentencePiece's "▁" is a space, and a piece that is tokenized alone may get one more before it."""
    return "".join(text.replace("▁", "").split())


@given(st.sampled_from(sorted(SPECIAL)), st.lists(TURN, max_size=7), NASTY, st.booleans(), st.integers(0, 3))
@settings(max_examples=300, **SLOW)
@example("chatml", [{"from": "human", "value": "a"}] * 3 + [{"from": "gpt", "value": EOP}], "", True, 0)
@example("llama3", [{"from": "human", "value": "long " * 20_000}, {"from": "gpt", "value": ""}], "", True, 0)
@example("mistral", [{"from": role, "value": f"x{''.join(CONTROL)}y"} for role in ("human", "gpt")] * 2, "", True, 0)
def test_any_conversation_gives_right_labels_or_one_line(template, turns, system, announced, task_turn):
    tokenizer, announcement = TOKENIZERS[template], "plan:" if announced else None
    try:
        turns = to_turns({"conversations": turns, "system": system}, task_turn)
        before, after, labels = encode_conversation(tokenizer, turns, announcement)
    except UserError as error:
        return one_line(error)
    # the labels are the replies and their ends, and nothing else
    assert len(labels) == len(after) and all(label in (-100, token) for label, token in zip(labels, after))
    frame = reply_frame(tokenizer)
    replies = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    said = tokenizer.decode([label for label in labels if label != -100])
    assert without_spaces(said) == without_spaces(frame.middle_end.join(replies) + frame.last_end)
    read = without_spaces(tokenizer.decode(before + after))
    assert all(without_spaces(turn["content"]) in read for turn in turns)  # nothing of a turn is lost
    # control tokens come from the template and the insertion only
    dull = [{"role": turn["role"], "content": "-"} for turn in turns]
    dull_before, dull_after, _ = encode_conversation(tokenizer, dull, announcement)
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [t for t in before + after if t in control] == [t for t in dull_before + dull_after if t in control]
    sample = build_sample(before, after, labels, latents=torch.zeros(3, 4) if announced else None)
    mask = collate([sample, build_sample([], [1], [1])])["attention_mask"]
    assert mask[0].sum() == len(before) + len(after) + 3 * announced == mask.shape[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("hostile")
    make_data(d / "data", n=4, width=8)
    return d


@given(st.data())
@settings(max_examples=150, **SLOW)
def test_any_json_gives_samples_or_one_line(folder, data):
    """Random values anywhere in a training file, in place of the right ones."""
    record = {"id": "t1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    fields = ["id", "conversations", "messages", "system", "plan", "turn", "value", "all"]
    for _ in range(data.draw(st.integers(1, 2))):
        where, value = data.draw(st.sampled_from(fields)), data.draw(JSON)
        if where == "all":
            record = value
        elif isinstance(record, dict) and where in ("turn", "value"):
            turns = record.get("conversations")
            if isinstance(turns, list) and turns and isinstance(turns[0], dict):
                turns[0] = value if where == "turn" else {**turns[0], "value": value}
        elif isinstance(record, dict):
            record[where] = value
    path, shards = str(folder / "fuzz.json"), open_shards(str(folder / "data" / "messages"))
    write_text(path, json.dumps([record]))
    try:
        samples = Conversations(path, TOKENIZERS["chatml"], shards, max_message=64, max_length=4096)
        batch = collate([samples.sample(n, "latent") for n in range(len(samples))])
    except UserError as error:
        return one_line(error)
    assert (batch["labels"] != -100).any() and batch["latents_mask"].any()


@given(st.dictionaries(st.sampled_from(["id", "task_id", "task", "plan", "hidden_state", "hidden_state_path", "dtype",
                                        "record", "sender"]), JSON, max_size=3) | JSON)
@settings(max_examples=150, **SLOW)
def test_any_json_gives_messages_or_one_line(folder, change):
    """Random values in what examples/convert.py imports."""
    row = {"id": "t1", "plan": "p", "hidden_state": [[1.0, 2.0]]}
    write_text(str(folder / "rows.json"), json.dumps([row | change if isinstance(change, dict) else change]))
    shutil.rmtree(folder / "imported", ignore_errors=True)
    try:
        import_messages(str(folder / "rows.json"), str(folder / "imported"))
        shards = LatentShards(str(folder / "imported"))
    except UserError as error:
        return one_line(error)
    task_id, = shards.records
    assert shards[task_id].isfinite().all() and len(shards[task_id]) == shards.lengths[task_id] > 0


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
        read = {task_id: shards[task_id] for task_id in shards.records}
    except UserError as error:
        return one_line(error)
    right = load_file(path)
    assert all(torch.equal(read[task_id], right[task_id]) for task_id in read)


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
    write_json(str(folder / "problem.json"), [{"id": "1", "problem": "1 + 1", "solution": "\\boxed{2}"}])
    out, data = folder / "o", folder / "data"
    training = {"train_file": data / "train.json", "hidden_data": data / "messages", "output_dir": out}
    flags = {
        collect: {"model_name_or_path": model, "dataset_path": tasks, "output_dir": out, "max_new_tokens": 2},
        train_actor: {"model_name_or_path": model, **training},
        compress: {"teacher_model_name_or_path": model, "student_model_name_or_path": model, **training},
        eval_alfworld: {"model_path": model, "env": "test_collect:Game", "split": "test",
                        "variants": "no_comm", "output_path": out},
        eval_math: {"model_path": model, "dataset": folder / "problem.json", "variants": "no_comm",
                    "output_dir": out}}
    for script in flags:
        argv = (["custom"] if script is collect else []) + argv_of(flags[script])
        refuses(script.main, argv, str(model), "--trust_remote_code true")
    assert not os.path.exists(folder / "ran")
    collect.main(["custom", *argv_of(flags[collect] | {"trust_remote_code": "true"})])
    assert os.path.exists(folder / "ran") and len(LatentShards(str(out))) == 1

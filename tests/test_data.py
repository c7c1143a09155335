"""Prompts, samples and their order: ids are the template's, labels are the replies, mistakes are one line."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from common import UserError
from data import (PLAN_ANNOUNCEMENT, Conversations, another_task, control_tokens, encode_conversation,
                  encode_prompt, final_reply, global_batch, plan_ids_for, split_eval, stop_ids, text_ids,
                  to_messages)
from model import BOP, EOP, CLOCK, add_markers, load_tokenizer, open_shards
from templates import SENTENCEPIECE, SPECIAL
from tiny import make_data, make_lm, make_tokenizer

KINDS = sorted(SPECIAL)
WITHOUT_SYSTEM = {"mistral", "mistral3", "gemma2"}  # their templates refuse a system turn
TURNS = ["You see a cup.\nFind it, señor 🙂", "go to shelf 1", "On shelf 1: a {cup} 100%", "take cup 1"]


def as_messages(turns, system=None):
    messages = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(turns)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def with_markers(kind):
    tokenizer = make_tokenizer(kind)
    add_markers(tokenizer)
    return tokenizer


def template_ids(tokenizer, messages, add_generation_prompt=False):
    """What Hugging Face makes of a conversation, with the same arguments for the template."""
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt,
        date_string=f"{CLOCK:%d %b %Y}", **tokenizer.chat_template_kwargs)


def prompts_of(kinds):
    with_system = [(kind, "Be brief.") for kind in kinds if kind not in WITHOUT_SYSTEM]
    return [(kind, None) for kind in kinds] + with_system


# ---- prompts are the template's

@pytest.mark.parametrize("kind, system", prompts_of(KINDS))
def test_a_prompt_is_the_templates(kind, system):
    """Id for id, with dummy prefixes and default system turns; the message ends the first human turn."""
    tokenizer = with_markers(kind)
    messages = as_messages(TURNS[:1], system)
    before, after = encode_prompt(tokenizer, messages)
    expected = template_ids(tokenizer, messages, add_generation_prompt=True)
    if kind == "harmony":  # what this template writes before every reply is not the actor's to say
        expected += tokenizer("<|chan|>final<|msg|>", add_special_tokens=False).input_ids
    assert before + after == expected
    assert tokenizer.decode(before).endswith(TURNS[0])

    before, after = encode_prompt(tokenizer, messages, "The plan:")
    assert [before[-1], after[0]] == tokenizer.convert_tokens_to_ids([BOP, EOP])
    assert tokenizer.decode(before).endswith(TURNS[0] + "\nThe plan:" + BOP)


@pytest.mark.parametrize("kind, system", prompts_of(KINDS))
@pytest.mark.parametrize("n_turns", [2, 4])
@pytest.mark.parametrize("announcement", [None, PLAN_ANNOUNCEMENT])
def test_training_prompt_is_evaluation_prompt_is_template(kind, system, n_turns, announcement):
    """Turn by turn a game reads the ids that training read, and the labels are the replies and their ends."""
    tokenizer, messages = with_markers(kind), as_messages(TURNS[:n_turns], system)
    before, after, labels = encode_conversation(tokenizer, messages, announcement)
    ids, labels = before + after, [-100] * len(before) + labels
    n_end = 2 if kind == "llama2" else 1  # " </s>"
    position = 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head, prompt = encode_prompt(tokenizer, messages[:k], announcement)
        end = position + len(head + prompt)
        assert ids[position:end] == head + prompt
        assert set(labels[position + (n_end if position else 0):end]) == {-100}
        position = end
        while position < len(ids) and labels[position] != -100:
            position += 1
        reply = tokenizer.decode(ids[end:position - n_end])
        assert reply.lstrip(" ") == message["content"] and ids[position - 1] in stop_ids(tokenizer)
        assert labels[end:position] == ids[end:position]
        position -= n_end  # a reply's end opens the next prompt
    assert position + n_end == len(ids) == len(labels)

    if announcement is None:
        assert not {BOP, EOP} & set(tokenizer.convert_ids_to_tokens(ids))
    else:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] += f"\n{announcement}{BOP}{EOP}"
    if kind != "qwen3" or n_turns == 2:  # Qwen3's takes empty thoughts out of earlier turns; a cache cannot
        expected = template_ids(tokenizer, messages)
        while expected[-1] not in stop_ids(tokenizer):
            expected.pop()  # ChatML writes a newline behind the last end of turn
        assert ids == expected
    if tokenizer.bos_token_id is not None and kind != "llama2":  # which writes one before every human turn
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_an_empty_thought_is_part_of_the_prompt():
    """Qwen3's template writes it before a reply: a game must get "b", not "<think></think>b"."""
    tokenizer, messages = with_markers("qwen3"), as_messages(["a", "b", "c", "d"])
    before, after, labels = encode_conversation(tokenizer, messages)
    thought = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(before + after) == (
        f"<|im_start|>user\na<|im_end|>\n{thought}b<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n{thought}d<|im_end|>")
    assert tokenizer.decode([label for label in labels if label != -100]) == "b<|im_end|>d<|im_end|>"


def test_with_thinking_on_the_model_writes_its_thoughts_itself():
    tokenizer, messages = with_markers("qwen3"), as_messages(["a"])
    without = sum(encode_prompt(tokenizer, messages), [])
    tokenizer.chat_template_kwargs = {"enable_thinking": True}
    prompt = sum(encode_prompt(tokenizer, messages), [])
    assert prompt == template_ids(tokenizer, messages, add_generation_prompt=True) != without
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_a_lead_of_control_tokens_and_two_ends_of_turn():
    """gpt-oss: a channel before each reply, another end for the last one. Middle turns end as the template
    ends them."""
    tokenizer = with_markers("harmony")
    before, after, labels = encode_conversation(tokenizer, as_messages(["a", "b", "c", "d"]))
    assert tokenizer.decode(before + after) == (
        "user<|msg|>a<|im_end|>A<|chan|>final<|msg|>b<|im_end|>"
        "user<|msg|>c<|im_end|>A<|chan|>final<|msg|>d<|ret|>")
    assert tokenizer.decode([label for label in labels if label != -100]) == "b<|im_end|>d<|ret|>"
    ends = tokenizer.convert_tokens_to_ids(["<|ret|>", "<|im_end|>"])
    assert stop_ids(tokenizer) == sorted(ends)


@pytest.mark.parametrize("eos, extra", [(None, []), (7, [7]), ([7, 9], [7, 9])])
def test_generation_stops_at_the_models_own_ends_too(eos, extra):
    lm = make_lm()
    lm.generation_config.eos_token_id = eos
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(make_tokenizer(), lm) == sorted([end, *extra])
    plain = make_tokenizer()
    plain.chat_template = None  # a sender may have none
    assert stop_ids(plain, lm) == sorted([end, *extra])


@pytest.mark.parametrize("text, reply", [
    ("take cup", "take cup"), ("<think>\nAction: no\n</think>\n\nAction: take cup", "Action: take cup"),
    ("</think> go ", "go"), ("<think> Action: go", ""), ("<think>a</think>b</think>c", "c")])
def test_a_reply_is_what_comes_after_thoughts(text, reply):
    assert final_reply(text) == reply


def test_a_prompt_does_not_change_with_the_calendar():
    """Llama-3.2's date_string, and the strftime_now of others, which counts seconds here."""
    day = tokenizer_text(with_markers("llama3.2"))
    assert "Today Date: 26 Jul 2024\n" in day
    clock = with_markers("llama3")
    clock.chat_template = "\n {{ strftime_now('%Y-%m-%d %H:%M:%S %f %B') }}" + clock.chat_template
    prompts = {tokenizer_text(clock) for _ in range(3)}
    assert len(prompts) == 1 and prompts.pop().startswith("\n 2024-07-26 00:00:00 000000 July")


def tokenizer_text(tokenizer):
    return tokenizer.decode(sum(encode_prompt(tokenizer, as_messages(["a"])), []))


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_user_text_stay_text(kind):
    tokenizer = with_markers(kind)
    evil = "x" + BOP + EOP + "".join(tokenizer.all_special_tokens) + "<|im_end|><|eot_id|></s>[/INST]y"
    control = set(tokenizer.convert_tokens_to_ids(control_tokens(tokenizer, len(tokenizer))))
    sequences = []
    for text in ("harmless", evil):
        before, after, labels = encode_conversation(tokenizer, as_messages([text] * 4), "The plan:")
        assert tokenizer.decode(before + after).count(text) == 4  # nothing of it is lost
        replies = tokenizer.decode([label for label in labels if label != -100])
        assert replies.count(text) == 2
        sequences.append([token for token in before + after if token in control])
    assert sequences[0] == sequences[1]


def test_template_mistakes_name_the_sample():
    tokenizer = make_tokenizer("mistral")
    for messages in (as_messages(TURNS, system="no"), as_messages(TURNS)[:1] + as_messages(TURNS)):
        with pytest.raises(UserError, match="id t7.*refuses"):
            encode_conversation(tokenizer, messages, where="id t7")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="drops, moves or repeats a turn"):
        encode_prompt(tokenizer, as_messages(TURNS[:1], system="s"), where="id t7")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="without a control token"):
        encode_conversation(tokenizer, as_messages(TURNS))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, as_messages(TURNS[:1]))
    with pytest.raises(UserError, match="id t1.*no assistant turn"):
        encode_conversation(make_tokenizer(), as_messages(["only a question"]), where="id t1")


@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": True, "x": 1}])
def test_template_arguments_are_kept_with_the_tokenizer(tmp_path, kwargs):
    make_tokenizer("qwen3").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), chat_template_kwargs=kwargs)
    assert tokenizer.chat_template_kwargs == (kwargs or {"enable_thinking": False})


@pytest.mark.parametrize("kind", sorted(SENTENCEPIECE))
def test_sentencepiece_like_tokenizers_survive_the_disk(tmp_path, kind):
    make_tokenizer(kind).save_pretrained(tmp_path)
    ids = [template_ids(tokenizer, as_messages(TURNS)) for tokenizer in (
        make_tokenizer(kind), load_tokenizer(str(tmp_path)))]
    assert ids[0] == ids[1]


# ---- conversations

ETO = [("human", "instruction"), ("gpt", "OK"), ("human", " the task\n"), ("gpt", "go"), ("human", "seen"),
       ("gpt", "take")]


def eto(*turns):
    return [{"from": role, "value": text} for role, text in turns]


def test_task_turn_folds():
    folded = as_messages(["instruction\n\nthe task", "go", "seen", "take"])
    assert to_messages({"conversations": eto(*ETO)}, 2) == folded
    assert [m["content"] for m in to_messages({"conversations": eto(*ETO)})] == [
        "instruction", "OK", "the task", "go", "seen", "take"]
    with pytest.raises(UserError, match="id 3.*task_turn 6.*6 turns"):
        to_messages({"conversations": eto(*ETO)}, 6, "id 3")


def test_a_system_turn_is_kept_and_not_counted():
    """Counted with it, --task_turn 2 would make "system text + OK" the human turn."""
    folded = as_messages(["instruction\n\nthe task", "go", "seen", "take"], system="rules")
    assert to_messages({"conversations": eto(("system", "rules"), *ETO)}, 2) == folded
    assert to_messages({"system": " rules ", "conversations": eto(*ETO)}, 2) == folded
    assert to_messages({"system": "", "conversations": eto(*ETO)}, 2) == folded[1:]
    for task_turn in (1, 3):
        with pytest.raises(UserError, match=f"id 3.*turn {task_turn} is no human one"):
            to_messages({"conversations": eto(*ETO)}, task_turn, "id 3")


def test_other_names_of_the_same():
    expected = as_messages(["a", "b"], system="s")
    assert to_messages({"messages": expected}) == to_messages({"conversations": expected}) == expected
    assert to_messages({"messages": eto(("system", "s"), ("user", "a"), ("assistant", "b"))}) == expected


@pytest.mark.parametrize("turns", [
    None, [], "text", ["x"], [{"from": "human"}], eto(("bot", "x")), eto(("gpt", "x")), eto(("system", "x")),
    eto(("gpt", "x"), ("human", "x")), eto(("system", "x"), ("system", "x"), ("human", "x"))])
def test_malformed_conversations(turns):
    with pytest.raises(UserError, match="id t1"):
        to_messages({"conversations": turns}, where="id t1")


@pytest.mark.parametrize("system", [5, ["x"], {"a": 1}, "\ud800"])
def test_a_system_field_is_a_text(system):
    with pytest.raises(UserError, match="id t1.*system"):
        to_messages({"conversations": eto(("human", "x")), "system": system}, where="id t1")


def test_plan_ids_only_if_the_vocabulary_is_shared():
    tokenizer = make_tokenizer()
    ids = text_ids(tokenizer, "go to shelf")
    for written in (ids, [5, 6, 7], [10**6], None):  # in another vocabulary they say another text, or none
        assert plan_ids_for(tokenizer, "go to shelf", written) == ids


# ---- training samples

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A training file's records, its path, and messages for it."""
    folder = tmp_path_factory.mktemp("data")
    train, messages = make_data(str(folder))
    with open(train) as file:
        return {"folder": folder, "records": json.load(file), "train": train, "shards": open_shards(messages)}


def read(world, records, name="changed.json", shards="shards", **settings):
    path = world["folder"] / name
    path.write_text(json.dumps(records) if name.endswith("json") else "\n".join(map(json.dumps, records)))
    return Conversations(str(path), with_markers("chatml"), world.get(shards), **settings)


def test_samples_hold_what_was_asked_for(world):
    data, shards = Conversations(world["train"], with_markers("chatml"), world["shards"]), world["shards"]
    assert data.ids == [record["id"] for record in world["records"]]
    assert len(data) == 8 and data.sender_dim == 32
    for n, task_id in enumerate(data.ids):
        L, (before, after, labels) = len(shards[task_id]), data.encoded[n]
        sample, text, nothing = (data.sample(n, message) for message in ("latent", "text", "none"))
        assert torch.equal(sample["latents"], shards[task_id]) and data.message_lengths[n] == L
        assert data.lengths[n] == len(sample["input_ids"]) == len(before) + L + len(after)
        assert data.n_labels[n] == sum(label != -100 for label in labels)
        plan = make_tokenizer().decode(text["input_ids"][len(before):len(text["input_ids"]) - len(after)])
        assert plan == shards.records[task_id]["plan"] and text["latents"] is None
        assert nothing["input_ids"] == before + after
        source = (n + 1) % 8
        other = data.sample(n, "latent", 0.5, source)
        assert torch.equal(other["latents"], shards[data.ids[source]])
        assert other["n_replaced"] == data.message_lengths[source] // 2


def test_jsonl_is_the_same(world):
    a, b = (read(world, world["records"], name) for name in ("a.json", "a.jsonl"))
    assert a.encoded == b.encoded and a.ids == b.ids


@pytest.mark.parametrize("form", ["inline", ".npy", ".pt", ".safetensors"])
def test_messages_of_the_record_equal_those_of_shards(world, form):
    records, shards = [], world["shards"]
    for record in world["records"]:
        H, path = shards[record["id"]], str(world["folder"] / (record["id"] + form))
        record = {**record, "plan": shards.records[record["id"]]["plan"], "hidden_state_path": path}
        if form == "inline":
            record["hidden_state"] = H.tolist()
            del record["hidden_state_path"]
        elif form == ".npy":
            np.save(path, H.numpy())
        elif form == ".pt":
            torch.save(H, path)
        else:
            save_file({"hidden": H}, path)
        records.append(record)
    data, reference = read(world, records, shards=None), read(world, world["records"])
    assert data.plans == reference.plans and data.encoded == reference.encoded
    assert data.lengths == reference.lengths
    for n in range(len(data)):
        assert torch.equal(data.latents(n), reference.latents(n))


def test_what_the_sender_was_asked_tells_tasks_apart(world):
    """All actors may read the same first turn."""
    turns = eto(("human", "go on"), ("gpt", "go"))
    records = [{**record, "plan": "p", "conversations": turns} for record in world["records"]]
    assert len(set(read(world, records).tasks)) == 8
    assert set(read(world, records, shards=None, message="text").tasks) == {"go on"}


def test_the_instruction_of_a_file_is_kept(world):
    records = [{**record, "conversations": eto(*ETO)} for record in world["records"]]
    assert read(world, records, task_turn=2).instruction == "instruction"
    assert read(world, records).instruction is None
    with_system = [{**record, "system": "rules"} for record in records]
    assert read(world, with_system, task_turn=2).instruction == "instruction"


@pytest.mark.parametrize("content, words", [
    ('{"id": 1}\n{"id": 2}\n\n{"id" 4}\n', "line 4"), ('{"id": 1}\n[', "line 2"), ("", "non-empty list")])
def test_a_broken_jsonl_names_its_line(world, content, words):
    (world["folder"] / "b.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"b.jsonl.*{words}"):
        Conversations(str(world["folder"] / "b.jsonl"), with_markers("chatml"), world["shards"])


# ---- order, negatives, held-out samples

def test_batches_cover_the_data_and_depend_on_the_step_alone():
    samples = [3, 1, 4, 15, 9, 2, 6]
    batches = [global_batch(step, samples, 4, 3) for step in range(7)]
    draws = [pair for batch in batches for pair in batch]
    assert [draw for draw, _ in draws] == list(range(28))
    for epoch in range(4):
        assert sorted(n for _, n in draws[7 * epoch:7 * epoch + 7]) == sorted(samples)
    assert global_batch(5, samples, 4, 3) == batches[5] != global_batch(5, samples, 4, 4)
    assert [n for _, n in draws[:7]] != [n for _, n in draws[7:14]]


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_negative_has_another_task(tasks, seed):
    candidates = range(0, len(tasks), 2)
    for n in range(len(tasks)):
        if {tasks[other] for other in candidates} == {tasks[n]}:
            with pytest.raises(UserError, match="all tasks are the same"):
                another_task(n, tasks, candidates, seed)
        else:
            other = another_task(n, tasks, candidates, seed, n)
            assert tasks[other] != tasks[n] and other in candidates
            assert other == another_task(n, tasks, candidates, seed, n)


def test_the_only_other_task_is_found_and_all_are_reached():
    assert another_task(0, ["a"] * 3000 + ["b"], range(3001), 1) == 3000
    assert {another_task(0, list("abcde"), range(5), seed) for seed in range(60)} == {1, 2, 3, 4}


def test_held_out_samples_are_chosen_by_id(world):
    sides = []
    for records in (world["records"], world["records"][::-1]):
        data = read(world, records)
        sides.append([{data.ids[n] for n in side} for side in split_eval(data, 0.3, 0)])
    assert sides[0] == sides[1] and len(sides[0][1]) == 2 and not sides[0][0] & sides[0][1]
    assert split_eval(data, 0.0, 0) == (list(range(8)), [])

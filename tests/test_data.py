"""Prompts, samples and their order: ids are the template's, labels are the replies, mistakes are one line."""
import json
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AddedToken

from common import UserError
from data import (CLOCK, PLAN_ANNOUNCEMENT, Conversations, another_task, encode_conversation, encode_prompt,
                  final_reply, global_batch, load_tasks, plan_ids_for, record_ids, stop_ids, text_ids,
                  to_turns, train_and_eval)
from hf import load_tokenizer
from model import BOP, EOP, add_markers, make_record, open_shards, write_shard
from templates import CHATML, SENTENCEPIECE, SPECIAL
from tiny import make_data, make_lm, make_tokenizer, save_model

WITHOUT_SYSTEM = {"mistral", "mistral3", "gemma2"}  # their templates refuse a system turn
TEXTS = ["You see a cup.\nFind it, señor 🙂", "go to shelf 1", "On shelf 1: a {cup} 100%", "take cup 1"]


def as_turns(texts, system=None):
    turns = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def with_markers(template):
    tokenizer = make_tokenizer(template)
    add_markers(tokenizer)
    return tokenizer


def prompt_ids(tokenizer, turns, announcement=None):
    part = encode_prompt(tokenizer, turns, announcement)
    return part["before"] + part["after"]


def template_ids(tokenizer, turns, add_generation_prompt=False):
    """What Hugging Face makes of a conversation, with the same arguments for the template."""
    return tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt,
        date_string=f"{CLOCK:%d %b %Y}", **tokenizer.chat_template_kwargs)


PROMPTS = [(template, system) for template in sorted(SPECIAL) for system in (None, "Be brief.")
           if system is None or template not in WITHOUT_SYSTEM]


# ---- prompts are the template's
@pytest.mark.parametrize("template, system", PROMPTS)
@pytest.mark.parametrize("n_turns", [2, 4])
@pytest.mark.parametrize("announcement", [None, PLAN_ANNOUNCEMENT])
def test_training_prompt_is_evaluation_prompt_is_template(template, system, n_turns, announcement):
    """Id for id, with dummy prefixes and default system turns. Turn by turn a game reads the ids that training
    read; the labels are the replies and their ends; the message ends the first human turn."""
    tokenizer, turns = with_markers(template), as_turns(TEXTS[:n_turns], system)
    before, after, labels = encode_conversation(tokenizer, turns, announcement)
    ids, labels = before + after, [-100] * len(before) + labels
    n_end = 2 if template == "llama2" else 1  # " </s>"
    position = 0
    for k, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = prompt_ids(tokenizer, turns[:k], announcement)
        end = position + len(prompt)
        assert ids[position:end] == prompt
        assert set(labels[position + (n_end if position else 0):end]) == {-100}
        position = end
        while position < len(ids) and labels[position] != -100:
            position += 1
        reply = tokenizer.decode(ids[end:position - n_end])
        assert reply.lstrip(" ") == turn["content"] and ids[position - 1] in stop_ids(tokenizer)
        assert labels[end:position] == ids[end:position]
        position -= n_end  # a reply's end opens the next prompt
    assert position + n_end == len(ids) == len(labels)

    if announcement is None:
        assert tokenizer.decode(before).endswith(TEXTS[0])
        assert not {BOP, EOP} & set(tokenizer.convert_ids_to_tokens(ids))
    else:
        assert tokenizer.decode(before).endswith(f"{TEXTS[0]}\n{announcement}{BOP}")
        assert [before[-1], after[0]] == tokenizer.convert_tokens_to_ids([BOP, EOP])
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] += f"\n{announcement}{BOP}{EOP}"
    if template != "qwen3" or n_turns == 2:  # Qwen3's takes empty thoughts out of earlier turns; a cache cannot
        expected = template_ids(tokenizer, turns)
        while expected[-1] not in stop_ids(tokenizer):
            expected.pop()  # ChatML writes a newline behind the last end of turn
        assert ids == expected
    if tokenizer.bos_token_id is not None and template != "llama2":  # which writes one before every human turn
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("template, text, labels", [
    # an empty thought is part of the prompt: a game must get "b", not "<think></think>b"
    ("qwen3", f"<|im_start|>user\na<|im_end|>\n{THOUGHT}b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n{THOUGHT}"
     "d<|im_end|>", "b<|im_end|>d<|im_end|>"),
    # gpt-oss: a channel before each reply, another end for the last one; a middle turn ends as the template ends it
    ("harmony", "user<|msg|>a<|im_end|>A<|chan|>final<|msg|>b<|im_end|>user<|msg|>c<|im_end|>A<|chan|>final<|msg|>"
     "d<|ret|>", "b<|im_end|>d<|ret|>"),
    # a generation prompt that ends in a space: "▁b" is one token, the actor's to say
    ("vicuna", "<s>USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>", " b</s> d</s>")])
def test_what_stands_around_a_reply(template, text, labels):
    tokenizer = with_markers(template)
    before, after, learned = encode_conversation(tokenizer, as_turns(["a", "b", "c", "d"]))
    assert tokenizer.decode(before + after) == text
    assert tokenizer.decode([label for label in learned if label != -100]) == labels
    ends = {"qwen3": ["<|im_end|>"], "harmony": ["<|ret|>", "<|im_end|>"], "vicuna": ["</s>"]}[template]
    assert stop_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(ends))


def test_with_thinking_on_the_model_writes_its_thoughts_itself():
    tokenizer, turns = with_markers("qwen3"), as_turns(["a"])
    assert tokenizer.decode(prompt_ids(tokenizer, turns)).endswith(THOUGHT)
    tokenizer.chat_template_kwargs = {"enable_thinking": True}
    prompt = prompt_ids(tokenizer, turns)
    assert prompt == template_ids(tokenizer, turns, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("texts", [["a /no_think", "b"], ["a", "<think>x</think>b"],
                                   ["a", "<think>x</think>b", "c", "d"]])
def test_a_template_that_reads_what_the_turns_say_is_refused(texts):
    """What is trained is what it would write: switches in a task, replies that carry their thoughts."""
    tokenizer, other = with_markers("chatml"), with_markers("chatml")
    other.chat_template = CHATML.replace("m.content +", "m.content.split('</think>')[-1].replace('/no_think', '') +")
    plain = [re.sub("<think>.*</think>| /no_think", "", text) for text in texts]
    assert encode_conversation(other, as_turns(plain)) == encode_conversation(tokenizer, as_turns(plain))
    encode_conversation(tokenizer, as_turns(texts))
    with pytest.raises(UserError, match="reads what the turns say"):
        encode_conversation(other, as_turns(texts))


@pytest.mark.parametrize("eos, extra", [(None, []), (7, [7]), ([7, 9], [7, 9])])
def test_generation_stops_at_the_models_own_ends_too(eos, extra):
    lm, plain = make_lm(), make_tokenizer()
    lm.generation_config.eos_token_id = eos
    plain.chat_template = None  # a sender may have none
    end = plain.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(make_tokenizer(), lm) == stop_ids(plain, lm) == sorted([end, *extra])


@pytest.mark.parametrize("text, reply", [
    ("take cup", "take cup"), ("<think>\nAction: no\n</think>\n\nAction: take cup", "Action: take cup"),
    ("</think> go ", "go"), ("<think> Action: go", ""), ("<think>a</think>b</think>c", "c")])
def test_a_reply_is_what_comes_after_thoughts(text, reply):
    for kind in ("chatml", "qwen3"):  # tags as plain text, and as tokens
        tokenizer = make_tokenizer(kind)
        assert final_reply(tokenizer, tokenizer(text, add_special_tokens=False).input_ids) == reply


@pytest.mark.parametrize("opens, closes", [
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")])
def test_thoughts_are_known_by_the_tokenizers_own_tags(opens, closes):
    """Control tokens or not, in a reply or opened by the prompt; a thought that was cut is no reply."""
    for special in (True, False):
        tokenizer = make_tokenizer()
        tags = re.findall(r"<[^>]*>|\[[^]]*\]", opens + closes)
        tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in tags])
        def reply(text):
            return final_reply(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, ".")

        assert reply(f"{opens}Action: no\n{closes}Action: go") == "Action: go."
        assert reply(f"{opens}Action: no\n") == ""
        tokenizer.chat_template = CHATML.replace("assistant\\n' }}", f"assistant\\n{opens}' }}}}")
        assert reply("Action: no\n") == "" and reply(f"no{closes}yes") == "yes."


def test_a_prompt_does_not_change_with_the_calendar():
    """Llama-3.2's date_string, and the strftime_now of others, which counts seconds here."""
    tokenizer = with_markers("llama3.2")
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(prompt_ids(tokenizer, as_turns(["a"])))
    clock = with_markers("llama3")
    clock.chat_template = "\n {{ strftime_now('%Y-%m-%d %H:%M:%S %f %B') }}" + clock.chat_template
    prompts = {clock.decode(prompt_ids(clock, as_turns(["a"]))) for _ in range(3)}
    assert len(prompts) == 1 and prompts.pop().startswith("\n 2024-07-26 00:00:00 000000 July")


def test_template_mistakes_name_the_sample():
    tokenizer = make_tokenizer("mistral")
    for turns in (as_turns(TEXTS, system="no"), as_turns(TEXTS)[:1] + as_turns(TEXTS)):
        with pytest.raises(UserError, match="id t7: .*refuses"):
            encode_prompt(tokenizer, turns, where="id t7")
    endless = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    for template, words in (("{{ messages[-1]['content'] }}", "drops, moves or repeats a turn"),
                            (endless, "without a control token"), (None, "no chat template")):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=words):
            encode_conversation(tokenizer, as_turns(TEXTS))


@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": True, "x": 1}])
@pytest.mark.parametrize("template", ["qwen3", *sorted(SENTENCEPIECE)])
def test_a_tokenizer_survives_the_disk(tmp_path, template, kwargs):
    tokenizer = load_tokenizer(save_model(tmp_path, template=template), chat_template_kwargs=kwargs)
    assert tokenizer.chat_template_kwargs == (kwargs or {"enable_thinking": False})
    assert template_ids(tokenizer, as_turns(TEXTS)) == template_ids(make_tokenizer(template), as_turns(TEXTS))


def test_plan_ids_only_if_the_vocabulary_is_shared():
    tokenizer = make_tokenizer()
    ids = text_ids(tokenizer, "go to shelf")
    for written in (ids, [5, 6, 7], [10**6], None):  # in another vocabulary they say another text, or none
        assert plan_ids_for(tokenizer, "go to shelf", written) == ids


# ---- conversations
def shared(*turns):
    """A conversation as ShareGPT's files have it."""
    return [{"from": role, "value": text} for role, text in turns]


ETO = shared(("human", "instruction"), ("gpt", "OK"), ("human", " task\n"), ("gpt", "go"), ("human", "seen"),
             ("gpt", "take"))
SYSTEM = shared(("system", "rules"))


@pytest.mark.parametrize("system, records", [
    (None, [{"conversations": ETO}, {"system": "", "conversations": ETO}, {"messages": ETO}]),
    ("rules", [{"conversations": SYSTEM + ETO}, {"system": " rules ", "conversations": ETO}])])
def test_task_turn_folds_and_counts_no_system_turn(system, records):
    """Counted with it, --task_turn 2 would make "system text + OK" the human turn."""
    whole = as_turns(["instruction", "OK", "task", "go", "seen", "take"], system)
    folded = as_turns(["instruction\n\ntask", "go", "seen", "take"], system)
    for record in [*records, {"conversations": whole}, {"messages": whole}]:
        for task_turn, expected in ((0, whole), (2, folded)):
            turns = [(turn["role"], turn["content"]) for turn in to_turns(record, task_turn)]
            assert turns == [tuple(turn.values()) for turn in expected]
        for task_turn in (1, 3, 6):
            with pytest.raises(UserError, match=f"no turn {task_turn} of a human.*user, assistant"):
                to_turns(record, task_turn)


@pytest.mark.parametrize("record", [
    {},
    *({"conversations": turns} for turns in (
        None, [], "text", ["x"], [{"from": "human"}], shared(("bot", "x")), shared(("gpt", "x")), SYSTEM, ETO[1:],
        SYSTEM + SYSTEM + ETO, [*ETO, {"from": "gpt", "value": " "}], [{**ETO[0], "tool_calls": [1]}, *ETO[1:]])),
    {"conversations": ETO, "tools": [{}]},  # no prompt here would show them
    *({"conversations": ETO, "system": system} for system in (5, ["x"], {"a": 1}, "\ud800"))])
def test_malformed_conversations(world, record):
    with pytest.raises(UserError, match=r"changed.jsonl: record 0 \(id t1\): "):
        read(world, [{**record, "id": "t1"}], kind="none")


@pytest.mark.parametrize("mark", [{"loss": False}, {"train": False}, {"weight": 0}, {"loss_mask": 0}, None])
def test_a_turn_may_be_read_and_not_learned(mark):
    """AgentGym's, axolotl's, OpenAI's, verl's way; None: one list for all turns."""
    tokenizer, turns = with_markers("chatml"), as_turns(["a", "b", "c", "d"])
    marked = {"messages": [turns[0], {**turns[1], **(mark or {})}, *turns[2:]]}
    if mark is None:
        marked["loss_mask"] = [1, 0, 1, 1]
    before, after, labels = encode_conversation(tokenizer, to_turns(marked), "The plan:")
    assert (before, after) == encode_conversation(tokenizer, turns, "The plan:")[:2]
    assert tokenizer.decode([label for label in labels if label != -100]) == "d<|im_end|>"
    with pytest.raises(UserError, match="no assistant turn to learn from"):
        encode_conversation(tokenizer, to_turns(marked)[:2])


# ---- ids and samples
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A training file's records, its path, and messages for it."""
    folder = tmp_path_factory.mktemp("data")
    train, messages = make_data(str(folder))
    with open(train) as file:
        return {"folder": folder, "records": json.load(file), "train": train, "shards": open_shards(messages)}


def write(world, records):
    path = world["folder"] / "changed.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def read(world, records, shards="shards", **settings):
    return Conversations(write(world, records), with_markers("chatml"), world.get(shards), **settings)


@pytest.mark.parametrize("form", ["conversations", "messages", "system turn", "system field", "task field"])
def test_a_file_without_ids_finds_its_own_messages(world, tmp_path, form):
    """collect.py hashes the text of the task's turn, the trainers too: sorted, filtered, equal texts and all."""
    records = []
    for n in (0, 0, 2, 2, 4):
        turns = ETO[:2] + shared(("human", f" task {n}\n"), ("gpt", "go"))
        forms = {"conversations": {"conversations": turns},
                 "messages": {"messages": to_turns({"conversations": turns})},
                 "system turn": {"conversations": SYSTEM + turns},
                 "system field": {"conversations": turns, "system": "rules"},
                 "task field": {"conversations": turns, "task": f"Task no. {n}"}}
        records.append(forms[form])
    tasks = load_tasks(write(world, records), task_field=("task",), task_turn=2)
    assert [task["task"].lower().replace("no. ", "") for task in tasks] == [f"task {n}" for n in (0, 0, 2, 2, 4)]
    latents = {task["id"]: torch.full((2, 4), float(task["task"][-1])) for task in tasks}
    write_shard(tmp_path / "latents-0.safetensors", latents, {task["id"]: make_record(task, "plan") for task in tasks},
                {"hidden_size": 4})
    some = {"folder": tmp_path, "shards": open_shards(str(tmp_path))}
    for kept in (records, records[::-1], records[3:]):
        data = read(some, kept, task_turn=2)
        for n, turns in enumerate(data.turns):
            assert turns[-2]["content"] == f"instruction\n\ntask {data.shards[data.ids[n]][0, 0]:.0f}"
    with pytest.raises(UserError, match="id .*: no message"):  # the hash of another turn
        read(some, records[:1])


def test_ids_are_hashes_of_the_tasks_where_there_are_none():
    ids = record_ids([{"r": 1}, {"r": 2}, {"r": 1}, {"r": 1}], "", ["a", "b", "a", "a"])
    assert ids[2:] == [f"{ids[0]}-1", f"{ids[0]}-2"] and len(set(ids)) == 4
    assert record_ids([{}], "", ["b"]) == [ids[1]]
    for a, b, id_field, words in ((1, 2, "", "not the same"), (1, "1", "id", "twice"), ("\ud800", 2, "id", "no text")):
        with pytest.raises(UserError, match=f"{words}.*'id'"):
            record_ids([{"id": a}, {"id": b}], id_field, ["a", "a"])


def test_samples_hold_what_was_asked_for(world):
    data, shards = Conversations(world["train"], with_markers("chatml"), world["shards"]), world["shards"]
    assert data.ids == [record["id"] for record in world["records"]] and data.sender_dim == 32
    for name in ("unique_id", "idx"):  # collect.py takes these too
        renamed = [{name: r["id"], "conversations": r["conversations"]} for r in world["records"]]
        assert read(world, renamed).ids == data.ids
    for n, task_id in enumerate(data.ids):
        L, (before, after, labels) = len(shards[task_id]), data.encoded[n]
        sample, text, nothing = (data.sample(n, kind) for kind in ("latent", "text", "none"))
        assert torch.equal(sample["latents"], shards[task_id]) and data.shards.lengths[task_id] == L
        assert data.lengths[n] == len(sample["input_ids"]) == len(before) + L + len(after)
        assert data.n_labels[n] == sum(label != -100 for label in labels)
        plan = make_tokenizer().decode(text["input_ids"][len(before):len(text["input_ids"]) - len(after)])
        assert plan == shards.records[task_id]["plan"] and text["latents"] is None
        assert nothing["input_ids"] == before + after
        source = (n + 1) % 8
        other = data.sample(n, "latent", 0.5, source)
        assert torch.equal(other["latents"], shards[data.ids[source]])
        assert len(other["input_ids"]) == len(before + after) + data.shards.lengths[data.ids[source]]


def test_what_the_sender_was_asked_tells_tasks_apart(world):
    """All actors may read the same first turn."""
    turns = shared(("human", "go on"), ("gpt", "go"))
    records = [{**record, "plan": "p", "conversations": turns} for record in world["records"]]
    assert len(set(read(world, records).tasks)) == 8
    assert set(read(world, records, shards=None, kind="text").tasks) == {"go on"}


def test_the_instruction_of_a_file_is_kept_and_asked_for(world):
    assert read(world, world["records"]).instruction is None
    for system in ("", "rules"):
        records = [{**record, "conversations": ETO, "system": system} for record in world["records"]]
        assert read(world, records, task_turn=2).instruction == "instruction"
        assert read(world, records).instruction is None  # nothing says that the third turn is the task
        records[0] = {**records[0], "conversations": [*ETO[:2], {**ETO[2], "value": "another task"}, *ETO[3:]]}
        with pytest.raises(UserError, match="reply 'OK', so the task comes after them: give --task_turn 2"):
            read(world, records)


# ---- order, negatives, held-out samples
def test_batches_cover_the_data_and_depend_on_the_step_alone():
    indices = [3, 1, 4, 15, 9, 2, 6]
    batches = [global_batch(step, indices, 4, 3) for step in range(7)]
    draws = [pair for batch in batches for pair in batch]
    assert [draw for draw, _ in draws] == list(range(28))
    for epoch in range(4):
        assert sorted(n for _, n in draws[7 * epoch:7 * epoch + 7]) == sorted(indices)
    assert global_batch(5, indices, 4, 3) == batches[5] != global_batch(5, indices, 4, 4)
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
        data, train, _, held_out = train_and_eval(write(world, records), None, 0.3, 0, with_markers("chatml"),
                                                  shards=world["shards"])
        sides.append([{data.ids[n] for n in side} for side in (train, held_out)])
    assert sides[0] == sides[1] and len(sides[0][1]) == 2 and not sides[0][0] & sides[0][1]

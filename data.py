"""
What the stages read.

    1. prompts            conversations -> ids and labels; one function builds them for training and evaluation
    2. tasks              what a sender is asked: files, MATH's directory, a hub dataset
    3. training samples   what an actor learns from: conversations with their messages
"""
import collections
import contextlib
import datetime
import functools
import glob
import itertools
import math
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, is_text, progress, read_json, seed_for, this_rank
from hf import first_line
from model import BOP, EOP, LATENT, build_sample

# ---- 1. Prompts ----------------------------------------------------------------------------------
PLAN_ANNOUNCEMENT = "Another agent has thought about this task. Its plan:"
PLAN_PROMPT = "Please provide a general plan to solve this task.\nThe task is: {task}"
MATH_PROMPT = ("Another agent will solve the problem below, you only plan. Give a short plan: the ideas and the steps "
               "that lead to the solution, in order and in general terms. Do no calculation and do not state the "
               "answer.\nThe problem is: {task}")
MATH_QUESTION = "{task}\nPut the final answer in \\boxed{}."  # what the actor reads
ID_FIELDS = ("unique_id", "id", "idx")  # of MATH-500, of most files, of ToRA: the first that is there
TASK_FIELDS = ("problem", "question")
RESPONSE_FIELDS = ("solution", "answer")
ANSWER_FIELDS = ("answer",)
PRESETS = {  # name: (sender's prompt, turn with the task, or its field, field of the reply, actor's question)
    "alfworld": (PLAN_PROMPT, 2, ("task",), "", "{task}"),  # ETO's turns: instruction, OK, task
    "math": (MATH_PROMPT, 0, TASK_FIELDS, RESPONSE_FIELDS, MATH_QUESTION),
    "custom": (PLAN_PROMPT, 0, ("task",), "", "{task}"),
}
ROLES = {"human": "user", "user": "user", "system": "system", "gpt": "assistant", "assistant": "assistant"}
NOT_LEARNED = ("loss", "train", "weight", "loss_mask")  # of AgentGym, axolotl, OpenAI, verl: 0 means no
DROPPED = ("tools", "tool_calls", "functions", "reasoning_content", "thinking")  # what no prompt here would show
CLOCK = datetime.datetime(2024, 7, 26)  # what a template that writes today's date always writes here
THOUGHT_TAG = re.compile(r"(?!\S*no_?think)\S*(think|thought|channel)\S*", re.I)  # <think>, but no switch


@contextlib.contextmanager
def naming(where):
    """A UserError inside says first where it is: "train.json: id t7: ..."."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}".removeprefix(": ")) from None


def read_turns(record):
    """{"conversations": [{"from", "value"}], "system"?} or {"messages": [{"role", "content"}]} ->
    (system, turns), lists of {"role", "content", "learn"}, the first of one turn or none. Raises UserError."""
    given = record.get("conversations", record.get("messages"))
    if not isinstance(given, list) or not given:
        raise UserError("no 'conversations', a non-empty list of {'from', 'value'} turns, and no task in a "
                        f"field of its own (collect.py --task_field), found {str(record)[:80]}")
    turns = [read_turn(turn) for turn in given]
    dropped = {name for fields in (record, *given) for name in DROPPED if fields.get(name)}
    if dropped:
        raise UserError(f"its '{min(dropped)}' would be dropped: write it into the turns, or remove it")
    if isinstance(record.get("loss_mask"), list):
        for turn, mask in zip(turns, record["loss_mask"]):
            turn["learn"] = mask != 0
    if record.get("system"):
        turns.insert(0, read_turn({"from": "system", "value": record["system"]}))
    n_system = int(turns[0]["role"] == "system")
    return turns[:n_system], turns[n_system:]


def read_turn(turn):
    """{"from", "value"} or {"role", "content"} -> {"role", "content", "learn"}. Raises UserError."""
    fields = turn if isinstance(turn, dict) else {}
    role = ROLES.get(str(fields.get("from", fields.get("role"))))
    text = fields.get("value", fields.get("content"))
    if role is None or not is_text(text):
        raise UserError(f"each turn needs 'from' (human, gpt, system) and a text 'value': {str(turn)[:80]}")
    text = text.strip()  # many templates trim: so training and evaluation agree under any template
    learn = not any(turn.get(name, 1) == 0 for name in NOT_LEARNED)
    if role == "assistant" and learn and not text:
        raise UserError("an empty assistant turn: there is nothing to learn, remove it")
    return {"role": role, "content": text, "learn": learn}


def human_text(turns, n):
    """The text of turn n. Raises UserError unless it is a human's."""
    roles = [turn["role"] for turn in turns]
    if n not in range(len(roles)) or roles[n] != "user":
        raise UserError(f"no turn {n} of a human, see --task_turn (counted from 0, without a system turn): "
                        f"its turns are {', '.join(roles)}")
    return turns[n]["content"]


def to_turns(record, task_turn=0):
    """A record of conversations -> its turns, [{"role", "content", "learn"}]. Raises UserError.
    task_turn t > 0 folds turns 0 and t into the first human turn and drops what lies between: ETO's
    files open with instruction, "OK", task. A system turn stays in front and is not counted."""
    system, turns = read_turns(record)
    opening, task = human_text(turns, 0), human_text(turns, task_turn)
    if task_turn:
        turns = [{**turns[0], "content": f"{opening}\n\n{task}"}] + turns[task_turn + 1:]
    return system + turns


def text_ids(tokenizer, text):
    """Ids of user-supplied text: a control token that it spells ('<bop>', '<|im_end|>') stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def template_ids(tokenizer, text):
    """Ids of what a template writes: its control tokens are control tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=32)
def control_tokens(tokenizer, n_tokens):
    """A regex of the tokens that user-supplied text must not spell. n_tokens, the tokenizer's size, is there
    for the cache: <bop> may come."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def encode_pieces(tokenizer, pieces):
    """[(text, is it user-supplied?, part)] -> {part: ids}.

    Template and text are tokenized as one string, so the ids are those of apply_chat_template even where
    words join across the border, and offsets tell where each token ends:
        ("[INST] ", "past") ("Find x", "before") (" [/INST]", "after")
        -> {"past": [INST], "before": ▁Find ▁x, "after": ▁ [/INST], "reply": , "end": }
    Only where user-supplied text spells a control token is each piece tokenized alone."""
    parts = {part: [] for part in ("past", "before", "after", "reply", "end")}
    control = control_tokens(tokenizer, len(tokenizer))
    if any(is_supplied and control.search(text) for text, is_supplied, _ in pieces):
        for text, is_supplied, part in pieces:
            parts[part] += text_ids(tokenizer, text) if is_supplied else template_ids(tokenizer, text)
        return parts
    whole, part_of = "", []  # the part of each character
    for text, _, part in pieces:
        whole += text
        part_of += [part] * len(text)
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(encoding.input_ids, encoding.offset_mapping):
        last_character = max(start, end - 1)
        parts[part_of[last_character]].append(token)
    return parts


def template_text(tokenizer, turns, add_generation_prompt):
    """The chat template, rendered. Raises UserError where there is none, or where it refuses the turns."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: use the Instruct "
                        f"model, or set tokenizer.chat_template and save it")
    # a clock always shows the same day: a collection that goes on tomorrow asks the same prompt
    template = re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda match: repr(f"{CLOCK:{match[2]}}"),
                      tokenizer.get_chat_template())
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt,
            **{"date_string": f"{CLOCK:%d %b %Y}"} | tokenizer.chat_template_kwargs)
    except Exception as error:  # jinja's: roles that must alternate, no system turn allowed, ...
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses the turns: {error}") from None


def template_pieces(tokenizer, turns, add_generation_prompt):
    """What the template writes before, between and behind n turns -> n + 1 texts. It is rendered with a mark in
    place of each turn's text, so template and text are told apart whatever they say. Raises UserError."""
    marked = [{**turn, "content": f"\ue000{n}\ue001"} for n, turn in enumerate(turns)]
    pieces = re.split("\ue000(\\d+)\ue001", template_text(tokenizer, marked, add_generation_prompt))
    if pieces[1::2] != [str(n) for n in range(len(turns))]:
        raise UserError("the chat template drops, moves or repeats a turn")
    pieces[1::2] = [turn["content"] for turn in turns]
    if "".join(pieces) != template_text(tokenizer, turns, add_generation_prompt):
        raise UserError("the chat template reads what the turns say and writes something else for it: take "
                        "such words (/no_think, <think>) out of the turns")
    return pieces[::2]


class ReplyFrame(NamedTuple):
    """What a template writes around a reply, texts."""
    prompt_end: str  # behind the prompt: an empty thought (Qwen3), a channel (gpt-oss), a space (Llama-2)
    reply_start: str | None  # the same where it is the model's to write; None: it cannot be known
    middle_end: str  # up to the control token that ends a reply; "" if there is none
    last_end: str  # the same of the last turn, which some close with another token (gpt-oss)
    opens_thought: bool  # the prompt ends inside a thought, which the reply goes on with (QwQ)


def reply_frame(tokenizer):
    """The ReplyFrame of the tokenizer's template and its settings."""
    return frame_of_template(tokenizer, tokenizer.chat_template, str(tokenizer.chat_template_kwargs))


@functools.lru_cache(maxsize=32)
def frame_of_template(tokenizer, chat_template, settings):  # the last two are there for the cache
    turns = [{"role": role, "content": "-"} for role in ("user", "assistant", "user")]
    prompt = template_text(tokenizer, turns[:1], True)
    last = template_pieces(tokenizer, turns[:2], False)
    middle = template_pieces(tokenizer, turns, False)
    control = control_tokens(tokenizer, len(tokenizer))
    tokens = [control.search(text) for text in (middle[2], last[2])]  # the first one behind the reply
    ends = [token.string[:token.end()] if token else "" for token in tokens]
    opening = f"{last[0]}-{last[1]}"  # up to the reply
    if not opening.startswith(prompt):  # turns are rendered without their prompt's thought (R1-Distill)
        prompt_end, reply_start = "", None
    elif tokenizer.chat_template_kwargs.get("enable_thinking"):
        prompt_end, reply_start = "", opening.removeprefix(prompt)
    else:
        prompt_end, reply_start = opening.removeprefix(prompt), ""
    opens, closes = thought_tags(tokenizer)
    after_thoughts = closes.split(prompt + prompt_end)[-1]
    return ReplyFrame(prompt_end, reply_start, *ends, opens_thought=bool(opens.search(after_thoughts)))


def thought_tags(tokenizer):
    """Regexes of what opens and of what closes a thought: <think> and </think>, and the tokens of this
    tokenizer that are called so, such as [THINK], </seed:think>, <|END_THINKING|>, <|channel>."""
    opens = ["<think>"]
    closes = ["</think>", "<|channel|>final<|message|>"]  # gpt-oss: its other channels are thoughts
    for token in tokenizer.added_tokens_decoder.values():
        if THOUGHT_TAG.fullmatch(token.content):
            tags = closes if re.search("/|end|^<channel", token.content, re.I) else opens
            tags.append(token.content)
    return [re.compile("|".join(map(re.escape, tags))) for tags in (opens, closes)]


def stop_ids(tokenizer, lm=None):
    """Every id that ends a reply: wherever a turn ends in a training sample, and the model's own."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        frame = reply_frame(tokenizer)
        for end in (frame.middle_end, frame.last_end):
            stops.update(template_ids(tokenizer, end)[-1:])
    if lm is not None:
        eos = lm.generation_config.eos_token_id
        stops.update(eos if isinstance(eos, list) else [eos])
    return sorted(stops - {None})


def final_reply(tokenizer, ids, more=""):
    """What others get of a reply: no thoughts, no control tokens, nothing while a thought is not over."""
    opens, closes = thought_tags(tokenizer)
    parts = closes.split(tokenizer.decode(ids) + more)  # with the tags, of which some are control tokens
    if len(parts) == 1 and tokenizer.chat_template and reply_frame(tokenizer).opens_thought:
        return ""
    text = opens.split(parts[-1])[0]
    return control_tokens(tokenizer, len(tokenizer)).sub("", text).strip()


def encode_prompt(tokenizer, turns, announcement=None, where="", reply=None):
    """Ids of all that follows the last assistant turn -> {"before", "after", "reply", "end"}, lists of ints.

    The message goes between `before` and `after`; announcement None leaves it out. Of a system turn S, a
    first human turn A, a reply R and an observation B, in ChatML ([ and ] are its tokens):
        S A, announced    before  [system\\n S ]\\n[user\\n A \\n announcement <bop>
                          after   <eop> ]\\n[assistant\\n
        S A               before  [system\\n S ]\\n[user\\n A         after   ]\\n[assistant\\n
        S A R B           before  (nothing)                      after   ]\\n[user\\n B ]\\n[assistant\\n
    and of a reply to be learned `reply` and `end`, its text and the token that ends it. The released code
    builds the prompts of training and evaluation in two places, and they differ; here this function builds
    every prompt of both, turn by turn, as a growing KV cache reads it. Raises UserError naming `where`."""
    with naming(where):
        *openings, prompt = template_pieces(tokenizer, turns, True)
        frame = reply_frame(tokenizer)
    past, new, part = [], [], "before"  # (text, is it user-supplied?, part)
    for opening, turn in zip(openings, turns):
        new += [(opening, False, part), (turn["content"], True, part)]
        if turn["role"] == "assistant":
            past += [(text, is_supplied, "past") for text, is_supplied, _ in new]
            new = []
        if turn["role"] == "user" and part == "before":  # the first human turn
            part = "after"
            if announcement is not None:
                new[-1] = (f"{turn['content']}\n{announcement}", True, "before")
                new += [(BOP, False, "before"), (EOP, False, "after")]
    # a space at the prompt's end is the start of the reply's first word: many tokenizers join the two
    prompt += frame.prompt_end
    without_space = prompt.rstrip(" ")
    new.append((without_space, False, "after"))
    if reply is not None:
        reply_start = prompt[len(without_space):] + frame.reply_start
        new += [(reply_start, False, "reply"), (reply, True, "reply"), (frame.last_end, False, "end")]
    if control_tokens(tokenizer, len(tokenizer)).match(new[0][0]):
        past = []  # no word joins across it, so that the past need not be tokenized again at every turn
    parts = encode_pieces(tokenizer, past + new)
    del parts["past"]
    return parts


def encode_conversation(tokenizer, turns, announcement=None):
    """A training sample -> (before, after, labels): the message goes between `before` and `after`;
    labels (for `after`) are the ids of every assistant token including its end of turn, -100 elsewhere.
    No label ever lies in `before`. Raises UserError."""
    frame = reply_frame(tokenizer)
    if not frame.last_end:
        raise UserError("the chat template ends assistant turns without a control token, so a reply would "
                        "never end: use a template that writes the end-of-turn token")
    if frame.reply_start is None:
        raise UserError("the chat template opens a reply otherwise than it renders one (with a thought that "
                        "is not in the turn?): train with a template that does both alike")
    middle_end = template_ids(tokenizer, frame.middle_end)[-1:]  # its control token
    replies = {k: turn.get("learn", True) for k, turn in enumerate(turns) if turn["role"] == "assistant"}
    if not any(replies.values()):
        raise UserError("no assistant turn to learn from")
    template_pieces(tokenizer, turns[:max(replies) + 1], False)  # refuses replies that it would write otherwise
    before, chunks, was_learned = [], [], False  # chunks of `after`: (ids, are they labels?)
    for k, is_learned in replies.items():
        part = encode_prompt(tokenizer, turns[:k], announcement, reply=turns[k]["content"])
        prompt, n_end = part["after"], 0
        if was_learned:  # a prompt after a reply opens with that reply's end
            if not set(middle_end) & set(prompt):
                raise UserError(f"the chat template does not end a reply before turn {k}: two in a row?")
            n_end = prompt.index(middle_end[0]) + 1
        before += part["before"]
        chunks += [(prompt[:n_end], True), (prompt[n_end:], False), (part["reply"], is_learned)]
        was_learned = is_learned
    after, labels = [], []
    for ids, is_label in [*chunks, (part["end"], was_learned)]:
        after += ids
        labels += ids if is_label else [-100] * len(ids)
    return before, after, labels


def words_of_states(tokenizer, plan, token_ends):
    """For each token of the sender's plan, and so for each state, the ids of this tokenizer that share characters
    with it, at least one. token_ends: where in the plan the sender's tokens end.

        sender  take| mug| 1  ends [4, 8, 10]    this one  ta|ke| mug| |1  ->  [[ta, ke], [mug], [_, 1]]"""
    encoding = tokenizer(plan, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids, token_at = encoding.input_ids, []  # of each character; a space between two tokens is the second's
    for n, (_, end) in enumerate(encoding.offset_mapping):
        token_at += [n] * (end - len(token_at))
    words = []
    for start, end in zip([0, *token_ends], token_ends):
        start = min(start, end - 1, len(token_at) - 1)  # a token without a character goes with the one before it
        shared = dict.fromkeys(token_at[max(0, start):max(1, end)])  # in order, each once
        words.append([ids[n] for n in shared])
    return words


def plan_ids_for(tokenizer, plan, plan_token_ids):
    """Ids of the plan in this tokenizer: the sender's where both share a vocabulary, else the text's."""
    if plan_token_ids and max(plan_token_ids) < len(tokenizer):
        if tokenizer.decode(plan_token_ids, skip_special_tokens=True).strip() == plan.strip():
            return list(plan_token_ids)
    return text_ids(tokenizer, plan)


# ---- 2. Tasks ------------------------------------------------------------------------------------
def read_math_directory(path, split):
    """MATH's own directory, split/subject/N.json; ids are split/subject/N, whatever is read of it."""
    # by number, then subject, so that the first N are a mix of subjects
    files = sorted(pathlib.Path(path, split).glob("*/*.json"),
                   key=lambda file: (len(file.stem), file.stem, file.parent.name))
    if not files:
        raise UserError(f"{path} has no {split}/<subject>/<number>.json, but {sorted(os.listdir(path))}")
    records = []
    for file in files:
        record, subject = read_json(str(file)), file.parent.name
        if not isinstance(record, dict):
            raise UserError(f"{file}: expected one problem, a JSON object")
        records.append({"type": subject, **record, "id": f"{split}/{subject}/{file.stem}"})
    return records


def read_dataset(path, split):
    """The records of MATH's directory, a save_to_disk folder, a Parquet file or a hub dataset."""
    on_disk = glob.glob(os.path.join(glob.escape(path), "dataset_*.json"))
    if os.path.isdir(path) and not on_disk:
        return read_math_directory(path, split)
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.parquet)", path)
    if not os.path.exists(path) and not is_name:
        raise UserError(f"no file or directory {path}")
    try:
        import datasets  # only other people's files need it
        if on_disk:
            data = datasets.load_from_disk(path)
            return (data[split] if isinstance(data, dict) else data).to_list()
        if os.path.exists(path):
            return datasets.load_dataset("parquet", data_files=glob.escape(path), split="train").to_list()
        # some copies of MATH have a configuration per subject; others one more with all of them
        names = datasets.get_dataset_config_names(path)
        names = [name for name in ("default", "all", "main") if name in names][:1] or names
        return [record for name in names for record in datasets.load_dataset(path, name, split=split)]
    except ImportError:
        raise UserError("this needs datasets: pip install datasets") from None
    except Exception as error:  # the errors of datasets and of the hub have no class in common
        raise UserError(f"{path} is not a JSON or Parquet file, a save_to_disk folder or a hub dataset with a "
                        f"split {split}: {first_line(error)}") from None


def read_records(path, split=None):
    """The records of a JSON file or, given a split, of what `read_dataset` reads. Raises UserError."""
    if split is None or path.endswith((".json", ".jsonl", ".ndjson")):
        records = read_json(path)
    else:
        records = read_dataset(path, split)
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path}: expected a non-empty list of records")
    return records


def find_field(records, field, advice):
    """The field to read, "" for none, of a name that the user gave or of a tuple of names, of which the first
    that occurs is taken. Raises UserError, with advice, for a record without it."""
    if isinstance(field, tuple):
        names = set().union(*records)
        field = next((name for name in field if name in names), "")
    for n, record in enumerate(records):
        if field and field not in record:
            raise UserError(f"record {n} (id {record.get('id')}) has no field '{field}', its fields are "
                            f"{', '.join(record)}; {advice}")
    return field


def task_texts(records, task_turn, field=""):
    """The task of each record: a field's text or, without one, that of a human turn. Raises UserError."""
    texts = []
    for n, record in enumerate(records):
        with naming(f"record {n} (id {record.get('id')})"):
            text = record[field] if field else human_text(read_turns(record)[1], task_turn)
            if not is_text(text) or not text.strip():
                raise UserError("the task is empty or not a text")
            texts.append(text.strip())
    if not field and task_turn == 0:
        check_openings(records)
    return texts


def record_ids(records, id_field, texts):
    """The ids of records: those of their field or, if id_field is "", a hash of each task's text, so that a sorted
    file finds its own messages or none. Equal texts are numbered: b2f4, b2f4-1. Raises UserError for ids that are no
    unique texts, and where records of equal texts differ: nothing would tell whose message is whose."""
    ids, earlier = {}, collections.defaultdict(list)  # records by text
    for record, text in zip(records, texts):
        if id_field:
            task_id = str(record[id_field])
        else:
            equal = earlier[text]
            if equal and equal[0] != record:
                raise UserError(f"two records have the same task and are not the same ({text[:60]!r}): "
                                f"give each an 'id'")
            task_id = f"{seed_for('task', text):016x}" + (f"-{len(equal)}" if equal else "")
            equal.append(record)
        if task_id in ids or task_id == "__metadata__" or not is_text(task_id):
            raise UserError(f"id {task_id!r} occurs twice, is reserved or no text: give each its own 'id'")
        ids[task_id] = record
    return list(ids)


def reference_text(record, field):
    """A reference as text, None without a field. GSM8K's last line "#### 42" is a box. Raises UserError."""
    if not field:
        return None
    text = record[field]
    if type(text) is int:  # and no bool
        text = str(text)
    if isinstance(text, float) and math.isfinite(text):
        text = np.format_float_positional(text, trim="-")  # 0.00001, not 1e-05
    if not is_text(text) or not text.strip():
        raise UserError(f"field '{field}' holds no text and no number")
    return re.sub(r"^#### *(.+?)\s*\Z", r"\\boxed{\1}", text, flags=re.M)


def of_subjects(tasks, subjects):
    """The tasks of these subjects; "Counting & Probability" and counting_and_probability are the same."""
    def key(name):
        return re.sub(r"[\W_]+", "_", str(name).lower().replace("&", "and"))

    names = {key(task["type"]): str(task["type"]) for task in tasks if "type" in task}
    wanted = {key(subject) for subject in subjects}
    unknown = wanted - set(names)
    if unknown:
        raise UserError(f"no subject {min(unknown)}, but {', '.join(names.values()) or 'none at all'}")
    return [task for task in tasks if key(task.get("type")) in wanted]


def load_tasks(path, id_field=ID_FIELDS, task_field=TASK_FIELDS, response_field=RESPONSE_FIELDS,
               task_turn=0, split="train", subjects=None, max_samples=None, answer_field=ANSWER_FIELDS,
               plan_field=""):
    """A dataset -> [{"id", "task", "reply", "answer", "plan"?, "type"?, "level"?}]. Raises UserError.

    Fields are names, tuples of names to try, or "" for none: reply and answer are then None, the task is human
    turn `task_turn` of the conversations. A reply that is an answer alone becomes a box."""
    records, tasks = read_records(path, split), []
    with naming(path):
        id_field = find_field(records, id_field, "see --id_field")
        task_field = find_field(records, task_field, "see --task_field")
        response_field = find_field(records, response_field, "see --response_field")
        answer_field = find_field(records, answer_field, "see --answer_field")
        find_field(records, plan_field, "see --plan_field")
        texts = hashed = task_texts(records, task_turn, task_field)
        if not id_field and all(record.keys() & {"conversations", "messages"} for record in records):
            hashed = task_texts(records, task_turn)  # as the trainers do, who know no --task_field
        for task_id, text, record in zip(record_ids(records, id_field, hashed), texts, records):
            with naming(f"id {task_id}"):
                reply = reference_text(record, response_field)
                answer = reference_text(record, answer_field)
            if reply and response_field == answer_field and "\\boxed" not in reply:
                reply = f"\\boxed{{{reply}}}"
            task = {"id": task_id, "task": text, "reply": reply, "answer": answer}
            if plan_field:
                task["plan"] = record[plan_field]
            labels = {"type": record.get("type", record.get("subject")), "level": record.get("level")}
            tasks.append(task | {name: label for name, label in labels.items() if label is not None})
        if subjects:
            tasks = of_subjects(tasks, subjects)
        return tasks[:max_samples]


# ---- 3. Training samples -------------------------------------------------------------------------
class Conversations:
    """The samples of a file, encoded and checked, in lists by position; latents are read when a batch needs
    them. kind: what their messages are, "latent", "text" or "none". Raises UserError."""

    def __init__(self, path, tokenizer, shards=None, kind="latent", announcement=PLAN_ANNOUNCEMENT,
                 task_turn=0, max_length=2**31, max_message=2048):
        self.path, self.tokenizer, self.shards = path, tokenizer, shards
        self.sender_dim = shards.hidden_size if shards else None
        records = read_records(path)
        with naming(path):
            texts = task_texts(records, task_turn)
            self.ids = record_ids(records, find_field(records, ID_FIELDS, "give each an 'id'"), texts)
            # turn 0 of --task_turn opens every game: the actor keeps it
            self.instruction = task_texts(records[:1], 0)[0] if task_turn else None
        self.turns = []  # [{"role", "content", "learn"}]
        self.encoded = []  # (before, after, labels)
        self.plans = []  # ids
        self.tasks = []  # what tells tasks apart
        self.lengths, self.n_labels = [], []
        said = shards.records if shards else {}  # {id: {"task", "plan", "plan_token_ids", ...}}
        rank, _, _ = this_rank()
        for n, record in enumerate(progress(records, rank, desc=f"read {path}", unit="sample", leave=False)):
            with naming(f"{path}: id {self.ids[n]}"):
                stored = said.get(self.ids[n], {})
                if kind == "latent" and not stored:
                    raise UserError("no message of this id in --hidden_data: run collect.py on this very record")
                turns = to_turns(record, task_turn)
                with_message = announcement if kind != "none" else None
                before, after, labels = encode_conversation(tokenizer, turns, with_message)
                plan_ids = read_plan(record, stored, tokenizer) if kind != "none" else []
                message_length = shards.lengths[self.ids[n]] if kind == "latent" else len(plan_ids)
                if message_length > max_message:
                    raise UserError(f"a message of {message_length} states exceeds --prepended_length "
                                    f"{max_message}: raise it, or collect with --c {max_message}")
                length = len(before) + max(message_length, len(plan_ids)) + len(after)
                if length > max_length:
                    raise UserError(f"{length} tokens with its message exceed the context of {max_length}: "
                                    f"shorten the sample, or raise --model_max_length if the model allows it")
            self.turns.append(turns)
            self.encoded.append((before, after, labels))
            self.plans.append(plan_ids)
            # what the sender was asked, where that is known: all actors may be asked the same
            self.tasks.append(stored.get("task") or texts[n])
            self.lengths.append(length)
            self.n_labels.append(len(labels) - labels.count(-100))

    def __len__(self):
        return len(self.ids)

    def words(self, n):
        """The ids that each state of record n's message stands for, [[id, ...], ...]. Raises UserError."""
        record = self.shards.records[self.ids[n]]
        if not record.get("token_ends") or self.shards.sender.get("c"):
            raise UserError(f"{self.shards.directory}: id {self.ids[n]}: no word for each state (messages of latent "
                            f"steps, of --c, or collected before words were kept): collect whole plans")
        plan = record["plan"]
        ids = record["plan_token_ids"]
        if plan_ids_for(self.tokenizer, plan, ids) == ids:  # one vocabulary: each byte of an emoji has its own
            return [[token] for token in ids]
        return words_of_states(self.tokenizer, plan, record["token_ends"])

    def sample(self, n, kind, ratio=0.0, source=None):
        """Record n with the message of record `source` (default n), a share `ratio` of it words of the plan."""
        source = n if source is None else source
        if kind == "none":
            return build_sample(*self.encoded[n])
        if kind == "text":
            return build_sample(*self.encoded[n], self.plans[source], ratio=1.0)
        return build_sample(*self.encoded[n], self.plans[source], self.shards[self.ids[source]], ratio)


def check_openings(records):
    """Raises UserError for a file like ETO's (instruction, "OK", task) that is read without --task_turn."""
    openings = [[turn["content"] for turn in read_turns(record)[1][:3]] for record in records]
    texts = [set(column) for column in zip(*openings)]  # of turns 0, 1 and 2, where all records have them
    if [len(column) > 1 for column in texts] == [False, False, True]:  # only turn 2 tells them apart
        reply, = texts[1]
        if len(reply) < 20:
            raise UserError(f"all conversations open with the same turn and the reply {reply!r}, so the task "
                            f"comes after them: give --task_turn 2")


def read_plan(record, stored, tokenizer):
    """Ids of a sample's plan: of what the sender wrote or, without a message, of its record's. Raises UserError."""
    plan = stored.get("plan") or record.get("plan") or ""
    if not is_text(plan):
        raise UserError(f"its plan is not a text, found {str(plan)[:80]!r}")
    ids = plan_ids_for(tokenizer, plan, stored.get("plan_token_ids"))
    if not ids or not plan.strip():  # control tokens alone are no words
        raise UserError("empty plan: collect it again, or give the record a 'plan'")
    return ids


def show_sample(tokenizer, sample):
    """A training sample, decoded: supervised tokens between » and «, latents counted in their place."""
    def look(pair):
        token, label = pair
        return token == LATENT, label != -100

    text = ""
    for (is_latent, learned), run in itertools.groupby(zip(sample["input_ids"], sample["labels"]), look):
        ids = [token for token, _ in run]
        words = f"[{len(ids)} latents]" if is_latent else tokenizer.decode(ids)
        text += f"»{words}«" if learned else words
    return text


@functools.lru_cache(maxsize=2)
def permutation(n, *seed):
    generator = torch.Generator().manual_seed(seed_for("order", *seed))
    return torch.randperm(n, generator=generator).tolist()


def global_batch(step, indices, size, seed):
    """[(draw, n)] of one optimizer step, from a stream of permutations of the `indices`, one per epoch. It
    depends on the step alone, so any number of ranks and any restart see the same batch:
        indices a b c, size 2, permutations [c a b] [b c a]  ->  step 0: (0, c) (1, a)   step 1: (2, b) (3, b)"""
    batch = []
    for draw in range(step * size, (step + 1) * size):
        epoch, place = divmod(draw, len(indices))
        batch.append((draw, indices[permutation(len(indices), seed, epoch)[place]]))
    return batch


def another_task(n, tasks, candidates, *seed):
    """One of `candidates` whose task differs from tasks[n]: never n itself, for any batch size or number of
    ranks (the released code's pool holds the sample itself). Raises UserError if all tasks are the same."""
    generator = torch.Generator().manual_seed(seed_for("another", *seed))
    if all(tasks[other] == tasks[n] for other in candidates):  # ends at the first other one
        raise UserError("a message of another task is needed, but all tasks are the same: add samples")
    while True:
        other = candidates[torch.randint(len(candidates), (), generator=generator).item()]
        if tasks[other] != tasks[n]:
            return other


def train_and_eval(train_file, eval_file, eval_ratio, seed, tokenizer, **reading):
    """(data, indices to train on, held-out data, held-out indices); held out is eval_file or, without one, a
    part of the same data, chosen by id whatever the order of the file. reading: what `Conversations` takes."""
    data = Conversations(train_file, tokenizer, **reading)
    if eval_file:
        eval_data = Conversations(eval_file, tokenizer, **reading)
        return data, range(len(data)), eval_data, range(len(eval_data))
    by_hash = sorted(range(len(data)), key=lambda n: seed_for("eval", seed, data.ids[n]))
    n_eval = round(eval_ratio * len(data))
    if n_eval >= len(data):
        raise UserError(f"{train_file} has no training samples: lower --eval_ratio, or add some")
    return data, sorted(by_hash[n_eval:]), data, sorted(by_hash[:n_eval])

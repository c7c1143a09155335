"""
What the stages read.

    1. prompts            conversations -> token ids and labels; one function builds them for training and evaluation
    2. tasks              what a sender is asked: files, MATH's directory, a hub dataset
    3. training samples   what an actor learns from: conversations with their messages
"""
import bisect
import functools
import glob
import importlib
import itertools
import json
import os
import pathlib
import re

import numpy as np
import torch
from safetensors.torch import load_file

from common import UserError, is_text, progress, read_json, seed_for, this_rank
from model import BOP, EOP, build_sample, template_text

# ------------------------------------------------------------------------------------------------
# 1. Prompts

PLAN_ANNOUNCEMENT = "Another agent has thought about this task. Its plan:"
PLAN_PROMPT = "Please provide a general plan to solve this task.\nThe task is: {task}"
MATH_PROMPT = ("Another agent will solve the problem below, you only plan. Give a short plan: the ideas and the steps "
               "that lead to the solution, in order and in general terms. Do no calculation and do not state the "
               "answer.\nThe problem is: {task}")
MATH_QUESTION = "{task}\nPut the final answer in \\boxed{}."  # what the actor reads, in train.json and in eval_math.py
ID_FIELDS = ("unique_id", "id", "idx")  # of MATH-500, of most files, of ToRA: the first that a file has is read
TASK_FIELDS = ("problem", "question")
RESPONSE_FIELDS = ("solution", "answer")
ANSWER_FIELDS = ("answer",)
PRESETS = {  # name: (sender's prompt, conversation turn with the task, its field, field of the reply, actor's question)
    "alfworld": (PLAN_PROMPT, 2, ("task",), "", "{task}"),  # ETO's turns: instruction, OK, task
    "math": (MATH_PROMPT, 0, TASK_FIELDS, RESPONSE_FIELDS, MATH_QUESTION),
    "custom": (PLAN_PROMPT, 0, ("task",), "", "{task}"),
}
ROLES = {"human": "user", "user": "user", "system": "system", "gpt": "assistant", "assistant": "assistant"}


def to_messages(record, task_turn=0, where="conversation"):
    """{"conversations": [{"from", "value"}], "system"?} or {"messages": [{"role", "content"}]} ->
    [{"role", "content"}].

    task_turn t > 0 folds turns 0 and t into the first human turn and drops what lies between: ETO's
    files open with instruction, "OK", task. A system turn stays in front and is not counted. Raises
    UserError naming `where`."""
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' must be a non-empty list of {{'from', 'value'}} turns")
    messages = [read_turn(turn, where) for turn in turns]
    if record.get("system"):
        messages.insert(0, read_turn({"from": "system", "value": record["system"]}, where))
    system = []
    if messages[0]["role"] == "system":
        system = [messages.pop(0)]
    if task_turn:
        check_task_turn(messages, task_turn, where)
        text = messages[0]["content"] + "\n\n" + messages[task_turn]["content"]
        messages = [{"role": "user", "content": text}] + messages[task_turn + 1:]
    if not messages or messages[0]["role"] != "user":
        raise UserError(f"{where}: a conversation starts with a human turn (after an optional system turn)")
    return system + messages


def read_turn(turn, where):
    """{"from", "value"} or {"role", "content"} -> {"role", "content"}. Raises UserError naming `where`."""
    if isinstance(turn, dict):
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if isinstance(role, str) and role in ROLES and is_text(text):
            # many templates trim, so everything is trimmed: training and evaluation agree under any
            # template
            return {"role": ROLES[role], "content": text.strip()}
    raise UserError(f"{where}: each turn needs 'from' (one of {', '.join(ROLES)}) and a text 'value', found "
                    f"{str(turn)[:80]}")


def check_task_turn(messages, task_turn, where):
    if len(messages) <= task_turn:
        raise UserError(f"{where}: --task_turn {task_turn}, but it has {len(messages)} turns")
    for n in (0, task_turn):
        if messages[n]["role"] != "user":
            raise UserError(f"{where}: --task_turn {task_turn} joins turns 0 and {task_turn}, but turn {n} is no "
                            "human one: count from 0, without a system turn")


def text_ids(tokenizer, text):
    """Ids of user-supplied text: a control token spelled inside it ('<bop>', '<|im_end|>') stays plain
    text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def template_ids(tokenizer, text):
    """Ids of what a template writes: its control tokens are control tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_pieces(tokenizer, pieces):
    """[(text, is it user-supplied?, part)] -> {part: ids}.

    Template and text are tokenized as one string, so the ids are those of
    apply_chat_template(tokenize=True) even where words join across the border, and offsets tell where
    each token ends:

        ("[INST] ", "a") ("Find x", "b") (" [/INST]", "c")  ->  {"a": [INST], "b": ▁Find ▁x, "c": ▁ [/INST]}

    Only where user-supplied text spells a control token is each piece tokenized alone."""
    parts = {part: [] for _, _, part in pieces}
    supplied = "\n".join(text for text, is_supplied, _ in pieces if is_supplied)
    if spells_control_token(tokenizer, supplied):
        for text, is_supplied, part in pieces:
            parts[part] += text_ids(tokenizer, text) if is_supplied else template_ids(tokenizer, text)
        return parts
    text = "".join(piece for piece, _, _ in pieces)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = list(itertools.accumulate(len(piece) for piece, _, _ in pieces))
    for token, (start, end) in zip(encoding.input_ids, encoding.offset_mapping):
        n = bisect.bisect_right(ends, max(start, end - 1))  # the piece that its last character is in
        parts[pieces[n][2]].append(token)
    return parts


def template_pieces(tokenizer, messages, add_generation_prompt, where):
    """The rendered template -> [template, text of turn 0, template, text of turn 1, ..., template].

    It is rendered with a mark in place of each turn's text, so template and text are told apart
    whatever they say."""
    roles = " ".join(message["role"] for message in messages)
    marked = [{**message, "content": f"\ue000{n}\ue001"} for n, message in enumerate(messages)]
    try:
        text = template_text(tokenizer, marked, add_generation_prompt)
    except UserError:
        raise
    except Exception as error:  # jinja's: roles that must alternate, no system turn allowed, ...
        raise UserError(f"{where}: the chat template refuses the turns {roles}: {error}") from None
    pieces = re.split("\ue000(\\d+)\ue001", text)
    if pieces[1::2] != [str(n) for n in range(len(messages))]:
        raise UserError(f"{where}: the chat template drops, moves or repeats a turn ({roles})")
    pieces[1::2] = [message["content"] for message in messages]
    return pieces


@functools.lru_cache(maxsize=32)
def control_tokens(tokenizer, n_tokens):
    """The tokens that user-supplied text must not spell; n_tokens, its size, is there for the cache:
    <bop> may come."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def spells_control_token(tokenizer, text):
    return any(token in text for token in control_tokens(tokenizer, len(tokenizer)))


def starts_with_control_token(tokenizer, text):
    return text.startswith(tuple(control_tokens(tokenizer, len(tokenizer))))


def up_to_control_token(tokenizer, text):
    """The start of a text, up to and including its first control token; "" if there is none."""
    for end in range(len(text) + 1):
        if spells_control_token(tokenizer, text[:end]):
            return text[:end]
    return ""


def reply_frame(tokenizer):
    """What a template writes around a reply -> (lead, end in the middle, end of the last turn), texts.

    The lead stands between the generation prompt and the reply: an empty thought (Qwen3), a channel
    (gpt-oss), a space (Mistral, Llama-2). With enable_thinking true there is none: the model writes its
    thoughts itself. A turn ends with a control token, and some templates close the last turn with another
    one than the turns before it (gpt-oss); "" if there is none."""
    settings = json.dumps(tokenizer.chat_template_kwargs, sort_keys=True)
    return frame_of_template(tokenizer, tokenizer.chat_template, settings)


@functools.lru_cache(maxsize=32)
def frame_of_template(tokenizer, chat_template, settings):
    """`reply_frame`, once for each template and its settings."""
    where = f"the chat template of {tokenizer.name_or_path}"
    user, assistant = {"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}
    last = template_pieces(tokenizer, [user, assistant], False, where)
    middle = template_pieces(tokenizer, [user, assistant, user], False, where)
    prompt = template_text(tokenizer, [user], True)
    opening = "".join(last[:3])  # up to the reply
    lead = ""
    if opening.startswith(prompt) and not tokenizer.chat_template_kwargs.get("enable_thinking"):
        lead = opening.removeprefix(prompt)
    middle_end = up_to_control_token(tokenizer, middle[4])
    last_end = up_to_control_token(tokenizer, last[4])
    return lead, middle_end, last_end


def check_reply_end(tokenizer):
    if not reply_frame(tokenizer)[2]:
        raise UserError(f"the chat template of {tokenizer.name_or_path} ends assistant turns without a control token, "
                        f"so a reply would never end: use a template that writes the end-of-turn token")


def stop_ids(tokenizer, lm=None):
    """Every id that ends a reply: wherever a turn ends in a training sample, and the model's own."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        _, middle_end, last_end = reply_frame(tokenizer)
        for end in (middle_end, last_end):
            stops.update(template_ids(tokenizer, end)[-1:])
    if lm is not None:
        eos = lm.generation_config.eos_token_id
        stops.update(eos if isinstance(eos, list) else [eos])
    return sorted(stops - {None})


def final_reply(text):
    """A reply without the thoughts before it: what a game, a grader or a file gets. Thoughts that were cut
    off are no reply."""
    return text.rsplit("</think>", 1)[-1].partition("<think>")[0].strip()


def encode_prompt(tokenizer, messages, announcement=None, where="conversation", reply=None):
    """Ids of all that follows the last assistant turn in `messages` -> (before, after), two lists of ints.

    Where the first human turn is part of the answer, the message goes between `before`, which then ends
    with the announcement and <bop>, and `after`, which starts with <eop>; announcement None leaves all
    of that out. The released code builds the prompts of training and of evaluation in two places, and
    they differ; here every prompt of both is built by this function, turn by turn, as a growing KV
    cache reads it. Where a `reply` is given, two lists follow: its ids and those of its end of turn."""
    texts = template_pieces(tokenizer, messages, True, where)  # template, turn 0, template, ..., template
    lead, _, end_of_turn = reply_frame(tokenizer)
    roles = [message["role"] for message in messages]
    first_human = roles.index("user")
    last_reply = max((n for n, role in enumerate(roles) if role == "assistant"), default=-1)
    part = "before" if last_reply < 0 else "past"
    pieces = []  # (text, is it user-supplied?, part)
    for n in range(len(messages)):
        template, text = texts[2 * n], texts[2 * n + 1]
        pieces.append((template, False, part))
        if n == first_human and part == "before" and announcement is not None:
            pieces.append((f"{text}\n{announcement}", True, "before"))
            pieces.append((BOP, False, "before"))
            pieces.append((EOP, False, "after"))
        else:
            pieces.append((text, True, part))
        if n == last_reply or n == first_human and part == "before":
            part = "after"
    # a space at the lead's end is the start of the reply's first word
    pieces.append((texts[-1] + lead.rstrip(" "), False, "after"))
    if reply is not None:
        spaces = lead[len(lead.rstrip(" ")):]
        pieces += [(spaces, False, "reply"), (reply, True, "reply"), (end_of_turn, False, "end")]
    new = [piece for piece in pieces if piece[2] != "past"]
    if starts_with_control_token(tokenizer, new[0][0]):
        pieces = new  # no word joins across it, so that the past need not be tokenized again at every turn
    parts = encode_pieces(tokenizer, pieces)
    encoded = parts.get("before", []), parts["after"]
    return encoded if reply is None else (*encoded, parts["reply"], parts["end"])


def encode_conversation(tokenizer, messages, announcement=None, where="conversation"):
    """A training sample -> (before, after, labels): the message goes between `before` and `after`;
    labels (for `after`) are the ids of every assistant token including its end of turn, -100 elsewhere.
    No label ever lies in `before`."""
    check_reply_end(tokenizer)
    _, middle_end, _ = reply_frame(tokenizer)
    middle_end = template_ids(tokenizer, middle_end)[-1:]  # its control token
    before, after, labels, last_end = [], [], [], []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head, prompt, reply, last_end = encode_prompt(tokenizer, messages[:k], announcement, where, message["content"])
        prompt_labels = [-100] * len(prompt)
        if labels and middle_end:  # a prompt after a reply opens with that reply's end, as the template writes it there
            n = prompt.index(middle_end[0]) + 1
            prompt_labels[:n] = prompt[:n]
        before += head
        after += prompt + reply
        labels += prompt_labels + reply
    if not labels:
        raise UserError(f"{where}: no assistant turn, nothing to learn from")
    return before, after + last_end, labels + last_end


def plan_ids_for(tokenizer, plan, plan_token_ids):
    """Ids of the plan in this tokenizer: the sender's where both share a vocabulary, else the text's."""
    if plan_token_ids and max(plan_token_ids) < len(tokenizer):
        if tokenizer.decode(plan_token_ids, skip_special_tokens=True).strip() == plan.strip():
            return list(plan_token_ids)
    return text_ids(tokenizer, plan)


# ------------------------------------------------------------------------------------------------
# 2. Tasks

def optional(name):
    """Import a library that only other people's files need. Raises UserError with the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise UserError(f"this needs {package}: pip install {package}") from None


def load_saved(path, split):
    """A folder of datasets' save_to_disk -> Dataset."""
    try:
        data = optional("datasets").load_from_disk(path)
        return data[split] if isinstance(data, dict) else data
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no dataset of save_to_disk with a split {split}: "
                        f"{str(error).splitlines()[0]}") from None


def by_number(file):
    """Order of MATH's files: by number, then subject, so that the first N are a mix of subjects."""
    return len(file.stem), file.stem, file.parent.name


def read_math_directory(path, split):
    """MATH's own directory, split/subject/N.json; ids are split/subject/N, whatever is read of it."""
    files = list(pathlib.Path(path, split).glob("*/*.json"))
    if not files:
        folders = sorted(folder.name for folder in pathlib.Path(path).iterdir() if folder.is_dir())
        raise UserError(f"{path} has no problems {split}/<subject>/<number>.json: use a --split of {folders}")
    records = []
    for file in sorted(files, key=by_number):
        record = read_json(str(file))
        if not isinstance(record, dict):
            raise UserError(f"{file}: expected one problem, found a {type(record).__name__}")
        subject = file.parent.name
        records.append({"type": subject, **record, "id": f"{split}/{subject}/{file.stem}"})
    return records


def read_hub(path, split):
    """A dataset of the hub; some copies of MATH have one configuration per subject."""
    datasets = optional("datasets")
    try:
        records, names = [], datasets.get_dataset_config_names(path)
        for name in names:
            for n, record in enumerate(datasets.load_dataset(path, name, split=split)):
                position = f"{split}/{name}/{n}" if len(names) > 1 else f"{split}/{n}"
                records.append({**record, "id": str(record.get("id", position))})
        return records
    except Exception as error:  # the hub's errors have no class in common
        raise UserError(f"no file or directory {path}, and no hub dataset with a split {split}: "
                        f"{(str(error) or type(error).__name__).splitlines()[0]}") from None


def read_records(path, split):
    """The records of a file, of MATH's directory, of a save_to_disk folder, or of the hub."""
    if glob.glob(os.path.join(path, "dataset_*.json")) or glob.glob(os.path.join(path, split, "dataset_*.json")):
        return load_saved(path, split).to_list()
    if os.path.isdir(path):
        return read_math_directory(path, split)
    if path.endswith((".json", ".jsonl")):
        return read_json(path)
    if os.path.exists(path):
        parquet = optional("pyarrow.parquet")
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"{path} is neither .json, .jsonl nor Parquet: {str(error).splitlines()[0]}") from None
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or path.endswith(".parquet"):
        raise UserError(f"no file or directory {path}")
    return read_hub(path, split)


def subject_key(name):
    """"Counting & Probability" and counting_and_probability are the same subject."""
    return re.sub(r"[\W_]+", "_", str(name).lower().replace("&", "and"))


def find_field(records, field, flag, path):
    """The name of the field to read, "" for none. Raises UserError for a record without it.

    field: a name that the user gave, or a tuple of names, of which the first that occurs is taken."""
    if isinstance(field, tuple):
        candidates = [name for name in field if any(name in record for record in records)]
        field = candidates[0] if candidates else ""
    for n, record in enumerate(records):
        if field and field not in record:
            name = f"id {record['id']}" if "id" in record else f"record {n}"
            raise UserError(f"{path}: {name} has no field '{field}', its fields are {', '.join(record)}; see {flag}")
    return field


def turn_text(record, index, task_fields, where):
    """The task of a record that has no field for it: a turn of its conversations."""
    if index is None or "conversations" not in record:
        raise UserError(f"{where} has no field {' or '.join(map(repr, task_fields))} with the task; its fields are "
                        f"{', '.join(record)}; see --task_field")
    turns = record["conversations"]
    if not isinstance(turns, list) or not -len(turns) <= index < len(turns):
        raise UserError(f"{where}: its conversations have no turn {index}, see --conversations_index")
    turn = turns[index]
    return turn.get("value") if isinstance(turn, dict) else None


def reference_text(record, field, flag, where):
    """A reference reply or answer as text, None without a field for it. GSM8K's last line "#### 42" is
    MATH's box."""
    if not field:
        return None
    text = record[field]
    if isinstance(text, (int, float)):
        text = str(text)
    if not is_text(text) or not text.strip():
        raise UserError(f"{where} has no text in field '{field}', see {flag}")
    return re.sub(r"^#### *(.+?)\s*\Z", r"\\boxed{\1}", text, flags=re.M)


def of_subjects(tasks, subjects, path):
    """The tasks of these subjects, however they are spelled. Raises UserError for one that no task has."""
    names = {subject_key(task["type"]): str(task["type"]) for task in tasks if "type" in task}
    for subject in subjects:
        if subject_key(subject) not in names:
            raise UserError(f"{path} has no subject {subject}, it has: {', '.join(names.values()) or 'none'}")
    wanted = {subject_key(subject) for subject in subjects}
    return [task for task in tasks if subject_key(task.get("type")) in wanted]


def load_tasks(path, id_field=ID_FIELDS, task_field=TASK_FIELDS, response_field=RESPONSE_FIELDS,
               conversations_index=None, split="train", subjects=None, max_samples=None,
               answer_field=ANSWER_FIELDS):
    """A dataset -> [{"id", "task", "reply", "answer", "type"?, "level"?}], checked. reply and answer are
    None where there is no field for them; a reply that is an answer alone becomes a box.

    Fields are names, tuples of names to try, or "" for none (`find_field`). Without ids, the position in
    the whole file is one, so ids do not depend on what is left out. Without a task field, a turn of the
    conversations is the task, unless conversations_index is None."""
    records = read_records(path, split)
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path}: expected a non-empty list of records")
    id_field = find_field(records, id_field, "--id_field", path)
    text_field = find_field(records, task_field, "--task_field", path)
    response_field = find_field(records, response_field, "--response_field", path)
    answer_field = find_field(records, answer_field, "--answer_field", path)
    tasks, seen = [], set()
    for n, record in enumerate(records):
        task_id = str(record[id_field] if id_field else n)
        where = f"{path}: id {task_id}"
        if task_id in seen or task_id == "__metadata__":
            raise UserError(f"{where} occurs twice (or is reserved): ids must be unique, see --id_field")
        seen.add(task_id)
        if text_field:
            text = record[text_field]
        else:
            text = turn_text(record, conversations_index, task_field, where)
        if not is_text(text) or not is_text(task_id) or not text.strip():
            raise UserError(f"{where}: the task is empty or not a text")
        reply = reference_text(record, response_field, "--response_field", where)
        answer = reference_text(record, answer_field, "--answer_field", where)
        if response_field and response_field == answer_field and "\\boxed" not in reply:
            reply = f"\\boxed{{{reply}}}"
        task = {"id": task_id, "task": text.strip(), "reply": reply, "answer": answer}
        subject = record.get("type", record.get("subject"))
        if subject is not None:
            task["type"] = subject
        if record.get("level") is not None:
            task["level"] = record["level"]
        tasks.append(task)
    if subjects:
        tasks = of_subjects(tasks, subjects, path)
    return tasks[:max_samples]


# ------------------------------------------------------------------------------------------------
# 3. Training samples

class Conversations:
    """The samples of a file, encoded and checked, in lists by position; latents are read when a batch
    needs them."""

    def __init__(self, path, tokenizer, shards=None, message="latent", announcement=PLAN_ANNOUNCEMENT, task_turn=0,
                 max_length=2**31, max_message=2048, sender_dim=None):
        self.path, self.shards, self.sender_dim = path, shards, sender_dim
        self.records = read_json(path)
        check_records(self.records, path)
        self.ids = [str(record["id"]) for record in self.records]
        self.messages = []  # [{"role", "content"}]
        self.encoded = []  # (before, after, labels)
        self.plans = []  # ids
        self.tasks = []  # what tells tasks apart
        self.message_lengths, self.lengths, self.n_labels = [], [], []
        for n in progress(range(len(self.ids)), this_rank()[0], desc=f"read {path}", unit="sample", leave=False):
            where = f"{path}: id {self.ids[n]}"
            messages = to_messages(self.records[n], task_turn, where)
            plan_ids, message_length = [], 0
            with_message = announcement if message != "none" else None
            encoded = encode_conversation(tokenizer, messages, with_message, where)
            if message == "latent":
                message_length = self.latent_length(n, where)
            if message != "none":
                plan_ids = self.plan_ids(n, tokenizer, where)
            if message == "text":
                message_length = len(plan_ids)
            before, after, labels = encoded
            length = len(before) + max(message_length, len(plan_ids)) + len(after)
            check_lengths(message_length, length, max_message, max_length, where)
            # what the sender was asked, where that is known: all actors may be asked the same
            self.tasks.append(self.stored(n).get("task") or first_human_turn(messages))
            self.messages.append(messages)
            self.encoded.append(encoded)
            self.plans.append(plan_ids)
            self.message_lengths.append(message_length)
            self.lengths.append(length)
            self.n_labels.append(len(labels) - labels.count(-100))
        # turn 0 of --task_turn opens every game: the actor keeps it
        self.instruction = first_human_turn(to_messages(self.records[0])) if task_turn else None

    def __len__(self):
        return len(self.ids)

    def stored(self, n):
        """What the shards hold of sample n: {"task", "plan", "plan_token_ids", ...}, or {}."""
        if self.shards is None or self.ids[n] not in self.shards:
            return {}
        return self.shards.records[self.ids[n]]

    def plan_ids(self, n, tokenizer, where):
        """Ids of the plan of sample n: of its text in the file, or of what the sender wrote."""
        plan, written = self.records[n].get("plan"), self.stored(n).get("plan_token_ids")
        if plan:
            written = None
        plan = plan or self.stored(n).get("plan", "")
        if not is_text(plan):
            raise UserError(f"{where}: its plan is not a text, found {str(plan)[:80]!r}")
        ids = plan_ids_for(tokenizer, plan, written)
        if not ids:
            raise UserError(f"{where}: empty plan: collect it again, or give the record a 'plan'")
        return ids

    def latent_length(self, n, where):
        """The length of sample n's latent message. Raises UserError if there is none, or of another
        width."""
        if has_latents(self.records[n]):
            length, width = self.latents(n).shape
        elif not self.stored(n):
            raise UserError(f"{where} has no message in {self.shards.directory if self.shards else '--hidden_data'}: "
                            f"run collect.py on this task, or remove the record")
        else:
            length, width = self.shards.lengths[self.ids[n]], self.shards.hidden_size
        self.sender_dim = self.sender_dim or width
        if width != self.sender_dim:
            raise UserError(f"{where}: its message is {width} wide, expected {self.sender_dim}: one actor reads one "
                            f"sender")
        return length

    def latents(self, n):
        """The raw message of sample n, (L, d_s): from the record itself, from its file, or from the
        shards."""
        record = self.records[n]
        if not has_latents(record):
            return self.shards[self.ids[n]]
        try:
            latents = read_latents(record)
            if latents.dim() != 2 or not len(latents) or not torch.isfinite(latents).all():
                raise ValueError(f"expected finite numbers of shape (L, d), found shape {tuple(latents.shape)}")
        except Exception as error:  # whatever a foreign file holds, the user hears which sample it was
            path = record.get("hidden_state_path", "")
            raise UserError(f"{self.path}: id {self.ids[n]}: cannot read its hidden_state {path}: {error}") from None
        return latents

    def sample(self, n, message, ratio=0.0, source=None):
        """Sample n with the message of sample `source` (default n); a share `ratio` of it are words of
        the plan."""
        source = n if source is None else source
        if message == "none":
            return build_sample(*self.encoded[n])
        plan_ids = self.plans[source]
        if message == "text":
            return build_sample(*self.encoded[n], plan_ids, ratio=1.0)
        return build_sample(*self.encoded[n], plan_ids, self.latents(source), ratio)


def first_human_turn(messages):
    return next(message["content"] for message in messages if message["role"] == "user")


def has_latents(record):
    return "hidden_state" in record or "hidden_state_path" in record


def read_latents(record):
    """hidden_state (nested lists) or hidden_state_path (.npy, .safetensors, .pt) of a record -> (L, d)."""
    path = record.get("hidden_state_path")
    if path is None:
        return torch.tensor(record["hidden_state"], dtype=torch.float32)
    if path.endswith(".npy"):
        return torch.from_numpy(np.load(path))
    if path.endswith(".safetensors"):
        latents, = load_file(path).values()
        return latents
    return torch.load(path, weights_only=True, map_location="cpu")


def check_records(records, path):
    """Raises UserError unless these are records with conversations and an id each, all different."""
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a non-empty list of records with id and conversations")
    seen = set()
    for n, record in enumerate(records):
        if not isinstance(record, dict) or "id" not in record:
            raise UserError(f"{path}: record {n} needs an 'id' and 'conversations', found {str(record)[:80]}")
        task_id = str(record["id"])
        if "conversations" not in record and "messages" not in record:
            raise UserError(f"{path}: id {task_id} has no 'conversations', found {', '.join(record)}")
        if task_id in seen or not is_text(task_id):
            raise UserError(f"{path}: id {task_id!r} occurs twice or is not a text: ids must be unique")
        seen.add(task_id)


def check_lengths(message_length, length, max_message, max_length, where):
    if message_length > max_message:
        raise UserError(f"{where}: a message of {message_length} states exceeds --prepended_length {max_message}: raise "
                        f"it, or collect with --c {max_message}")
    if length > max_length:
        raise UserError(f"{where}: {length} tokens with its message exceed the context of {max_length}: shorten the "
                        f"sample, or raise --model_max_length if the model allows it")


@functools.lru_cache(maxsize=2)
def permutation(n, *seed):
    generator = torch.Generator().manual_seed(seed_for("order", *seed))
    return torch.randperm(n, generator=generator).tolist()


def global_batch(step, samples, size, seed):
    """[(draw, sample)] of one optimizer step, from a stream of permutations of `samples`, one per
    epoch. It depends on the step alone, so any number of ranks and any restart see the same batch:

        samples a b c, size 2, permutations [c a b] [b c a]  ->  step 0: (0, c) (1, a)   step 1: (2, b) (3, b)"""
    batch = []
    for draw in range(step * size, (step + 1) * size):
        epoch, place = divmod(draw, len(samples))
        batch.append((draw, samples[permutation(len(samples), seed, epoch)[place]]))
    return batch


def another_task(n, tasks, candidates, *seed):
    """One of `candidates` whose task differs from tasks[n]: never n itself, for any batch size or
    number of ranks (the released code's pool holds the sample itself). Raises UserError if all tasks
    are the same."""
    generator = torch.Generator().manual_seed(seed_for("another", *seed))
    for _ in range(64):
        other = candidates[torch.randint(len(candidates), (), generator=generator).item()]
        if tasks[other] != tasks[n]:
            return other
    others = [other for other in candidates if tasks[other] != tasks[n]]  # slow for many samples: only if need be
    if not others:
        raise UserError("a message of another task is needed, but all tasks are the same: add samples")
    return others[torch.randint(len(others), (), generator=generator).item()]


def split_eval(data, ratio, seed):
    """Positions of training and held-out samples; a sample's side depends on its id, not on the order
    of the file."""
    everything = range(len(data))
    by_hash = sorted(everything, key=lambda n: seed_for("eval", seed, data.ids[n]))
    size = round(ratio * len(data))
    return sorted(by_hash[size:]), sorted(by_hash[:size])

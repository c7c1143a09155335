"""
What the stages read.

    1. tasks      what a sender is asked: files, MATH's directory, a hub dataset
    2. rows       what an actor learns from: conversations with their messages
    3. variants   what an actor is told in an evaluation (paper, baselines and ablations)
"""
import functools
import glob
import importlib
import math
import os
import re

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

from common import UserError, is_text, read_json, seed_for, this_rank
from lm import load_config, load_tokenizer
from model import (BOP, PLAN_ANNOUNCEMENT, assemble, encode_conversation, open_shards, plan_ids_for, read_info,
                   render_turn, to_messages)

# ---------------------------------------------------------------------------------------------------------------------
# 1. Tasks

def optional(name):
    """Import a library that only other people's files need."""
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
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: no dataset of save_to_disk with a split {split}: {str(e).splitlines()[0]}") from None


def read_records(path, split):
    """The records of a file, of MATH's directory (split/subject/N.json), of a save_to_disk folder, or of the hub."""
    if glob.glob(os.path.join(path, "dataset_*.json")) or glob.glob(os.path.join(path, split, "dataset_*.json")):
        return load_saved(path, split).to_list()
    if os.path.isdir(path):
        names = {os.path.relpath(name, path).removesuffix(".json").replace(os.sep, "/"): name
                 for name in glob.glob(os.path.join(path, split, "*", "*.json"))}
        if not names:
            raise UserError(f"{path} has no problems {split}/<subject>/<number>.json: use a --split of "
                            f"{sorted(n for n in os.listdir(path) if os.path.isdir(os.path.join(path, n)))}")
        records = []
        for key in sorted(names, key=lambda key: (len(key.split("/")[2]), key.split("/")[2], key)):
            record = read_json(names[key])  # by number, then subject: the first N are a mix of subjects
            if not isinstance(record, dict):
                raise UserError(f"{names[key]}: expected one problem, found a {type(record).__name__}")
            records.append({"type": key.split("/")[1], **record, "id": key})
        return records
    if path.endswith((".json", ".jsonl")):
        return read_json(path)
    if os.path.exists(path):
        parquet = optional("pyarrow.parquet")
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as e:  # ArrowInvalid is a ValueError
            raise UserError(f"{path} is neither .json, .jsonl nor Parquet: {str(e).splitlines()[0]}") from None
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or path.endswith(".parquet"):
        raise UserError(f"no file or directory {path}")
    datasets = optional("datasets")
    try:  # some hub copies of MATH have one configuration per subject
        names = datasets.get_dataset_config_names(path)
        return [{**row, "id": str(row.get("id", f"{split}/{name}/{n}" if len(names) > 1 else f"{split}/{n}"))}
                for name in names for n, row in enumerate(datasets.load_dataset(path, name, split=split))]
    except Exception as e:  # the hub's errors have no class in common
        raise UserError(f"no file or directory {path}, and no hub dataset with a split {split}: "
                        f"{(str(e) or type(e).__name__).splitlines()[0]}") from None


def subject_key(name):
    """"Counting & Probability" and counting_and_probability are the same subject."""
    return re.sub(r"[\W_]+", "_", str(name).lower().replace("&", "and"))


def load_tasks(path, id_field="id", task_field="problem", response_field="solution", conversations_index=0,
               split="train", subjects=None, max_samples=None):
    """A dataset -> [{"id", "task", "type"?, "level"?, "reply"}], checked. Ids do not depend on what is left out."""
    records = read_records(path, split)
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path}: expected a non-empty list of records")
    tasks, seen = [], set()
    for n, record in enumerate(records):
        task_id = str(record.get(id_field, n))  # without ids, the position in the whole file
        where = f"{path}: id {task_id}"
        if task_id in seen or task_id == "__metadata__":
            raise UserError(f"{where} occurs twice (or is reserved): ids must be unique")
        seen.add(task_id)
        if task_field in record:
            task = record[task_field]
        elif "conversations" in record:
            turns = record["conversations"]
            if not isinstance(turns, list) or not -len(turns) <= conversations_index < len(turns):
                raise UserError(f"{where}: its conversations have no turn {conversations_index}, see "
                                f"--conversations_index")
            turn = turns[conversations_index]
            task = turn.get("value") if isinstance(turn, dict) else None
        else:
            raise UserError(f"{where} has no field '{task_field}' and no conversations; its fields are "
                            f"{', '.join(record)}; see --task_field")
        if not is_text(task) or not is_text(task_id) or not task.strip():
            raise UserError(f"{where}: the task is empty or not a text")
        if response_field and not is_text(record.get(response_field)):
            raise UserError(f"{where} has no text in field '{response_field}', see --response_field")
        labels = {"type": record.get("type", record.get("subject")), "level": record.get("level")}
        tasks.append({"id": task_id, "task": task.strip(), "reply": record.get(response_field),
                      **{k: v for k, v in labels.items() if v is not None}})
    if subjects:
        found = {subject_key(t["type"]): str(t["type"]) for t in tasks if "type" in t}
        unknown = [s for s in subjects if subject_key(s) not in found]
        if unknown:
            raise UserError(f"{path} has no subject {unknown[0]}, it has: {', '.join(found.values()) or 'none'}")
        wanted = set(map(subject_key, subjects))
        tasks = [t for t in tasks if "type" in t and subject_key(t["type"]) in wanted]
    return tasks[:max_samples]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Rows

class Conversations:
    """The rows of a file, encoded and checked, in lists by position; messages are read when a batch needs them."""

    def __init__(self, path, args, tokenizer, shards, max_length, width=None):
        announcement = args.plan_announcement if args.message != "none" else None
        records = read_json(path)
        if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
            raise UserError(f"{path}: expected a list of records with id and conversations")
        self.records, self.shards, self.ids, self.tasks, self.encoded, self.plans = records, shards, [], [], [], []
        self.path, self.messages, self.lengths, self.n_labels, self.message_rows, seen = path, [], [], [], [], set()
        self.width = width  # of the messages: given, or that of the first
        for n, record in enumerate(tqdm(records, f"read {path}", unit="row", delay=2, disable=this_rank()[0] > 0)):
            if "id" not in record or "conversations" not in record:
                raise UserError(f"{path}: record {n} needs 'id' and 'conversations', found {', '.join(record)}")
            row_id = str(record["id"])
            where = f"{path}: id {row_id}"
            if row_id in seen:
                raise UserError(f"{where} occurs twice: ids must be unique")
            seen.add(row_id)
            self.ids.append(row_id)
            messages = to_messages(record["conversations"], args.task_turn, where)
            before, after, labels = encode_conversation(tokenizer, messages, announcement, where)
            stored = shards.records[row_id] if shards is not None and row_id in shards else {}
            plan = record.get("plan") or stored.get("plan", "")
            if not is_text(plan) or not is_text(row_id):
                raise UserError(f"{where}: its id or plan is not a text, found {str(plan)[:80]!r}")
            plan_ids, rows = [], 0
            if args.message != "none":
                plan_ids = plan_ids_for(tokenizer, plan, [] if record.get("plan") else stored.get("plan_token_ids"))
                if not stored and args.message == "latent" and not self.inline(record):
                    raise UserError(f"{where} has no message in {args.hidden_data or '--hidden_data (not given)'}: run "
                                    f"collect.py on this task, or remove the row")
                if not plan_ids:
                    raise UserError(f"{where}: empty plan: collect it again, or give the row a 'plan'")
                if args.message == "latent":
                    rows = len(self.latents(n)) if self.inline(record) else shards.lengths[row_id]
                    width = self.latents(n).shape[1] if self.inline(record) else shards.hidden_size
                    if width != (self.width or width):
                        raise UserError(f"{where}: its message is {width} wide, expected {self.width}: one actor reads "
                                        f"one sender")
                    self.width = width
                else:
                    rows = len(plan_ids)
            if rows > args.prepended_length:
                raise UserError(f"{where}: a message of {rows} rows exceeds --prepended_length "
                                f"{args.prepended_length}: raise it, or collect with --c {args.prepended_length}")
            length = len(before) + max(rows, len(plan_ids)) + len(after)
            if length > max_length:
                raise UserError(f"{where}: {length} tokens with its message exceed the context of {max_length}: "
                                f"shorten the row, or raise --model_max_length if the model allows it")
            # what the sender was asked tells tasks apart, even where all actors are asked the same
            self.tasks.append(stored.get("task") or next(m["content"] for m in messages if m["role"] == "user"))
            self.messages.append(messages)
            self.encoded.append((before, after, labels))
            self.message_rows.append(rows)
            self.plans.append(plan_ids)
            self.lengths.append(length)
            self.n_labels.append(sum(label != -100 for label in labels))

    def __len__(self):
        return len(self.ids)

    @staticmethod
    def inline(record):
        return "hidden_state" in record or "hidden_state_path" in record

    def latents(self, n):
        """The raw message of row n, (L, d_s): from the row itself, from its file, or from the shards."""
        record, where = self.records[n], f"{self.path}: id {self.ids[n]}"
        if not self.inline(record):
            return self.shards[self.ids[n]]
        path = record.get("hidden_state_path")
        try:
            if path is None:
                latents = torch.tensor(record["hidden_state"], dtype=torch.float32)
            elif path.endswith(".npy"):
                latents = torch.from_numpy(np.load(path))
            elif path.endswith(".safetensors"):
                latents, = load_file(path).values()
            else:
                latents = torch.load(path, weights_only=True, map_location="cpu")
            if latents.dim() != 2 or not len(latents) or not torch.isfinite(latents).all():
                raise ValueError(f"expected finite numbers of shape (L, d), found shape {tuple(latents.shape)}")
        except Exception as e:  # whatever a foreign file holds, the user hears which row it was
            raise UserError(f"{where}: cannot read its hidden_state{f' from {path}' if path else ''}: {e}") from None
        return latents

    def row(self, n, message, tenths=0, source=None):
        """Row n with the message of row `source` (default its own); tenths of it are plan tokens."""
        source = n if source is None else source
        if message == "none":
            return assemble(*self.encoded[n])
        if message == "text":
            return assemble(*self.encoded[n], plan_ids=self.plans[source], tenths=10)
        return assemble(*self.encoded[n], plan_ids=self.plans[source], latents=self.latents(source), tenths=tenths)


@functools.lru_cache(maxsize=2)
def permutation(n, *seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_for("order", *seed))).tolist()


def global_batch(step, n, size, seed):
    """[(draw, position)] of one optimizer step, from a stream of permutations, one per epoch. It depends on the step
    alone, so any number of ranks and any restart see the same batch."""
    return [(k, permutation(n, seed, k // n)[k % n]) for k in range(step * size, (step + 1) * size)]


def another_task(n, tasks, *seed):
    """Index of a sample whose task text differs from sample n's; raises UserError if there is none. Never n itself,
    for any batch size or number of ranks (the released code's pool holds the sample itself)."""
    generator = torch.Generator().manual_seed(seed_for("another", *seed))
    for _ in range(64):
        other = torch.randint(len(tasks), (), generator=generator).item()
        if tasks[other] != tasks[n]:
            return other
    others = [i for i, task in enumerate(tasks) if task != tasks[n]]
    if not others:
        raise UserError("a message of another task is needed, but all tasks are the same: add samples")
    return others[torch.randint(len(others), (), generator=generator).item()]


def split_eval(data, ratio, seed):
    """Positions of training and held-out rows; a row's side depends on its id, not on the order of the file."""
    by_hash = sorted(range(len(data)), key=lambda n: seed_for("eval", seed, data.ids[n]))
    held_out = set(by_hash[:round(ratio * len(data))])
    return [n for n in range(len(data)) if n not in held_out], sorted(held_out)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Variants

PERTURBATIONS = ("covgauss0", "covgauss1", "randomrot", "covnoise0.5", "covnoise1.0", "whitenoise")
LATENT_VARIANTS = ("none", "qwen2llama", "cross_task", *PERTURBATIONS)  # none: the message as it is
VARIANTS = (*LATENT_VARIANTS, "text", "no_comm", "cot_full", "no_cot")


def perturb(variant, latents, *seed):
    """Destroy a message's structure but keep chosen statistics (paper, ablations). latents (L, d) -> (L, d), fp32.

    covgauss0: Gaussian with H's covariance, zero mean; covgauss1: and H's mean; randomrot: H's own mean and covariance,
    rows rotated within its row space; covnoise a: H + a * covariance-shaped noise; whitenoise: H + isotropic noise of
    the same total power."""
    H = latents.float()
    L, d = H.shape
    generator = torch.Generator().manual_seed(seed_for(variant, *seed))
    mean = H.mean(0, keepdim=True)
    X = H - mean  # (L, d), centred
    if variant == "randomrot":
        U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        k = int((S > S[0] * max(L, d) * torch.finfo(torch.float32).eps).sum())  # directions under the rank tolerance
        if k == 0:  # one row, or equal rows: nothing to rotate
            return H.clone()
        Q, R = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))
        Q = Q * R.diagonal().sign()  # Haar-distributed
        # the columns of U sum to zero and are orthonormal, and so are those of U Q: mean and covariance both stay
        return (U[:, :k] @ Q * S[:k] @ Vh[:k]).float() + mean
    if variant == "whitenoise":
        std = (X.pow(2).sum() / max(L - 1, 1) / d).sqrt()  # trace of the covariance, spread evenly
        return H + std * torch.randn(L, d, generator=generator)
    noise = torch.randn(L, L, generator=generator) @ X / math.sqrt(max(L - 1, 1))  # rows ~ N(0, cov(H))
    if variant == "covgauss0":
        return noise
    if variant == "covgauss1":
        return noise + mean
    if variant.startswith("covnoise"):
        return H + float(variant[len("covnoise"):]) * noise
    raise UserError(f"unknown perturbation {variant}: one of {', '.join(PERTURBATIONS)}")


def variants_of(args):
    """--variants, each once, under its own name. Raises UserError if the flags about messages contradict each other."""
    variants = list(dict.fromkeys("none" if variant == "latent" else variant for variant in args.variants))
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant}: one of {', '.join(VARIANTS)}")
    if args.latent_steps and not args.sender:
        raise UserError("--latent_steps needs --sender: the student that thinks these steps")
    if args.sender and args.hidden_data and not args.latent_steps:
        raise UserError("--sender without --latent_steps would replace the messages of --hidden_data: give one of them")
    if args.cross_hidden_data and "qwen2llama" not in variants:
        raise UserError("--cross_hidden_data is what the variant qwen2llama reads: add it to --variants")
    if not all(0 <= keep <= 1 for keep in args.keep_ratio):
        raise UserError(f"--keep_ratio takes shares between 0 and 1, got {args.keep_ratio}")
    return variants


def actor_of(variants, model_path, baseline_paths, cross=None, trust_remote_code=False):
    """{variant: the actor's path}, {path: its latent_adapter.json}. cot_full and no_cot have actors of their own, and
    so has qwen2llama where it reads messages `cross` of another sender, beside those that model_path reads."""
    infos = {}
    for path in [model_path, *baseline_paths]:
        load_config(path, trust_remote_code)  # a wrong path is an error before any model is loaded
        infos[path] = read_info(path)
    paths = {}
    for variant in variants:
        paths[variant] = model_path
        if variant in ("cot_full", "no_cot"):
            message = "text" if variant == "cot_full" else "none"
            fitting = [path for path in baseline_paths if infos[path].get("message") == message]
            if not fitting:
                raise UserError(f"{variant} needs its own actor: train one with train_actor.py --message {message} and "
                                f"give it in --baseline_path")
            paths[variant] = fitting[0]
        if variant == "qwen2llama" and cross is not None:
            fitting = [path for path in infos if infos[path].get("sender_hidden_size") == cross.hidden_size]
            if not fitting:
                raise UserError(f"{cross.directory} has messages {cross.hidden_size} wide, no actor of --model_path or "
                                f"--baseline_path reads these: train one on messages of {cross.sender['model']}")
            # of two that read this width, the one that was trained on this sender
            paths[variant] = min(fitting, key=lambda path: infos[path].get("sender") != cross.sender["model"])
        if variant == "text" and load_tokenizer(model_path, trust_remote_code).convert_tokens_to_ids(BOP) is None:
            raise UserError(f"{model_path} knows no {BOP}, so it cannot read a text message: give a trained actor")
    return paths, infos


def check_settings(directory, settings, flag):
    """Results on disk count as done if they were made with the same settings, which settings.json there keeps."""
    path = os.path.join(directory, "settings.json")
    before = read_json(path) if os.path.exists(path) else settings
    changed = [k for k in settings if before.get(k) != settings[k]]
    if changed:
        names = ("set of weights in --model_path or --baseline_path" if k == "weights" else f"--{k}" for k in changed)
        raise UserError(f"{directory} has results with another {', '.join(names)}: give another {flag}")


def open_messages(args, directory, collect, command):
    """{suffix of the label: LatentShards}: those of --hidden_data, and those of a live sender, which is stage 1 run on
    these tasks (`collect` with the arguments `command`), once for each number of latent steps."""
    shards = {"": open_shards(args.hidden_data)} if args.hidden_data else {}
    for steps in (args.latent_steps or [None]) if args.sender else []:
        suffix = f"_k{steps}" if steps else ""
        output_dir = os.path.join(directory, "messages" + suffix)
        collect([*command, "--model_name_or_path", args.sender, "--output_dir", output_dir,
                 "--trust_remote_code", str(args.trust_remote_code), "--torch_dtype", args.torch_dtype,
                 "--batch_size", str(args.sender_batch_size),
                 "--max_new_tokens", str(args.max_plan_tokens), "--seed", str(args.seed),
                 *(["--latent_steps", str(steps)] if steps else []),
                 *(["--prompt_template", args.prompt_template] if args.prompt_template else [])])
        if dist.is_initialized():
            dist.barrier()
        shards[suffix] = open_shards(output_dir)
    return shards


def label_sources(variants, shards, cross, keep_ratios, paths, infos, tasks):
    """The rows of the table -> {label: (messages, share of their rows to keep)}, {label: variant}. A variant that reads
    latents has a row per K and per share. Raises UserError if a message is missing or does not fit its actor."""
    sources, variant_of = {}, {}
    for variant in variants:
        found = {"": cross} if variant == "qwen2llama" and cross is not None else shards
        cells = [("", next(iter(found.values()), None), 1.0)]
        if variant in LATENT_VARIANTS:
            cells = [(suffix + ("" if keep == 1 else f"_keep{keep:g}"), messages, keep)
                     for suffix, messages in found.items() for keep in keep_ratios] or cells
        for suffix, messages, keep in cells:
            check_messages(paths[variant], infos[paths[variant]], variant, messages, tasks)
            sources[variant + suffix], variant_of[variant + suffix] = (messages, keep), variant
    return sources, variant_of


def message_row(actor, messages, n, variant, seed, source, tasks):
    """The first prompt of game n under a variant, as a row for `collate`. messages: its turns so far (one human);
    source: (shards, share of the rows to keep)."""
    tokenizer, task_id, (shards, keep) = actor.tokenizer, tasks[n]["id"], source
    if variant in ("no_comm", "no_cot"):
        before, after = render_turn(tokenizer, messages, where=task_id)
        return assemble(before, after, [-100] * len(after)) | {"message_rows": 0}
    announcement = actor.info.get("plan_announcement", PLAN_ANNOUNCEMENT)
    before, after = render_turn(tokenizer, messages, announcement, where=task_id)
    plan_ids, latents = [], None
    if variant in ("text", "cot_full"):
        record = shards.records[task_id]
        plan_ids = plan_ids_for(tokenizer, record["plan"], record["plan_token_ids"])
    elif variant == "cross_task":
        # a task without a message counts as the same task, so it is never drawn
        texts = [t["task"] if t["id"] in shards else tasks[n]["task"] for t in tasks]
        latents = shards[tasks[another_task(n, texts, "cross_task", seed, task_id)]["id"]]
    elif variant in PERTURBATIONS:
        latents = perturb(variant, shards[task_id], seed, task_id)
    else:
        latents = shards[task_id]
    if latents is not None:
        latents = latents[:round(keep * len(latents))]
    row = assemble(before, after, [-100] * len(after), plan_ids, latents, tenths=10 if plan_ids else 0)
    return row | {"message_rows": len(plan_ids) if latents is None else len(latents)}


def check_messages(actor_path, info, variant, shards, tasks):
    """Everything that can be wrong with a variant's messages, before any model is loaded."""
    if variant in ("no_comm", "no_cot"):
        return
    if variant in LATENT_VARIANTS and info.get("message") != "latent":
        raise UserError(f"{actor_path} has no adapter, so it cannot read a latent message ({variant}): give an actor "
                        f"that train_actor.py wrote with --message latent")
    if shards is None:
        raise UserError(f"variant {variant} needs messages: give --hidden_data or --sender")
    missing = [t["id"] for t in tasks if t["id"] not in shards]
    if missing:
        raise UserError(f"{shards.directory} has no message for {len(missing)} tasks, the first {missing[0]}: run "
                        f"collect.py on these tasks, or give --sender")
    if variant in LATENT_VARIANTS and shards.hidden_size != info["sender_hidden_size"]:
        raise UserError(f"{shards.directory} has messages {shards.hidden_size} wide, the adapter of {actor_path} reads "
                        f"{info['sender_hidden_size']}: collect with its own sender, {info.get('sender')}")
    empty = [t["id"] for t in tasks if not shards.records[t["id"]]["plan"].strip()]
    if variant in ("text", "cot_full") and empty:
        raise UserError(f"{shards.directory}: id {empty[0]} has an empty plan, so there is no text to send: latent "
                        f"steps write none, give --hidden_data with plans")

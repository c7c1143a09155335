"""
What an actor is told in an evaluation: the paper's variants, and all that can be wrong with them.

    1. perturbations   a message whose structure is destroyed while chosen statistics stay
    2. rows            the flags, the actors and the rows of the table
    3. messages        those of a sender that runs now, and the sample that an actor reads
    4. results         differences between rows, the table on screen, the picture, summary.json
"""
import json
import math
import os
import statistics
from collections import namedtuple

import numpy as np
import torch
import torch.distributed as dist

from collect import collect, read_bridge
from common import (UserError, changed_settings, check_output, fingerprint, json_object, plot_bars, positive,
                    read_json, seed_for, task_template, wilson_interval, write_json)
from data import PLAN_ANNOUNCEMENT, encode_prompt, plan_ids_for
from hf import DTYPES, load_config
from model import BOP, build_sample, check_sender, open_shards, read_info

PERTURBATIONS = ("covgauss0", "covgauss1", "randomrot", "covnoise0.5", "covnoise1.0", "whitenoise")
LATENT_VARIANTS = ("latent", "cross_task", *PERTURBATIONS)  # the actor reads states
TEXT_VARIANTS = ("text", "cot_full")  # it reads the plan as text
SILENT_VARIANTS = ("no_comm", "no_cot")  # it is told nothing
VARIANTS = (*LATENT_VARIANTS, *TEXT_VARIANTS, *SILENT_VARIANTS, "self")  # self: asked what the actor is told
DIFFERENCES = {  # name: a row, and the row that is subtracted
    "gain": ("latent", "no_comm"),
    "pairing": ("latent", "cross_task"),
    "presence": ("cross_task", "no_comm"),
    "own_thoughts": ("latent", "self"),
}
MEANINGS = ("gain (latent - no_comm): what a message is worth; "
            "pairing (latent - cross_task): what it is worth that it is about this task",
            "presence (cross_task - no_comm): what a message about something else is worth; "
            "own_thoughts (latent - self): what it is worth that the sender is told more than the actor")
# flags on which no answer depends: they choose rows, or move memory and time
NOT_SETTINGS = ("variants", "latent_steps", "keep_ratio", "batch_size", "sender_batch_size", "trust_remote_code",
                "self_check")
Job = namedtuple("Job", "label run n")  # to be played or answered: row of the table, repetition, number of the task
OTHER_NAMES = {"none": "latent", "qwen2llama": "latent"}  # the released code's, the paper's


# ---- 1. Perturbations ----------------------------------------------------------------------------
def perturb(variant, latents, *seed):
    """Destroy a message's structure but keep chosen statistics (paper, ablations): H, (L, d) of any float dtype ->
    (L, d) in fp32. Its name and `seed` make the random numbers. Raises UserError for an unknown name.

        covgauss0      Gaussian with H's covariance and mean zero
        covgauss1      Gaussian with H's covariance and H's mean
        randomrot      H's whitened states rotated: exactly H's mean and covariance
        covnoise0.5    H + 0.5 * noise with H's covariance (covnoise1.0: + 1 * noise)
        whitenoise     H + noise of the same total power, equal in all directions"""
    H = latents.float()  # (L, d)
    L, d = H.shape
    generator = torch.Generator().manual_seed(seed_for(variant, *seed))
    mean = H.mean(0)  # (d,)
    X = H - mean  # (L, d), centred
    freedom = max(L - 1, 1)
    if variant == "randomrot":
        return rotate(X, generator) + mean
    if variant == "whitenoise":
        total = X.pow(2).sum() / freedom  # the covariance's trace, spread evenly over d directions
        return H + (total / d).sqrt() * torch.randn(L, d, generator=generator)
    # a random mixture of the centred states: each state of the noise is drawn from N(0, cov(H))
    noise = torch.randn(L, L, generator=generator) @ X / math.sqrt(freedom)  # (L, d)
    if variant == "covgauss0":
        return noise
    if variant == "covgauss1":
        return noise + mean
    if variant in ("covnoise0.5", "covnoise1.0"):
        return H + float(variant.removeprefix("covnoise")) * noise
    raise UserError(f"unknown perturbation {variant}: one of {', '.join(PERTURBATIONS)}")


def rotate(X, generator):
    """Rotate centred states (L, d) at random in whitened coordinates; mean (zero) and covariance stay."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)  # (L, k), (k,), (k, d)
    # directions of the size of rounding errors are no part of the message; the released code keeps them
    tolerance = S[0] * max(X.shape) * torch.finfo(torch.float32).eps
    rank = int((S > tolerance).sum())
    if rank == 0:  # one state, or equal states: nothing to rotate
        return X.clone()
    Q, R = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    Q = Q * R.diagonal().sign()  # with these signs every rotation is equally likely
    # U's columns are orthonormal and sum to zero, and so are those of U Q: covariance and mean stay
    return (U[:, :rank] @ Q * S[:rank] @ Vh[:rank]).float()


# ---- 2. Rows -------------------------------------------------------------------------------------
def add_flags(parser):
    """The flags that both evaluations have: who reads which messages."""
    flag = parser.flag
    parser.group("actor")
    flag("--model_path", ..., "an actor directory, or any causal LM (no_comm only)")
    flag("--baseline_path", [], "of --message text (for cot_full) and none (no_cot); default: none", nargs="*")
    flag("--torch_dtype", "bf16", "of the actor's parameters", choices=DTYPES)
    flag("--trust_remote_code", False, "run code that the model ships")
    flag("--chat_template_kwargs", None, "JSON; default: as the actor was trained", type=json_object)
    flag("--self_check", True, "try at loading if the model can be used")
    parser.group("messages")
    flag("--variants", ["latent"], ", ".join(VARIANTS), nargs="+", metavar="NAME", choices=VARIANTS,
         type=lambda name: OTHER_NAMES.get(name, name))
    flag("--hidden_data", None, "--output_dir of collect.py for these tasks")
    flag("--sender", None, "who is asked now: stage 1 runs first, on these tasks")
    flag("--latent_steps", [], "with --sender: a row per K; default: its plan", type=positive, nargs="*")
    flag("--prompt_template", None, "with --sender: what it is asked; default: as the actor's was", type=task_template)
    flag("--max_plan_tokens", 512, "with --sender: longest plan")
    flag("--sender_batch_size", 16, "with --sender: prompts at a time")
    flag("--messages", [], "NAME=DIR: a row each of others' messages, same actor; default: none", nargs="*")
    flag("--keep_ratio", [1.0], "a row per share: of each message its first states", type=float, nargs="*")


def check_args(args):
    """Raises UserError for flags of `add_flags` that contradict each other."""
    if args.latent_steps and not args.sender:
        raise UserError("--latent_steps needs --sender: the student that thinks these steps")
    if "self" in args.variants and not args.sender:
        raise UserError("--variants self needs --sender: of --hidden_data nobody can be asked again")
    if args.sender and args.hidden_data and not args.latent_steps:
        raise UserError("--sender without --latent_steps would replace the messages of --hidden_data: "
                        "give one of them")
    if not all(0 <= keep <= 1 for keep in args.keep_ratio):
        raise UserError(f"--keep_ratio takes shares between 0 and 1, got {args.keep_ratio}")


def named_messages(pairs):
    """--messages ["llama=DIR", ...] -> {"llama": LatentShards}."""
    messages = {}
    for pair in pairs:
        name, equals, directory = pair.partition("=")
        known = (*VARIANTS, *messages)
        if not equals or not name or os.sep in name or name in known:
            raise UserError(f"--messages takes NAME=DIR, each NAME once and none a variant's, found {pair}")
        messages[name] = open_shards(directory)
    return messages


def actors_of_variants(variants, model_path, baseline_paths=(), trust_remote_code=False):
    """{variant: the directory of its actor}: cot_full and no_cot have actors of their own. Reads configs, no
    weights. Raises UserError if an actor is missing."""
    for path in [model_path, *baseline_paths]:
        load_config(path, trust_remote_code)  # a wrong path is an error before any model is loaded
    actors = dict.fromkeys([*variants, "latent"], model_path)
    for variant, kind in (("cot_full", "text"), ("no_cot", "none")):
        if variant in actors:
            fitting = [path for path in baseline_paths if read_info(path).get("kind") == kind]
            if not fitting:
                raise UserError(f"{variant} needs an actor of its own: train one with train_actor.py "
                                f"--message {kind} and give it in --baseline_path")
            actors[variant] = fitting[0]
    if "text" in actors and not read_info(model_path):
        raise UserError(f"{model_path} knows no {BOP}, so it cannot read a text message: give an actor "
                        f"that train_actor.py wrote")
    return actors


def table_rows(variants, actors, tasks, messages, others=None, keep_ratio=(1.0,)):
    """The rows of the table, in order: {label: {"variant", "actor", "shards", "keep"}}.

    messages: {suffix of the label: LatentShards}, full ones first; others: {label: LatentShards}, also of self.
        {"": full, "_k8": eight steps}   -> latent, latent_k8, randomrot, randomrot_k8, text, no_comm
        {"": full}, keep_ratio [1, 0.5]  -> latent, latent_keep0.5, randomrot, randomrot_keep0.5, text
    Raises UserError as `check_messages` does."""
    messages, others = messages or {"": None}, others or {}
    every = [(suffix, shards, keep) for suffix, shards in messages.items() for keep in keep_ratio]
    whole = [("", next(iter(messages.values())), 1.0)]  # a text is the full plan's, whatever K or share
    rows = {}
    for variant in variants:
        sources = every if variant in LATENT_VARIANTS else [] if variant == "self" else whole
        for suffix, shards, keep in sources:
            label = variant + suffix + ("" if keep == 1 else f"_keep{keep:g}")
            rows[label] = dict(variant=variant, actor=actors[variant], shards=shards, keep=keep)
    for label, shards in others.items():
        if label in rows:
            raise UserError(f"--messages {label}=...: a row of this table has that name: give another")
        rows[label] = dict(variant="latent", actor=actors["latent"], shards=shards, keep=1.0)
    if not rows:
        raise UserError("--variants self is the same as latent here: give others")
    for label, row in rows.items():
        check_messages(tasks, **row)
        if row["variant"] in LATENT_VARIANTS and label not in others:  # those are read on purpose
            check_sender(row["shards"].sender, row["actor"])
    return rows


def check_messages(tasks, *, variant, actor, shards, keep=1.0):
    """Raises UserError if a task has no message, or none that the actor of this row can read."""
    if variant in SILENT_VARIANTS:
        return
    info = read_info(actor)
    latent = variant in LATENT_VARIANTS
    if latent and info.get("kind") != "latent":
        raise UserError(f"{actor} has no adapter, so it cannot read a latent message ({variant}): "
                        f"give an actor that train_actor.py wrote with --message latent")
    if shards is None:
        raise UserError(f"variant {variant} needs messages: give --hidden_data or --sender")
    missing = [task["id"] for task in tasks if task["id"] not in shards]
    if missing:
        raise UserError(f"{shards.directory} has no message for {len(missing)} tasks, the first "
                        f"{missing[0]}: run collect.py on these tasks, or give --sender")
    width = info["adapter"]["arguments"]["sender_dim"] if latent else shards.hidden_size
    if shards.hidden_size != width:
        raise UserError(f"{shards.directory} has messages {shards.hidden_size} wide, the adapter of {actor} reads "
                        f"{width}: collect with the sender it learned")
    empty = [task["id"] for task in tasks if not shards.records[task["id"]]["plan"].strip()]
    if variant in TEXT_VARIANTS and empty:
        raise UserError(f"{shards.directory}: id {empty[0]} has an empty plan, so there is no text to "
                        f"send: latent steps write none, give --hidden_data with plans")


def check_settings(output, flags, but=()):
    """What settings.json keeps: {flag: value} and "contents", the fingerprints of what is at the flags' paths. `but`:
    no settings, as NOT_SETTINGS. Raises UserError where --`output` is in an input or has results of others."""
    directory = flags[output]
    contents = {}
    for name in ("model_path", "baseline_path", "hidden_data", "sender", "messages", "dataset"):
        value = flags.get(name) or []
        paths = [value] if isinstance(value, str) else value
        if name == "messages":
            paths = [pair.partition("=")[2] for pair in paths]
        check_output(f"--{output}", directory, paths)
        contents[name] = list(map(fingerprint, paths))
    settings = {name: value for name, value in flags.items() if name not in (output, *NOT_SETTINGS, *but)}
    settings = json.loads(json.dumps(settings | {"contents": contents}))  # as they will be read again
    path = os.path.join(directory, "settings.json")
    if os.path.exists(path):
        changed = changed_settings(read_json(path), settings)
        if changed:
            raise UserError(f"{directory} has results with another {changed}: give another --{output}")
    return settings


# ---- 3. Messages ---------------------------------------------------------------------------------
# flags that `collect_messages` takes
SENDER_FLAGS = ("sender", "latent_steps", "prompt_template", "max_plan_tokens", "sender_batch_size", "seed",
                "torch_dtype", "chat_template_kwargs", "trust_remote_code", "self_check")


def collect_messages(tasks, actor_path, output_dir, *, sender, latent_steps=(), prompt_template=None,
                     chat_template_kwargs=None, max_plan_tokens=512, sender_batch_size=16, **options):
    """Stage 1 on the tasks of an evaluation -> {suffix of the label: LatentShards}, one for each K.

    tasks: this rank's; options: more of `collect`. A sender is asked as the actor's own was; its messages go to
    output_dir/messages, messages_k8, ... Raises UserError, before a model is loaded, for a sender that the
    actor did not learn from."""
    bridge, learned = read_bridge(sender), read_info(actor_path).get("sender") or {}
    send = learned.get("send", "last")
    told = {"model": sender, "fingerprint": fingerprint(sender), "teacher": bridge.get("teacher"), "send": send}
    for steps in latent_steps or [bridge.get("K")]:
        check_sender(told | {"latent_steps": steps}, actor_path)
    if not latent_steps and not bridge:
        prompt_template = prompt_template or learned.get("prompt_template")
        chat_template_kwargs = chat_template_kwargs or learned.get("chat_template_kwargs")
        options |= {"chat_template": learned.get("chat_template", "auto"), "send": send}
    messages = {}
    for steps in latent_steps or [bridge.get("K")]:
        suffix = f"_k{steps}" if steps else ""
        directory = os.path.join(output_dir, "messages" + suffix)
        collect(tasks, directory, model_name_or_path=sender, latent_steps=steps, max_new_tokens=max_plan_tokens,
                prompt_template=prompt_template, chat_template_kwargs=chat_template_kwargs,
                batch_size=sender_batch_size, **options)
        if dist.is_initialized():  # every rank writes a part of the messages and reads all of them
            dist.barrier()
        messages[suffix] = open_shards(directory)
    return messages


def other_message(task, tasks, shards, seed):
    """The id whose message `task` is told under cross_task: of another task, another text that the sender read,
    drawn among the ten nearest in number of states. Raises UserError if there is none."""
    task_id, lengths, ranked = task["id"], shards.lengths, []
    asked = shards.records[task_id]["task"]
    for name in (other["id"] for other in tasks if other["task"] != task["task"] and other["id"] in shards):
        if shards.records[name]["task"] != asked:
            apart = abs(lengths[name] - lengths[task_id])
            chance = seed_for(seed, task_id, name)  # orders those that are equally near
            ranked.append((apart, chance, name))
    if not ranked:
        raise UserError(f"{shards.directory}: cross_task needs another task's message for id {task_id}")
    nearest = sorted(ranked)[:10]
    return nearest[seed_for("cross_task", seed, task_id) % len(nearest)][-1]


def message_sample(actor, turns, n, tasks, seed, /, *, variant, shards=None, keep=1.0, **unused):
    """The first prompt of task n under a variant -> (a sample for `collate`, without labels; what a record keeps
    of its message). turns: the conversation so far, one human turn; the rest: a row of `table_rows`."""
    task_id = message_of = tasks[n]["id"]
    plan_ids, latents = (), None
    announcement = actor.info.get("plan_announcement", PLAN_ANNOUNCEMENT)
    if variant in SILENT_VARIANTS:
        announcement = message_of = None
    if variant in TEXT_VARIANTS:
        record = shards.records[task_id]
        plan_ids = plan_ids_for(actor.tokenizer, record["plan"], record["plan_token_ids"])
    if variant == "cross_task":
        message_of = other_message(tasks[n], tasks, shards, seed)
    if variant in LATENT_VARIANTS:
        latents = shards[message_of]
    if variant in PERTURBATIONS:
        latents = perturb(variant, latents, seed, task_id)
    if latents is not None:
        latents = latents[:round(keep * len(latents))]  # (L, d_s)
    part = encode_prompt(actor.tokenizer, turns, announcement, where=task_id)
    before, after = part["before"], part["after"]
    ratio = 0.0 if variant in LATENT_VARIANTS else 1.0  # the share that is shown as words
    sample = build_sample(before, after, [-100] * len(after), plan_ids, latents, ratio)
    length = len(sample["input_ids"]) - len(before) - len(after)  # positions
    sender_ms = shards.records[task_id]["sender_ms"] if length else 0.0
    return sample, {"message_of": message_of, "message_length": length, "sender_ms": sender_ms}


# ---- 4. Results ----------------------------------------------------------------------------------
def split_by(records, key):
    """{value of the key: its records}, in their order."""
    parts = {}
    for record in records:
        parts.setdefault(record[key], []).append(record)
    return parts


def mean_of(records, key):
    return statistics.fmean(record[key] for record in records) if records else None


def mean_by_id(records, key):
    """{id: mean over runs or samples}: a value per game or problem, however often it was tried."""
    return {task_id: mean_of(part, key) for task_id, part in split_by(records, "id").items()}


def bootstrap_interval(values, lowest=0.0, draws=10000):
    """95 % interval of the mean of one value (`lowest` to 1) per game or problem -> (low, high)."""
    values = np.array(values, dtype=float)
    value = values[0]
    if (values == value).all():  # no spread to draw from: Wilson says how frequent extremes may still be
        _, unseen = wilson_interval(0, len(values))
        return value - unseen * (value - lowest), value + unseen * (1 - value)
    generator = np.random.default_rng(0)
    means = [generator.choice(values, len(values)).mean() for _ in range(draws)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def differences(scores):
    """DIFFERENCES of rows, {label: {id: mean over runs}} -> {name: [value, low, high]}, by a paired bootstrap.
    latent_k8, cross_task_k8, no_comm -> gain_k8, pairing_k8, presence_k8."""
    compared = {}
    for name, (first, second) in DIFFERENCES.items():
        for label in scores:
            suffix = label.removeprefix(first)
            other = scores.get(second + suffix)
            if other is None and second == "no_comm":  # one serves all
                other = scores.get(second)
            if other and label == first + suffix:
                apart = [score - other[task_id] for task_id, score in scores[label].items()]
                interval = bootstrap_interval(apart, lowest=-1.0)
                compared[name + suffix] = [statistics.fmean(apart), *interval]
    return compared


def write_results(directory, settings, rows, summary, records, outcome, table, score, xlabel, title):
    """summary.json, results.png, which shows the figure `score`, the table on screen and its notes. summary:
    {label: figures} of `records`, whose success is called `outcome`; table: {heading: "figure format"}. "-" stands
    for a figure that there is not."""
    actors = {label: row["actor"] for label, row in rows.items()}
    parts = split_by(records, "variant")
    compared = differences({label: mean_by_id(part, outcome) for label, part in parts.items()})
    content = {"settings": settings, "actors": actors, "variants": summary, "differences": compared}
    write_json(os.path.join(directory, "summary.json"), content)
    values = [figures[score] for figures in summary.values()]
    intervals = [figures["interval"] for figures in summary.values()]
    plot_bars(os.path.join(directory, "results.png"), list(summary), values, intervals, xlabel, title)
    print(f"\n{'variant':24s}" + "".join(f"{heading:>10s}" for heading in table))
    for label, figures in summary.items():
        figures = figures | dict(zip(("low", "high"), figures["interval"]))
        line = f"{label:24s}"
        for column in table.values():
            name, form = column.split()
            value = figures.get(name)
            line += f"{'-' if value is None else format(value, form):>10s}"
        print(line)
    if compared:
        print("\ndifference                          95% from        to")
        for name, figures in compared.items():
            print(f"{name:24s}" + "".join(f"{figure:+10.3f}" for figure in figures))
        print(*MEANINGS, sep="\n")
    if "cross_task" in rows:
        lengths, apart = rows["cross_task"]["shards"].lengths, []
        for record in parts["cross_task"]:
            if record.get("message_of"):  # a game that crashed at once has none
                apart.append(abs(lengths[record["message_of"]] - lengths[record["id"]]))
        median = statistics.median(apart or [0])
        print(f"cross_task: another task's message, its length within {median:g} states (median)")

"""
What an actor is told in an evaluation: the paper's variants, and all that can be wrong with them.

    1. perturbations   a message whose structure is destroyed while chosen statistics stay
    2. variants        the flags, the actor and the table rows that belong to a variant
    3. messages        those of a sender that runs now, and the sample that an actor reads

A label is a row of the table: the variant and, if it has several sources, which one: `latent_k8` (eight
latent steps of a student), `latent_keep0.5` (the first half of each message).
"""
import json
import math
import os

import torch
import torch.distributed as dist

import collect
from common import UserError, read_json, seed_for
from data import PLAN_ANNOUNCEMENT, another_task, encode_prompt, plan_ids_for
from model import BOP, build_sample, load_config, load_tokenizer, open_shards, read_info

PERTURBATIONS = ("covgauss0", "covgauss1", "randomrot", "covnoise0.5", "covnoise1.0", "whitenoise")
LATENT_VARIANTS = ("latent", "qwen2llama", "cross_task", *PERTURBATIONS)  # the actor reads states
TEXT_VARIANTS = ("text", "cot_full")  # it reads the plan as text
SILENT_VARIANTS = ("no_comm", "no_cot")  # it is told nothing
VARIANTS = (*LATENT_VARIANTS, "text", "no_comm", "cot_full", "no_cot")


# -------------------------------------------------------------------------------------------------------
# 1. Perturbations

def perturb(variant, latents, *seed):
    """Destroy a message's structure but keep chosen statistics (paper, ablations).

    latents: H, (L, d) of any float dtype; seed: what the random numbers depend on, with the variant's
    name. Returns (L, d) in fp32. Raises UserError for an unknown name.

        covgauss0      Gaussian with H's covariance and mean zero
        covgauss1      Gaussian with H's covariance and H's mean
        randomrot      H rotated inside its row space: exactly H's mean and covariance
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
    """Rotate centred states (L, d) at random inside their row space; mean (zero) and covariance stay."""
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


# -------------------------------------------------------------------------------------------------------
# 2. Variants

def check_variants(variants, hidden_data=None, sender=None, latent_steps=(), cross_hidden_data=None,
                   keep_ratio=(1.0,)):
    """The names of --variants, each once, `none` as `latent`; the other arguments are the flags' values.

    Raises UserError for an unknown name and for flags about messages that contradict each other."""
    names = list(dict.fromkeys("latent" if name == "none" else name for name in variants))
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"unknown variant {name}: one of {', '.join(VARIANTS)}")
    if latent_steps and not sender:
        raise UserError("--latent_steps needs --sender: the student that thinks these steps")
    if sender and hidden_data and not latent_steps:
        raise UserError("--sender without --latent_steps would replace the messages of --hidden_data: "
                        "give one of them")
    if cross_hidden_data and "qwen2llama" not in names:
        raise UserError("--cross_hidden_data is what qwen2llama reads: add it to --variants")
    if not all(0 <= keep <= 1 for keep in keep_ratio):
        raise UserError(f"--keep_ratio takes shares between 0 and 1, got {list(keep_ratio)}")
    if latent_steps and list(keep_ratio) != [1.0]:
        raise UserError("--keep_ratio cuts full messages, --latent_steps makes short ones: give one")
    return names


def actors_of_variants(variants, model_path, baseline_paths=(), cross=None, trust_remote_code=False):
    """{variant: the directory of its actor}.

    Most variants change only what the actor of --model_path reads. cot_full and no_cot have actors of
    their own, and so has qwen2llama where it reads messages of another sender (cross: LatentShards).
    Reads configs, not models. Raises UserError if an actor is missing or cannot read its variant."""
    paths = [model_path, *baseline_paths]
    for path in paths:
        load_config(path, trust_remote_code)  # a wrong path is an error before any model is loaded
    infos = {path: read_info(path) for path in paths}
    actors = dict.fromkeys(variants, model_path)
    for variant, message in (("cot_full", "text"), ("no_cot", "none")):
        if variant in actors:
            fitting = [path for path in baseline_paths if infos[path].get("message") == message]
            if not fitting:
                raise UserError(f"{variant} needs an actor of its own: train one with train_actor.py "
                                f"--message {message} and give it in --baseline_path")
            actors[variant] = fitting[0]
    if "qwen2llama" in actors and cross is not None:
        fitting = [path for path in paths if sender_width(infos[path]) == cross.hidden_size]
        if not fitting:
            raise UserError(f"{cross.directory} has messages {cross.hidden_size} wide, which no actor of "
                            f"--model_path or --baseline_path reads: train one on messages of "
                            f"{cross.sender['model']}")
        actors["qwen2llama"] = fitting[0]
        for path in fitting:  # of several that read this width, the one that was trained on this sender
            if infos[path].get("sender") == cross.sender["model"]:
                actors["qwen2llama"] = path
    # the vocabulary is asked, because a tokenizer with an <unk> token has an id for every word
    if "text" in actors and BOP not in load_tokenizer(model_path, trust_remote_code).get_vocab():
        raise UserError(f"{model_path} knows no {BOP}, so it cannot read a text message: give an actor "
                        f"that train_actor.py wrote")
    return actors


def sender_width(info):
    """Width of the states that an actor reads, None if it reads none. info: what `read_info` gives."""
    return info["adapter"]["sender_dim"] if info.get("message") == "latent" else None


def table_rows(variants, actors, tasks, messages, cross=None, keep_ratio=(1.0,)):
    """The rows of the table, in order: {label: {"variant", "shards", "keep"}}.

    messages: {suffix of the label: LatentShards}, the full ones first; cross: those of qwen2llama.
        {"": full, "_k8": eight steps}   -> latent, latent_k8, randomrot, randomrot_k8, text, no_comm
        {"": full}, keep_ratio [1, 0.5]  -> latent, latent_keep0.5, randomrot, randomrot_keep0.5, text
    Raises UserError as `check_messages` does."""
    rows = {}
    for variant in variants:
        sources = {"": cross} if variant == "qwen2llama" and cross is not None else messages
        sources = sources or {"": None}  # no message at all: check_messages says who needs one
        if variant not in LATENT_VARIANTS:  # a text is that of the full plan, whatever K or share
            first = next(iter(sources.values()))
            rows[variant] = {"variant": variant, "shards": first, "keep": 1.0}
            continue
        for suffix, shards in sources.items():
            for keep in keep_ratio:
                label = variant + suffix + ("" if keep == 1 else f"_keep{keep:g}")
                rows[label] = {"variant": variant, "shards": shards, "keep": keep}
    for row in rows.values():
        check_messages(row["variant"], actors[row["variant"]], row["shards"], tasks)
    return rows


def check_messages(variant, actor_path, shards, tasks):
    """Raises UserError if a task has no message, or none that this variant's actor can read."""
    if variant in SILENT_VARIANTS:
        return
    info = read_info(actor_path)
    if variant in LATENT_VARIANTS and info.get("message") != "latent":
        raise UserError(f"{actor_path} has no adapter, so it cannot read a latent message ({variant}): "
                        f"give an actor that train_actor.py wrote with --message latent")
    if shards is None:
        raise UserError(f"variant {variant} needs messages: give --hidden_data or --sender")
    missing = [task["id"] for task in tasks if task["id"] not in shards]
    if missing:
        raise UserError(f"{shards.directory} has no message for {len(missing)} tasks, the first "
                        f"{missing[0]}: run collect.py on these tasks, or give --sender")
    if variant in LATENT_VARIANTS and shards.hidden_size != sender_width(info):
        raise UserError(f"{shards.directory} has messages {shards.hidden_size} wide, the adapter of "
                        f"{actor_path} reads {sender_width(info)}: collect with its own sender, "
                        f"{info.get('sender')}")
    empty = [task["id"] for task in tasks if not shards.records[task["id"]]["plan"].strip()]
    if variant in TEXT_VARIANTS and empty:
        raise UserError(f"{shards.directory}: id {empty[0]} has an empty plan, so there is no text to "
                        f"send: latent steps write none, give --hidden_data with plans")


def check_settings(directory, settings, flag):
    """Raises UserError if a directory has results of other settings, which its settings.json keeps.

    settings: {name of a flag: value, "weights": {path: fingerprint}}; flag: the directory's own flag."""
    path = os.path.join(directory, "settings.json")
    if not os.path.exists(path):
        return
    before = read_json(path)
    changed = [name for name in settings if before.get(name) != settings[name]]
    names = {name: f"--{name}" for name in settings}
    names["weights"] = "set of weights in --model_path or --baseline_path"
    if changed:
        raise UserError(f"{directory} has results with another {', '.join(names[n] for n in changed)}: "
                        f"give another {flag}")


# -------------------------------------------------------------------------------------------------------
# 3. Messages

def collect_messages(preset, sender, output_dir, latent_steps=(), **flags):
    """Stage 1 on the tasks of an evaluation -> {suffix of the label: LatentShards}, one for each K.

    preset: the first word of collect.py's command line; flags: its flags, as `command_line` takes them.
    The messages go to output_dir/messages, output_dir/messages_k8, ..., where a restart finds them."""
    messages = {}
    for steps in latent_steps or [None]:
        suffix = f"_k{steps}" if steps else ""
        directory = os.path.join(output_dir, "messages" + suffix)
        flags |= {"model_name_or_path": sender, "output_dir": directory, "latent_steps": steps}
        collect.main([preset, *command_line(flags)])
        if dist.is_initialized():  # every rank writes a part of the messages and reads all of them
            dist.barrier()
        messages[suffix] = open_shards(directory)
    return messages


def command_line(flags):
    """{"K": 8, "subjects": ["Algebra", "Geometry"], "seed": None} -> --K 8 --subjects Algebra Geometry.

    A list of words. None and tuples (names of fields to try: a default) are left out, a dict is JSON."""
    argv = []
    for name, value in flags.items():
        if value is None or isinstance(value, tuple):
            continue
        argv.append(f"--{name}")
        if isinstance(value, dict):
            value = json.dumps(value)
        argv += map(str, value) if isinstance(value, list) else [str(value)]
    return argv


def message_sample(actor, messages, n, tasks, seed, variant, shards=None, keep=1.0):
    """The first prompt of task n under a variant: a sample for `collate`, without labels.

    messages: the conversation so far, one human turn (after an optional system turn);
    tasks: [{"id", "task", ...}]; variant, shards, keep: a row of `table_rows`."""
    task_id = tasks[n]["id"]
    if variant in SILENT_VARIANTS:
        before, after = encode_prompt(actor.tokenizer, messages, where=task_id)
        return build_sample(before, after, [-100] * len(after))
    announcement = actor.info.get("plan_announcement", PLAN_ANNOUNCEMENT)
    before, after = encode_prompt(actor.tokenizer, messages, announcement, where=task_id)
    if variant in TEXT_VARIANTS:
        record = shards.records[task_id]
        plan_ids = plan_ids_for(actor.tokenizer, record["plan"], record["plan_token_ids"])
        return build_sample(before, after, [-100] * len(after), plan_ids=plan_ids, ratio=1.0)
    if variant == "cross_task":
        texts = [task["task"] for task in tasks]
        with_message = [i for i, task in enumerate(tasks) if task["id"] in shards]
        other = another_task(n, texts, with_message, "cross_task", seed, task_id)
        latents = shards[tasks[other]["id"]]
    elif variant in PERTURBATIONS:
        latents = perturb(variant, shards[task_id], seed, task_id)
    else:
        latents = shards[task_id]
    latents = latents[:round(keep * len(latents))]  # (L, d_s)
    return build_sample(before, after, [-100] * len(after), latents=latents)

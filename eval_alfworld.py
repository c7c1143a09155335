"""
Stage 4a: the actor plays household games under every communication variant, many games in one batch.

  python eval_alfworld.py --model_path actor --hidden_data messages_valid_seen --env alfworld \\
      --split valid_seen --variants latent text no_comm cross_task randomrot --output_path results
  python eval_alfworld.py --model_path actor --sender student --latent_steps 64 32 16 8 --env alfworld \\
      --split valid_seen --sender_knows place --output_path results_k
  python eval_alfworld.py --model_path actor --hidden_data messages --env my_game:MyGame --split test \\
      --output_path results_my_game
  torchrun --nproc_per_node 8 eval_alfworld.py --model_path actor --hidden_data messages_valid_seen \\
      --env alfworld --split valid_seen --runs 3 --temperature 0.7 --output_path results_3_runs

games.py says what a game is. Run it again after a kill: episodes that are on disk are not played again, those
that crashed are.

Output: episodes/VARIANT/runR/ID.json (all turns), summary.json (what the table says, and success by type of
task), results.csv (variant, run, id, type, success, steps, invalid, crash), performance_metrics.csv (also
milliseconds, tokens, the message's length, memory), results.png.

    1. decoding   many conversations, one growing cache
    2. playing    reply, act, observe, in all games at once
    3. results    the game is the unit of every interval and test
"""
import argparse
import csv
import datetime
import functools
import os
import time
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist

from common import (Parser, UserError, atomic_path, boolean, fingerprint, json_object, memory_gb,
                    one_line_errors, plot_bars, positive, progress, read_json, seed_for, this_rank,
                    wilson_interval, write_json)
from data import encode_prompt, final_reply, stop_ids, to_messages
from games import SENDER_KNOWS, Crash, GameWorkers, open_split, spare_cores
from model import (DTYPES, LatentActor, build_sample, collate, context_length, decoder_states, holes_allowed,
                   lm_logits, new_cache, next_tokens, open_shards)
from variants import (PERTURBATIONS, VARIANTS, actors_of_variants, check_settings, check_variants,
                      collect_messages, message_sample, table_rows)


def get_args(argv):
    parser = Parser(prog="eval_alfworld.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("actor")
    g.add_argument("--model_path", required=True, help="an actor directory, or a causal LM (no_comm only)")
    g.add_argument("--baseline_path", nargs="*", default=[],
                   help="actors of --message text (for cot_full) and of --message none (for no_cot)")
    g.add_argument("--torch_dtype", choices=DTYPES, default="bf16", help="of the actor's parameters")
    g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the model ships")
    g.add_argument("--chat_template_kwargs", type=json_object,
                   help="JSON for the chat template; default: as the actor was trained")
    g.add_argument("--self_check", type=boolean, default=True, help="try at loading whether it can be used")
    g = parser.add_argument_group("messages")
    g.add_argument("--hidden_data", help="--output_dir of collect.py for these games")
    g.add_argument("--sender", help="a live sender: collect.py asks it first, into --output_path")
    g.add_argument("--sender_knows", choices=SENDER_KNOWS, default="nothing",
                   help="with --sender and --env alfworld: place tells it where the goal's objects are")
    g.add_argument("--latent_steps", type=positive, nargs="*", default=[], help="with --sender: a row per K")
    g.add_argument("--prompt_template", help="with --sender: what it is asked; default: as collect.py's")
    g.add_argument("--max_plan_tokens", type=positive, default=512, help="with --sender: longest plan")
    g.add_argument("--sender_batch_size", type=positive, default=16, help="with --sender: prompts at a time")
    g.add_argument("--cross_hidden_data",
                   help="for qwen2llama: messages of a sender of another family, read by the actor of "
                        "--model_path or --baseline_path that fits; default: as latent")
    g.add_argument("--keep_ratio", type=float, nargs="*", default=[1.0],
                   help="a row per share: messages are cut to this share of their states")
    g = parser.add_argument_group("games")
    g.add_argument("--env", default="alfworld", help="alfworld, or module:Class")
    g.add_argument("--split", default="valid_seen", help="alfworld: valid_seen or valid_unseen")
    g.add_argument("--instruction_file",
                   help="text that opens each game instead of what the actor was trained with; of a training "
                        "file (.json, .jsonl) the first human turn")
    g.add_argument("--variants", nargs="+", default=["latent"], help=", ".join(VARIANTS))
    g.add_argument("--max_steps", type=positive, default=20,
                   help="replies per episode; published: 20 (paper), 40 (ETO), 50 (released code)")
    g.add_argument("--num_episodes", type=positive, help="only the first N games of the split")
    g.add_argument("--runs", type=positive, default=1, help="repetitions with other seeds (paper: 3)")
    g.add_argument("--env_workers", type=int,
                   help="processes with games; default: this rank's share of the cores for alfworld, else 0")
    g.add_argument("--env_timeout", type=positive, default=120,
                   help="seconds after which a silent game counts as crashed")
    g = parser.add_argument_group("decoding")
    g.add_argument("--batch_size", type=positive, default=32,
                   help="episodes played together; the cache holds 2 x layers x KV width numbers per token of each: "
                        "in bf16 23 kB with SmolLM2-135M, 57 kB with Qwen2.5-7B")
    g.add_argument("--max_new_tokens", type=positive, default=256, help="per reply")
    g.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    g.add_argument("--seed", type=int, default=0, help="of sampling, cross_task and the perturbations")
    g = parser.add_argument_group("output")
    g.add_argument("--output_path", required=True, help="a directory; one that exists is continued")
    g.add_argument("--enable_timing", type=boolean, nargs="?", const=True, default=True,
                   help="write performance_metrics.csv")
    return parser.parse_args(argv)


# what an episode's result depends on
SETTINGS = ["model_path", "baseline_path", "hidden_data", "cross_hidden_data", "sender", "sender_knows",
            "prompt_template", "max_plan_tokens", "env", "split", "instruction_file", "max_steps",
            "max_new_tokens", "temperature", "seed", "torch_dtype", "chat_template_kwargs"]


def check_runs(variants, runs, temperature):
    """Raises UserError where several runs would be one run several times."""
    still = [variant for variant in variants if variant not in (*PERTURBATIONS, "cross_task")]
    if runs > 1 and temperature == 0 and still:
        raise UserError(f"--runs {runs} at --temperature 0 plays {', '.join(still)} {runs} times alike: "
                        "leave --runs 1, or give a --temperature above 0")


def read_instruction(path):
    """The text of a file; of a training file (.json, .jsonl), its first human turn, where ETO's has it."""
    try:
        if path.endswith((".json", ".jsonl")):
            turns = to_messages(read_json(path)[0], where=path)
            text = next(turn["content"] for turn in turns if turn["role"] == "user")
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read().strip()
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"--instruction_file {path} is neither a text nor a file of conversations: "
                        f"{error!r}") from None
    if "Your task is to:" in text:
        raise UserError(f"--instruction_file {path}: its first turn holds a task already ('Your task is "
                        "to:'): give a text that opens every game")
    return text


# -----------------------------------------------------------------------------------------------------
# 1. Decoding: many conversations, one growing cache

class CachedChat:
    """B conversations over one cache that only grows: a turn reads its new tokens, never the history again.

    Conversations wait for each other, so their parts of the cache have holes. The mask hides the holes and
    position ids skip them; each conversation says what it would say alone. A family that cannot do that
    has one conversation at a time, and with `read_again` all of it is read anew in each turn: some (Jamba)
    misread a second block into the recurrent state of the first."""

    def __init__(self, lm, read_again=False):
        self.lm, self.read_again = lm, read_again
        self.cache, self.mask = new_cache(lm), None  # mask (B, T), T the cache's length
        self.embeds = None  # with read_again: all that was read, (1, T, D)

    def read(self, inputs_embeds, mask):
        """Append a block (B, t, D), padded on the left, its mask (B, t) -> logits after it (B, V)."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        if self.read_again:
            past = inputs_embeds[:, :0] if self.embeds is None else self.embeds
            self.embeds = torch.cat([past, inputs_embeds], dim=1)
            if inputs_embeds.shape[1] > 1:
                inputs_embeds, self.cache = self.embeds, new_cache(self.lm)
        states = decoder_states(self.lm, inputs_embeds, self.mask, self.cache)  # (B, t, D)
        return lm_logits(self.lm, states[:, -1])

    def reply(self, logits, is_over, max_new_tokens, temperature=0.0, generators=None):
        """Decode until is_over(ids) of each conversation -> B lists of ids, {b: its last id is unread}.

        The token that ends a reply is no part of it, so all of the reply has been read into the cache. Only
        one that was cut at max_new_tokens ends with an id that was not; the next block begins with it."""
        B, device = len(logits), logits.device
        replies = [[] for _ in range(B)]
        talking = set(range(B))
        for step in range(max_new_tokens):
            uniforms = None
            if temperature > 0:  # one number per token, from the conversation's own generator
                uniforms = torch.zeros(B, dtype=torch.float64)
                for b in talking:
                    uniforms[b] = torch.rand((), generator=generators[b], dtype=torch.float64)
                logits, uniforms = logits / temperature, uniforms.to(device)
            next_ids = next_tokens(logits, uniforms)  # (B,)
            for b in list(talking):
                said = replies[b] + [next_ids[b].item()]
                if is_over(said):
                    talking.remove(b)
                else:
                    replies[b] = said
            if not talking or step + 1 == max_new_tokens:
                break
            mask = torch.zeros(B, 1, dtype=torch.long, device=device)
            mask[list(talking)] = 1
            logits = self.read(self.lm.get_input_embeddings()(next_ids[:, None]), mask)
        return replies, talking

    def keep(self, conversations):
        """Drop all conversations but these; columns that none of them needs are left in place."""
        index = torch.tensor(conversations, device=self.mask.device)
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]


def spoken(tokenizer, ids, more=""):
    """What a game gets of a reply: no thoughts, and nothing while the thoughts are not over."""
    return final_reply(tokenizer.decode(ids, skip_special_tokens=True) + more)


# -----------------------------------------------------------------------------------------------------
# 2. Playing

def new_record(label, run, task, split, seed):
    """What is kept of an episode, before its first turn."""
    counts = dict.fromkeys(["steps", "invalid", "tokens", "message_length"], 0)
    clocks = dict.fromkeys(["sender_ms", "actor_ms", "env_ms", "wall_ms"], 0.0)
    return counts | clocks | {
        "variant": label,
        "run": run,
        "seed": seed + run,
        "split": split,
        "id": task["id"],
        "type": task.get("type", ""),
        "task": task["task"],
        "success": False,
        "crash": None,
        "first_turn": "",
        "turns": [],  # {"reply", "action", "observation"}
    }


@torch.inference_mode()
def play(actor, jobs, tasks, rows, workers, *, game, split="", instruction="", seed=0, max_steps=20,
         max_new_tokens=256, temperature=0.0, read_again=False):
    """Play jobs [(label, run, game n)] together -> their records, yielded as the episodes end.

    tasks: [{"id", "task", ...}]; rows: what `table_rows` gives; workers: GameWorkers of the class `game`;
    instruction opens every first turn. Raises UserError where an episode outgrows the actor's context."""
    start, tokenizer = time.perf_counter(), actor.tokenizer
    parse_action = getattr(game, "parse_action", str.strip)
    cut_reply = getattr(game, "cut_reply", str.strip)
    stops = set(stop_ids(tokenizer, actor.lm))

    def is_over(ids):
        if ids[-1] in stops or "\n" not in tokenizer.decode(ids[-1:]):
            return ids[-1] in stops
        text = spoken(tokenizer, ids, ".")  # the action line is over where what follows it is cut off
        return cut_reply(text) != text

    # ---- first turns
    episodes = []
    first_turns = workers.reset({slot: tasks[n] for slot, (_, _, n) in enumerate(jobs)})
    for slot, (label, run, n) in enumerate(jobs):
        record = new_record(label, run, tasks[n], split, seed)
        record["env_ms"] = workers.ms[slot]
        if isinstance(first_turns[slot], Crash):
            record["crash"] = str(first_turns[slot])
            yield record
            continue
        record["first_turn"] = f"{instruction}\n\n{first_turns[slot].strip()}".strip()
        messages = [{"role": "user", "content": record["first_turn"]}]
        sample = message_sample(actor, messages, n, tasks, record["seed"], **rows[label])
        record["message_length"] = sample["message_length"]
        if sample["message_length"]:
            record["sender_ms"] = rows[label]["shards"].records[record["id"]]["sender_ms"]
        generator = torch.Generator().manual_seed(seed_for("reply", record["seed"], label, record["id"]))
        episodes.append({
            "slot": slot,
            "record": record,
            "messages": messages,  # the conversation so far
            "sample": sample,  # what the actor reads next
            "generator": generator,
        })

    # ---- turns: the actor reads what is new in all episodes and replies in all, then all games take a step
    chat = CachedChat(actor.lm, read_again)
    while episodes:
        batch = collate([episode["sample"] for episode in episodes], actor.lm.device, padding_side="left")
        check_context(actor.lm, chat, batch, episodes, max_new_tokens)
        clock = time.perf_counter()
        logits = chat.read(actor.embed(batch), batch["attention_mask"])  # (B, V)
        generators = [episode["generator"] for episode in episodes]
        replies, unread = chat.reply(logits, is_over, max_new_tokens, temperature, generators)
        actor_ms = 1000 * (time.perf_counter() - clock) / len(episodes)

        texts = [cut_reply(spoken(tokenizer, ids)) for ids in replies]
        actions = [parse_action(text) for text in texts]
        answers = workers.step({episode["slot"]: action for episode, action in zip(episodes, actions)})
        going_on = []
        for b, episode in enumerate(episodes):
            record, slot = episode["record"], episode["slot"]
            observation, done = "", True
            if isinstance(answers[slot], Crash):
                record["crash"] = str(answers[slot])
            else:
                observation, _, done, info = answers[slot]
                record["success"] = bool(info["won"])  # not `done`, as released: that is the step limit, too
                record["invalid"] += bool(info.get("invalid"))
            record["steps"] += 1
            record["actor_ms"] += actor_ms
            record["env_ms"] += workers.ms[slot]
            record["tokens"] += len(replies[b])
            record["turns"].append({"reply": texts[b], "action": actions[b], "observation": observation})
            if done or record["success"] or record["steps"] == max_steps:
                record["wall_ms"] = 1000 * (time.perf_counter() - start)
                yield record
                continue
            episode["messages"].append({"role": "assistant", "content": texts[b]})
            episode["messages"].append({"role": "user", "content": observation.strip()})
            _, block = encode_prompt(tokenizer, episode["messages"], where=record["id"])
            said = next((n for n, token in enumerate(block) if token in stops), 0)
            if b in unread:
                block = replies[b][-1:] + block
            elif said and replies[b][-said:] == block[:said]:
                block = block[said:]  # Llama-2's turns end with "▁" and </s>: the actor has said the first
            episode["sample"] = build_sample([], block, [-100] * len(block))
            going_on.append(b)
        if going_on and len(going_on) < len(episodes):
            chat.keep(going_on)
        episodes = [episodes[b] for b in going_on]


def check_context(lm, chat, batch, episodes, max_new_tokens):
    """Raises UserError if an episode no longer fits the actor's context, before it would go wrong."""
    lengths = batch["attention_mask"].sum(1) + max_new_tokens  # (B,)
    if chat.mask is not None:
        lengths = lengths + chat.mask.sum(1)
    longest, limit = int(lengths.max()), context_length(lm.config.get_text_config())
    if longest > limit:
        record = episodes[lengths.argmax()]["record"]
        raise UserError(f"id {record['id']}: after {record['steps']} steps the episode needs {longest} "
                        f"positions, the actor's context has {limit}: lower --max_steps or --max_new_tokens, "
                        "or use an actor with a longer context (finished episodes are kept)")


# -----------------------------------------------------------------------------------------------------
# 3. Results. The unit is the game: its runs are averaged before anything else is.

RESULTS = ["variant", "run", "id", "type", "success", "steps", "invalid", "crash"]
METRICS = ["variant", "split", "id", "type", "run", "seed", "success", "steps", "invalid", "crash",
           "sender_ms", "actor_ms", "env_ms", "wall_ms", "tokens", "tokens_per_s", "message_length",
           "peak_memory_gb", "device", "dtype"]


def wins_by_game(records):
    """{id: number of runs that won}."""
    wins = {}
    for record in records:
        wins[record["id"]] = wins.get(record["id"], 0) + record["success"]
    return wins


def bootstrap_interval(values, draws=10000):
    """95 % interval of the mean of one value per game -> (low, high); games are drawn with replacement."""
    values = np.array(values, dtype=float)
    if values.min() == values.max():  # no spread to draw from
        return wilson_interval(values.sum(), len(values))
    generator = np.random.default_rng(0)
    means = [generator.choice(values, len(values)).mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_test(wins, others):
    """Exact two-sided p of "equally good", {id: wins} of two variants over the same games and runs.

    If they were, each game's difference could as well have the other sign. All signs are counted, one game
    after another: chances[i] is that of a sum of i - (sum of |differences| so far). One run: McNemar's test."""
    differences = np.array([wins[game] - others[game] for game in wins])
    chances = np.ones(1)
    for size in np.abs(differences[differences != 0]):
        flip = np.zeros(2 * size + 1)
        flip[0] = flip[-1] = 0.5
        chances = np.convolve(chances, flip)
    sums = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[np.abs(sums) >= abs(differences.sum())].sum()))


def mean_of(records, key):
    return float(np.mean([record[key] for record in records])) if records else None


def split_by(records, key):
    """{value of the key: its records}, sorted."""
    return {value: [record for record in records if record[key] == value]
            for value in sorted({record[key] for record in records})}


def summarize(records, labels):
    """Episode records -> {label: figures}; every number in the table and the picture comes from here."""
    by_label = {label: [record for record in records if record["variant"] == label] for label in labels}
    latent = wins_by_game(by_label.get("latent", []))
    summary = {}
    for label, group in by_label.items():
        wins = wins_by_game(group)
        runs = split_by(group, "run")
        success_of_runs = [mean_of(run, "success") for run in runs.values()]
        figures = {key: mean_of(group, key) for key in MEANS}
        figures["games"] = len(wins)
        figures["interval"] = bootstrap_interval([count / len(runs) for count in wins.values()])
        figures["runs"] = success_of_runs
        figures["std"] = float(np.std(success_of_runs, ddof=1)) if len(runs) > 1 else None
        if latent and label != "latent":
            figures["p_against_latent"] = paired_test(wins, latent)
        figures["steps_success"] = mean_of([record for record in group if record["success"]], "steps")
        figures["crashed"] = sum(record["crash"] is not None for record in group)
        figures["tokens_per_s"] = 1000 * figures["tokens"] / max(figures["actor_ms"], 1e-9)
        figures["peak_memory_gb"] = max(record["peak_memory_gb"] for record in group)
        types = split_by(group, "type")
        figures["by_type"] = {name: mean_of(part, "success") for name, part in types.items()}
        summary[label] = figures
    return summary


MEANS = ["success", "steps", "invalid", "tokens", "message_length", "sender_ms", "actor_ms", "env_ms"]
TABLE = {  # heading: (figure, its format)
    "success": ("success", ".3f"),
    "95% from": ("low", ".3f"),
    "to": ("high", ".3f"),
    "± runs": ("std", ".3f"),
    "p": ("p_against_latent", ".1e"),
    "steps won": ("steps_success", ".1f"),
    "steps": ("steps", ".1f"),
    "crashed": ("crashed", "d"),
    "states": ("message_length", ".1f"),
    "sender ms": ("sender_ms", ".1f"),
    "actor ms": ("actor_ms", ".1f"),
    "tokens/s": ("tokens_per_s", ".0f"),
    "GB": ("peak_memory_gb", ".2f"),
}


def print_table(summary):
    print(f"\n{'variant':16s}" + "".join(f"{heading:>10s}" for heading in TABLE))
    for label, figures in summary.items():
        low, high = figures["interval"]
        figures = figures | {"low": low, "high": high}
        texts = []
        for name, form in TABLE.values():
            value = figures.get(name)
            texts.append("-" if value is None else format(value, form))
        print(f"{label:16s}" + "".join(f"{text:>10s}" for text in texts))
    print("interval: bootstrap over games; p: paired sign test over games, against latent")


def write_csv(path, columns, records):
    with atomic_path(path) as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(records)


def check_any_played(records):
    """Raises UserError if no game could be played to its end."""
    crashes = [record["crash"] for record in records if record["crash"] is not None]
    if len(crashes) == len(records):
        raise UserError(f"all {len(records)} episodes crashed, the first with: {crashes[0]}")


def episode_path(output_path, label, run, task_id):
    name = quote(task_id, safe="")
    if len(name) > 200:  # longer than file names may be
        name = name[:180] + f"-{seed_for(task_id):x}"
    return os.path.join(output_path, "episodes", label, f"run{run}", name + ".json")


def is_played(path):
    """True for the file of an episode that did not crash."""
    return os.path.exists(path) and read_json(path)["crash"] is None


# -----------------------------------------------------------------------------------------------------

@one_line_errors("eval_alfworld.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()

    # ---- what is to be compared, on which games, and who plays: checked before a model is loaded
    variants = check_variants(args.variants, args.hidden_data, args.sender, args.latent_steps,
                              args.cross_hidden_data, args.keep_ratio)
    check_runs(variants, args.runs, args.temperature)
    game, all_tasks = open_split(args.env, args.split)  # cross_task draws from all, whatever --num_episodes
    tasks = all_tasks[:args.num_episodes]
    if args.instruction_file and not hasattr(game, "instruction"):
        raise UserError("--instruction_file is for --env alfworld; another game writes its own first turn")
    instruction = read_instruction(args.instruction_file) if args.instruction_file else None
    cross = open_shards(args.cross_hidden_data) if args.cross_hidden_data else None
    actors = actors_of_variants(variants, args.model_path, args.baseline_path, cross, args.trust_remote_code)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["weights"] = {path: fingerprint(path) for path in [args.model_path, *args.baseline_path]}
    check_settings(args.output_path, settings, "--output_path")

    # ---- messages: those of --hidden_data, and those of a sender that is asked now
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        dist.barrier()
    messages = {"": open_shards(args.hidden_data)} if args.hidden_data else {}
    if args.sender:
        preset = "alfworld" if args.env == "alfworld" else "custom"
        messages |= collect_messages(
            preset, args.sender, args.output_path, args.latent_steps, env=args.env, split=args.split,
            max_samples=args.num_episodes, sender_knows=args.sender_knows, prompt_template=args.prompt_template,
            max_new_tokens=args.max_plan_tokens, batch_size=args.sender_batch_size, seed=args.seed,
            torch_dtype=args.torch_dtype, trust_remote_code=args.trust_remote_code,
            chat_template_kwargs=args.chat_template_kwargs, self_check=args.self_check)
    rows = table_rows(variants, actors, tasks, messages, cross, args.keep_ratio)
    if rank == 0:
        write_json(os.path.join(args.output_path, "settings.json"), settings)

    # ---- what is left to play: this rank's games, under every variant, in the order of the table
    path_of = functools.partial(episode_path, args.output_path)
    jobs = []
    for label in rows:
        for run in range(args.runs):
            for n in range(rank, len(tasks), world):
                if not is_played(path_of(label, run, tasks[n]["id"])):
                    jobs.append((label, run, n))
    num_workers = args.env_workers
    if num_workers is None:
        num_workers = min(spare_cores(), args.batch_size) if args.env == "alfworld" else 0

    # ---- play
    if jobs:
        workers = GameWorkers(game, num_workers, args.env_timeout)  # forked before a model is in memory
        bar = progress(total=len(jobs), desc="play", unit="episode", rank=rank)
        for path in dict.fromkeys(actors.values()):
            actor_jobs = [job for job in jobs if actors[rows[job[0]]["variant"]] == path]
            if not actor_jobs:
                continue
            actor = LatentActor.load(path, args.torch_dtype, device, args.trust_remote_code,
                                     args.chat_template_kwargs, args.self_check)
            opening = ""
            if hasattr(game, "instruction"):  # the one it was trained with, if it was
                opening = instruction or actor.info.get("instruction") or game.instruction
            one_by_one = not holes_allowed(actor.lm)
            batch_size = 1 if one_by_one else args.batch_size
            if one_by_one and rank == 0:
                print(f"{path}: games are played one at a time, slowly: this family counts the columns of "
                      "its cache or keeps a recurrent state")
            for start in range(0, len(actor_jobs), batch_size):
                for record in play(
                        actor, actor_jobs[start:start + batch_size], all_tasks, rows, workers, game=game,
                        split=args.split, instruction=opening, seed=args.seed, max_steps=args.max_steps,
                        max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                        read_again=one_by_one):
                    record["tokens_per_s"] = 1000 * record["tokens"] / max(record["actor_ms"], 1e-9)
                    record["peak_memory_gb"] = memory_gb(device)
                    record["device"], record["dtype"] = device.split(":")[0], args.torch_dtype
                    write_json(path_of(record["variant"], record["run"], record["id"]), record)
                    bar.update()
            del actor
        bar.close()
        workers.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return None

    # ---- the files and the table, from the episodes on disk
    records = []
    for label in rows:
        for run in range(args.runs):
            records += [read_json(path_of(label, run, task["id"])) for task in tasks]
    summary = summarize(records, list(rows))
    whole = {"settings": settings, "actors": actors, "variants": summary}
    write_json(os.path.join(args.output_path, "summary.json"), whole)
    write_csv(os.path.join(args.output_path, "results.csv"), RESULTS, records)
    if args.enable_timing:
        write_csv(os.path.join(args.output_path, "performance_metrics.csv"), METRICS, records)
    plot_bars(os.path.join(args.output_path, "results.png"), list(summary),
              [figures["success"] for figures in summary.values()],
              [figures["interval"] for figures in summary.values()],
              "success (95 % interval: bootstrap over games)", args.split)
    print_table(summary)
    print(f"\nwrote summary.json, results.csv, results.png, {len(records)} episodes to {args.output_path}")
    check_any_played(records)
    return summary


if __name__ == "__main__":
    main()

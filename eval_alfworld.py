"""
Stage 4a: the actor plays household games under every communication variant, many games in one batch.

  python eval_alfworld.py --model_path actor --hidden_data messages_valid_seen --split valid_seen \\
      --variants latent text no_comm cross_task randomrot --output_path results
  python eval_alfworld.py --model_path actor --sender student --latent_steps 64 32 16 8 --output_path by_k
  torchrun --nproc_per_node 8 eval_alfworld.py --model_path actor --sender SENDER --env my_game:MyGame \\
      --split test --runs 3 --temperature 0.7 --output_path results_3_runs

`self` is what the actor could have told itself: the message of the same --sender, asked only what the game tells
the actor. games.py says what a game is. Run it again after a kill: it plays what is missing and what crashed.

Output: episodes/VARIANT/runR/ID.json (all turns), results.csv (a line per episode), summary.json (what the
table says, differences between variants, success by type of task), results.png.

    1. decoding   many conversations, one growing cache
    2. playing    reply, act, observe, in all games at once
    3. results    the game is the unit of every interval
"""
import contextlib
import csv
import datetime
import os
import statistics
import time
from urllib.parse import quote

import torch
import torch.distributed as dist

from common import (Parser, UserError, atomic_path, lock, memory_gb, one_line_errors, positive, progress,
                    read_json, seed_for, this_rank, write_json)
from data import encode_prompt, final_reply, stop_ids
from games import AlfworldGame, Crash, GameWorkers, open_split, sender_tasks, spare_cores
from hf import (context_length, decoder_states, holes_allowed, lm_logits, new_cache, next_tokens,
                uniform_numbers)
from model import LatentActor, build_sample, collate, open_shards
from variants import (PERTURBATIONS, SENDER_FLAGS, Job, actors_of_variants, add_flags, bootstrap_interval, check_args,
                      check_settings, collect_messages, mean_by_id, mean_of, message_sample, named_messages,
                      split_by, table_rows, write_results)


def get_args(argv):
    parser = Parser(prog="eval_alfworld.py", description=__doc__)
    flag = parser.flag
    add_flags(parser)
    parser.group("games")
    flag("--env", "alfworld", "alfworld, or module:Class")
    flag("--split", "valid_seen", "alfworld: valid_seen or valid_unseen")
    flag("--max_steps", 20, "replies per episode; published: 20 (paper), 40 (ETO), 50 (released code)")
    flag("--num_episodes", None, "only the first N games of the split", type=positive)
    flag("--runs", 1, "repetitions with other seeds (paper: 3)")
    flag("--env_workers", None, "processes with games; default: a share of the cores for alfworld, else 0", type=int)
    flag("--env_timeout", 120, "seconds after which a silent game counts as crashed")
    parser.group("decoding")
    flag("--batch_size", 32, "episodes played together; the cache holds 2 x layers x KV width numbers per token "
         "of each: in bf16 23 kB with SmolLM2-135M, 57 kB with Qwen2.5-7B")
    flag("--max_new_tokens", 256, "per reply")
    flag("--temperature", 0.0, "0: greedy")
    flag("--seed", 0, "of sampling, cross_task and the perturbations")
    parser.group("output")
    flag("--output_path", ..., "a directory; one that exists is continued")
    args = parser.parse_args(argv)
    alike = [name for name in (*args.variants, *args.messages) if name not in (*PERTURBATIONS, "cross_task")]
    if args.runs > 1 and args.temperature <= 0 and alike:
        parser.error(f"--runs {args.runs} at --temperature 0 plays {', '.join(alike)} alike in every run: leave "
                     "--runs 1, or give a --temperature above 0")
    return args


# ---- 1. Decoding: many conversations, one growing cache ------------------------------------------
class CachedChat:
    """B conversations over one cache that only grows: a turn reads its new tokens, never the history again.

    Conversations wait for each other, so their parts of the cache have holes. Two of them, p: prompt, r: reply,
    o: the next turn, .: masked; a block is padded on the left, a reply that is over waits for the longest:

        tokens          p  p  p  r  r  .  o  o  |  mask  1 1 1 1 1 0 1 1  |  position ids  0 1 2 3 4 4 5 6
                        .  p  p  r  r  r  .  o  |        0 1 1 1 1 1 0 1  |                0 0 1 2 3 4 4 5

    The mask hides the holes and position ids skip them, so each conversation says what it would say alone. A
    family that cannot do that has one conversation at a time, and with `read_again` all of it is read anew in
    each turn: some (Jamba) misread a second block into the recurrent state of the first."""

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

    def reply(self, logits, is_over, max_new_tokens, temperature=0.0, uniforms=None):
        """Decode until is_over(ids) of each conversation -> B lists of ids, {b: its last id is unread}.
        uniforms (B, max_new_tokens) draw the tokens at a temperature. The token that ends a reply is no part of
        it, so all of the reply has been read; only one that was cut ends with an id that was not."""
        replies = [[] for _ in logits]
        talking = set(range(len(logits)))
        for step in range(max_new_tokens):
            if temperature > 0:
                next_ids = next_tokens(logits / temperature, uniforms[:, step])  # (B,)
            else:
                next_ids = next_tokens(logits)
            written = next_ids.tolist()
            for b in list(talking):
                if is_over(replies[b] + [written[b]]):
                    talking.remove(b)
                else:
                    replies[b].append(written[b])
            if not talking or step + 1 == max_new_tokens:
                break
            mask = torch.zeros_like(self.mask[:, :1])
            mask[list(talking)] = 1
            logits = self.read(self.lm.get_input_embeddings()(next_ids[:, None]), mask)
        return replies, talking

    def keep(self, conversations):
        """Drop all conversations but these; columns that none of them needs are left in place."""
        index = torch.tensor(conversations, device=self.mask.device)
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]


# ---- 2. Playing ----------------------------------------------------------------------------------
def new_record(job, task, split, seed):
    """What is kept of an episode, before its first turn."""
    return {
        "variant": job.label, "run": job.run, "seed": seed + job.run, "split": split,
        "id": task["id"], "type": task.get("type", ""), "task": task["task"],
        "success": False, "crash": None, "steps": 0, "invalid": 0,
        "tokens": 0, "message_of": None, "message_length": 0,
        "sender_ms": 0.0, "actor_ms": 0.0, "env_ms": 0.0, "wall_ms": 0.0,
        "first_turn": "",
        "turns": [],  # {"reply", "action", "observation"}
    }


def next_block(tokenizer, turns, reply_ids, unread, stops, where):
    """Ids of what comes after a reply, for a cache that holds it: its end of turn, the observation, the opening
    of the next reply. unread: the reply's last id is not in the cache yet."""
    block = encode_prompt(tokenizer, turns, where=where)["after"]
    if unread:
        return reply_ids[-1:] + block
    # Llama-2's turns end with the tokens "▁" and </s>, and the actor may have said the first of them
    before_stop = next((n for n, token in enumerate(block) if token in stops), 0)
    already = before_stop > 0 and reply_ids[-before_stop:] == block[:before_stop]
    return block[before_stop:] if already else block


@torch.inference_mode()
def play(actor, jobs, tasks, rows, workers, *, game, split="", instruction="", seed=0, max_steps=20,
         max_new_tokens=256, temperature=0.0, read_again=False):
    """Play some Jobs together -> their records, yielded as the episodes end.

    tasks: [{"id", "task", ...}]; rows: what `table_rows` gives; workers: GameWorkers of the class `game`;
    instruction opens every first turn. Raises UserError where an episode outgrows the actor's context."""
    start, tokenizer = time.perf_counter(), actor.tokenizer
    player = game()
    parse_action = getattr(player, "parse_action", str.strip)
    cut_reply = getattr(player, "cut_reply", str.strip)
    stops = set(stop_ids(tokenizer, actor.lm))

    def is_over(ids):
        if ids[-1] in stops:
            return True
        if "\n" not in tokenizer.decode(ids[-1:]):
            return False
        text = final_reply(tokenizer, ids, ".")  # the action line is over where what follows it is cut off
        return cut_reply(text) != text

    # ---- first turns
    records, chats, samples = {}, {}, {}  # by slot: what is kept, the conversation so far, what is read next
    first_turns = workers.reset({slot: tasks[job.n] for slot, job in enumerate(jobs)})
    for slot, job in enumerate(jobs):
        record, first_turn = new_record(job, tasks[job.n], split, seed), first_turns[slot]
        record["env_ms"] = workers.ms[slot]
        if isinstance(first_turn, Crash):
            record["crash"] = str(first_turn)
            yield record
            continue
        record["first_turn"] = f"{instruction}\n\n{first_turn.strip()}".strip()
        chats[slot] = [{"role": "user", "content": record["first_turn"]}]
        samples[slot], told = message_sample(actor, chats[slot], job.n, tasks, record["seed"],
                                             **rows[job.label])
        records[slot] = record | told

    # ---- turns: the actor reads what is new in all episodes and replies in all, then all games take a step
    chat, playing = CachedChat(actor.lm, read_again), list(records)
    while playing:
        in_play = [records[slot] for slot in playing]
        batch = collate([samples[slot] for slot in playing], actor.lm.device, padding_side="left")
        check_context(chat, batch["attention_mask"], in_play, max_new_tokens)
        # each reply has numbers of its own, so that it is the same in any batch
        seeds = [seed_for("reply", r["seed"], r["variant"], r["id"], r["steps"]) for r in in_play]
        uniforms = torch.stack([uniform_numbers(number, max_new_tokens) for number in seeds]).to(actor.lm.device)
        clock = time.perf_counter()
        logits = chat.read(actor.embed(batch), batch["attention_mask"])  # (B, V)
        if not (logits < torch.inf).all():  # NaN is not; -inf may mask spare tokens
            raise UserError("the actor's logits are not finite: use --torch_dtype bf16 or fp32, and another "
                            "--output_path")
        replies, unread = chat.reply(logits, is_over, max_new_tokens, temperature, uniforms)
        actor_ms = 1000 * (time.perf_counter() - clock) / len(playing)

        texts = {slot: cut_reply(final_reply(tokenizer, ids)) for slot, ids in zip(playing, replies)}
        actions = {slot: parse_action(text) for slot, text in texts.items()}
        answers = workers.step(actions)
        going_on = []  # places in the batch
        for b, (slot, record) in enumerate(zip(playing, in_play)):
            answer, observation, done = answers[slot], "", True
            if isinstance(answer, Crash):
                record["crash"] = str(answer)
            else:
                observation, _, done, info = answer
                record["success"] = bool(info["won"])  # not `done`, as released: that is the step limit, too
                record["invalid"] += bool(info.get("invalid"))
            record["steps"] += 1
            record["actor_ms"] += actor_ms
            record["env_ms"] += workers.ms[slot]
            record["tokens"] += len(replies[b])
            said = {"reply": texts[slot], "action": actions[slot], "observation": observation}
            record["turns"].append(said)
            if done or record["success"] or record["steps"] == max_steps:
                record["wall_ms"] = 1000 * (time.perf_counter() - start)
                yield record
                continue
            # Mistral's newer templates refuse an empty turn; in the past it is not read again
            chats[slot] += [{"role": "assistant", "content": texts[slot] or "."},
                            {"role": "user", "content": observation.strip()}]
            block = next_block(tokenizer, chats[slot], replies[b], b in unread, stops, record["id"])
            samples[slot] = build_sample([], block, [-100] * len(block))
            going_on.append(b)
        if going_on and len(going_on) < len(playing):
            chat.keep(going_on)
        playing = [playing[b] for b in going_on]


def check_context(chat, mask, records, max_new_tokens):
    """Raises UserError if an episode no longer fits the actor's context, before it would go wrong."""
    lengths = mask.sum(1) + max_new_tokens  # (B,)
    if chat.mask is not None:
        lengths += chat.mask.sum(1)
    limit = context_length(chat.lm.config.get_text_config())
    if lengths.max() > limit:
        record = records[lengths.argmax()]
        raise UserError(f"id {record['id']}: after {record['steps']} steps the episode needs {lengths.max()} "
                        f"positions, the actor's context has {limit}: lower --max_steps or --max_new_tokens, or "
                        "use an actor with a longer context, with another --output_path")


# ---- 3. Results. The unit is the game: its runs are averaged before anything else is. ------------
MEANS = ["success", "steps", "invalid", "tokens", "message_length", "sender_ms", "actor_ms", "env_ms"]
TABLE = {  # heading: figure and format
    "success": "success .3f",
    "95% from": "low .3f", "to": "high .3f",
    "± runs": "std .3f",
    "steps won": "steps_success .1f",
    "steps": "steps .1f",
    "crashed": "crashed d",
    "states": "message_length .1f",
    "sender ms": "sender_ms .1f",
    "actor ms": "actor_ms .1f",
    "tokens/s": "tokens_per_s .0f",
    "GB": "peak_memory_gb .2f",
}


def figures(records):
    """What the table says of a row."""
    by_game, runs = mean_by_id(records, "success"), split_by(records, "run").values()
    success_of_runs = [mean_of(run, "success") for run in runs]
    means = {key: mean_of(records, key) for key in MEANS}
    return means | {
        "games": len(by_game),
        "interval": bootstrap_interval(list(by_game.values())),
        "runs": success_of_runs,
        "std": statistics.stdev(success_of_runs) if len(runs) > 1 else None,
        "steps_success": mean_of([record for record in records if record["success"]], "steps"),
        "crashed": sum(record["crash"] is not None for record in records),
        "tokens_per_s": 1000 * means["tokens"] / max(means["actor_ms"], 1e-9),
        "peak_memory_gb": max(record["peak_memory_gb"] for record in records),
        "by_type": {name: mean_of(part, "success") for name, part in split_by(records, "type").items()},
    }


def episode_path(output_path, label, run, task_id):
    name = quote(task_id, safe="")
    if len(name) > 200:  # longer than file names may be
        name = name[:180] + f"-{seed_for(task_id):x}"
    return os.path.join(output_path, "episodes", label, f"run{run}", name + ".json")


@one_line_errors("eval_alfworld.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()

    # ---- what is to be compared, on which games, and who plays: checked before a model is loaded
    check_args(args)
    game, all_tasks = open_split(args.env, args.split)  # cross_task draws from all with a message
    tasks = all_tasks[:args.num_episodes]
    others = named_messages(args.messages)
    messages = {"": open_shards(args.hidden_data)} if args.hidden_data else {}
    actors = actors_of_variants(args.variants, args.model_path, args.baseline_path, args.trust_remote_code)
    but = ["runs", "env_workers", "env_timeout", "" if args.sender else "num_episodes"]  # cross_task's partners
    settings = check_settings("output_path", vars(args), but)

    # ---- messages of a sender that is asked now
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if args.sender:
        split = quote(args.split, safe="")  # another one may give its games the same names
        name = f"asked-{split}-rank{rank:05d}.json"
        asked = sender_tasks(game, tasks[rank::world], (), os.path.join(args.output_path, name), rank)
        options = {name: getattr(args, name) for name in SENDER_FLAGS}
        messages |= collect_messages(asked, args.model_path, args.output_path, **options)
    if "self" in args.variants:  # the same sender, asked what the actor is told
        directory = os.path.join(args.output_path, "self")
        told = sender_tasks(game, tasks[rank::world], (), os.path.join(directory, name), rank, method="reset")
        same = torch.tensor(int(told == asked))
        if world > 1:  # a part of the games may be the same
            dist.all_reduce(same, dist.ReduceOp.MIN)
        if not same:
            by_suffix = collect_messages(told, args.model_path, directory, **options)
            others |= {"self" + suffix: shards for suffix, shards in by_suffix.items()}
        elif rank == 0:
            print("self is left out: the sender is asked nothing that the actor is not told")
    rows = table_rows(args.variants, actors, tasks, messages, others, args.keep_ratio)
    if rank == 0:
        lock(args.output_path)
        write_json(os.path.join(args.output_path, "settings.json"), settings)

    # ---- what is left to play: this rank's games, under every variant, in the order of the table
    paths = {}  # of all episodes
    for label in rows:
        for run in range(args.runs):
            for n, task in enumerate(tasks):
                paths[Job(label, run, n)] = episode_path(args.output_path, label, run, task["id"])
    played = set()
    for job, path in paths.items():
        if os.path.exists(path) and read_json(path)["crash"] is None:
            played.add(job)
    jobs = [job for job in paths if job.n % world == rank and job not in played]
    if rank == 0:
        print(f"{len(paths)} episodes, {len(played)} of them in {args.output_path}, by the code of then")
    num_workers = args.env_workers
    if num_workers is None:
        num_workers = min(spare_cores(), args.batch_size) if issubclass(game, AlfworldGame) else 0

    # ---- play
    workers = GameWorkers(game, num_workers if jobs else 0, args.env_timeout)  # forked before a model is loaded
    bar = progress(total=len(jobs), desc="play", unit="episode", rank=rank)
    with contextlib.closing(workers), bar:
        for actor_path in dict.fromkeys(rows[job.label]["actor"] for job in jobs):
            actor_jobs = [job for job in jobs if rows[job.label]["actor"] == actor_path]
            actor = LatentActor.load(actor_path, args.torch_dtype, device, args.trust_remote_code,
                                     args.chat_template_kwargs, args.self_check)
            opening = ""
            if hasattr(game, "instruction"):  # the one it was trained with, if it was
                opening = actor.info.get("instruction") or game.instruction
            one_by_one = not holes_allowed(actor.lm)
            if one_by_one and rank == 0:
                print(f"{actor_path}: games are played one at a time, slowly: this family counts the columns of "
                      "its cache or keeps a recurrent state")
            batch_size = 1 if one_by_one else args.batch_size
            for start in range(0, len(actor_jobs), batch_size):
                batch = actor_jobs[start:start + batch_size]
                for record in play(
                        actor, batch, all_tasks, rows, workers, game=game, split=args.split, instruction=opening,
                        seed=args.seed, max_steps=args.max_steps, max_new_tokens=args.max_new_tokens,
                        temperature=args.temperature, read_again=one_by_one):
                    record |= {"tokens_per_s": 1000 * record["tokens"] / max(record["actor_ms"], 1e-9),
                               "peak_memory_gb": memory_gb(device),
                               "device": device.split(":")[0], "dtype": args.torch_dtype}
                    path = episode_path(args.output_path, record["variant"], record["run"], record["id"])
                    write_json(path, record)
                    bar.update()
            del actor
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return None

    # ---- the files and the table, from the episodes on disk
    records = [read_json(path) for path in paths.values()]
    summary = {label: figures(part) for label, part in split_by(records, "variant").items()}
    columns = [name for name in records[0] if name not in ("task", "first_turn", "turns")]
    with atomic_path(os.path.join(args.output_path, "results.csv")) as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(records)
    write_results(args.output_path, settings, rows, summary, records, "success", TABLE, "success",
                  "success (95 % interval: bootstrap over games)", args.split)
    print("interval: bootstrap over games, whose runs are averaged; of differences: paired, over the same games")
    crashes = [record["crash"] for record in records if record["crash"] is not None]
    if crashes:
        print(f"{len(crashes)} episodes crashed, and count as lost until this is run again: {crashes[0]}")
    if len(crashes) == len(records):
        raise UserError(f"--env {args.env}: all {len(records)} episodes crashed, the first: {crashes[0]}")
    print(f"\nwrote summary.json, results.csv, results.png, {len(records)} episodes to {args.output_path}")
    return summary


if __name__ == "__main__":
    main()

"""
What the examples share: language models made from scratch, the stages of an experiment, its report.

    1. language models   one token per word, a Qwen2 of width 64 trained in seconds
    2. the stages        each through its script's own main, once
    3. the report        summary.json, a table, a picture
"""
import importlib
import os
import platform
import random
import shlex
import subprocess
import sys
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import Parser, UserError, atomic_path, plot_bars, progress, read_json, remove, write_json  # noqa: E402
from model import build_sample, collate  # noqa: E402

# ---- 1. Language models. A sample of theirs is a list of (text, whether it is supervised) --------
PLAN_ANNOUNCEMENT = "plan :"
# the markers are words from the start, so that a model learns them with plans as text
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<bop>", "<eop>"]
# a space after <eos>: the tokenizer tells words apart by their spaces
CHAT_TEMPLATE = """
{%- for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <eos> {% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def build_tokenizer(texts, letters=None):
    """A tokenizer with one token per word of `texts`, or per piece of so many letters, and the special ones."""
    split = pre_tokenizers.WhitespaceSplit()  # `in/on` and `\boxed{` stay one word
    if letters:  # ▁drawer -> ▁dr awe r
        pieces = pre_tokenizers.Split(Regex(f".{{1,{letters}}}"), "isolated")
        split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pieces])
    words = {word for text in set(texts) for word, _ in split.pre_tokenize_str(f"{text} ")}
    vocabulary = {word: i for i, word in enumerate(SPECIAL + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    if letters:
        tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=SPECIAL[3:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)


def spans_of(turns, plan=None):
    """Turns [{"from": "human" | "gpt", "value"}] as CHAT_TEMPLATE writes them -> [(text, supervised?), ...].

    What the model says is supervised. A plan stands at the end of the first turn, where a message will:

        <user> find the mug plan : <bop> go to drawer 3 <eop> <eos> <assistant>    not supervised
        go to drawer 3 <eos>                                                       supervised
    """
    spans = []
    for n, turn in enumerate(turns):
        if turn["from"] == "gpt":
            spans.append((f"{turn['value']} <eos>", True))
            continue
        message = f" {PLAN_ANNOUNCEMENT} <bop> {plan} <eop>" if plan and n == 0 else ""
        spans.append((f"<user> {turn['value']}{message} <eos> <assistant>", False))
    return spans


def one_turn(prompt, reply, plan=None):
    """The spans of one prompt and its reply."""
    return spans_of([{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}], plan)


def encode(spans, tokenizer):
    """[(text, supervised?), ...] -> a sample for model.py's `collate`; labels are -100 where not supervised."""
    input_ids, labels = [], []
    for text, supervised in spans:
        ids = tokenizer(text).input_ids
        input_ids += ids
        labels += ids if supervised else [-100] * len(ids)
    return build_sample([], input_ids, labels)


def train_lm(tokenizer, role, draw, seed, steps, layers=3, feed_forward=192, learning_rate=5e-3):
    """A small Qwen2, trained from scratch and in eval mode. draw(rng) gives the samples of a step."""
    rng = random.Random(f"{role} {seed}")
    torch.manual_seed(rng.getrandbits(32))  # from one start two roles would share embeddings: none to adapt
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,  # a model this small does not learn to copy with the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    lm = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=steps)
    for _ in progress(range(steps), desc=f"train the {role} from scratch", unit="step"):
        batch = collate([encode(spans, tokenizer) for spans in draw(rng)])
        # no attention mask: the padding is on the right, where causal attention does not look
        loss = lm(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"{role}: loss {loss.item():.3f} after {steps} steps")
    return lm.eval()


# ---- 2. The stages -------------------------------------------------------------------------------
def once(out, name, work):
    """work(), unless an earlier run has done it: {out}/seconds.json knows, and how long it took."""
    path = f"{out}/seconds.json"
    seconds = read_json(path) if os.path.exists(path) else {}
    if name not in seconds:
        start = time.perf_counter()
        work()
        seconds[name] = round(time.perf_counter() - start, 1)
        write_json(path, seconds)


def make_lm(path, tokenizer, role, draw, seed, steps, **sizes):
    """`train_lm` into a directory, once."""
    def work():
        lm = train_lm(tokenizer, role, draw, seed, steps, **sizes)
        with atomic_path(path) as temporary:
            lm.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    once(os.path.dirname(path), os.path.basename(path), work)


def stage(out, name, command, /, **values):
    """Run one stage through its script's main(argv), once; prints the command as one would type it."""
    # words are told apart before {out} and the values are filled in, so an --output_dir may have spaces
    script, *argv = [word.format(out=out, **values) for word in shlex.split(command)]

    def work():
        print(f"\n[{name}] $ python {script} {shlex.join(argv)}", flush=True)
        # all that `python collect.py ...` runs; here torch is imported once for all stages
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(argv)
    once(out, name, work)


def demo_parser(prog, description, output_dir, fast):
    """The flags that the examples have in common."""
    parser = Parser(prog=prog, description=description)
    parser.flag("--output_dir", output_dir,
                "models, messages and results; a stage that is done there is not run again")
    parser.add_argument("--fast", action="store_true", help=fast)
    parser.add_argument("--fresh", action="store_true", help="delete --output_dir first")
    return parser


def open_output(out, settings, fresh=False):
    """A directory holds one experiment. Raises UserError if it was made with other settings."""
    if fresh:
        remove(out)
    path = f"{out}/settings.json"
    before = read_json(path) if os.path.exists(path) else settings
    if before != settings:
        raise UserError(f"{out} was made with other flags or sizes ({before}): add --fresh to start over, or give "
                        f"another --output_dir")
    write_json(path, settings)


def optional(name):
    """Import a library that one example needs. Raises UserError with the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this needs {name}: pip install {name}") from None


# ---- 3. The report -------------------------------------------------------------------------------
def made_by():
    """What a result says of its origin: the command, the commit of the code, the machine. "commit" is None without
    git, and ends in -dirty where the code is not that commit's."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        git = ["git", "describe", "--always", "--exclude", "*", "--dirty"]
        commit = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    return {"command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]), "commit": commit, "machine": machine}


def report(out, results, rate, meaning, n_tasks):
    """summary.json, results.png and the table of results {row: {rate, "interval", ...}}, `meaning` of the rows; and
    the differences of {out}/eval, with the messages that were read there."""
    seconds, compared = read_json(f"{out}/seconds.json"), read_json(f"{out}/eval/summary.json")["differences"]
    write_json(f"{out}/summary.json", made_by() | {"tasks": n_tasks, "results": results, "differences": compared,
                                                   "seconds": seconds})
    labels = [meaning.get(row, row) for row in results]
    rates = [figures[rate] for figures in results.values()]
    intervals = [figures["interval"] for figures in results.values()]
    xlabel = f"{rate} on {n_tasks} held-out tasks (95 % interval)"
    plot_bars(f"{out}/results.png", labels, rates, intervals, xlabel)

    print(f"\n{n_tasks} held-out tasks")
    print(f"{'row':18s}{'what the actor gets':36s}{rate:10s}95 % interval   states  ms per message")
    for row, figures in results.items():
        low, high = figures["interval"]
        line = f"{row:18s}{meaning.get(row, ''):36s}{figures[rate]:.3f}     [{low:.3f}, {high:.3f}]"
        if figures.get("message_length"):
            line += f"  {figures['message_length']:6.1f}"
        if figures.get("sender_ms"):
            line += f"  {figures['sender_ms']:6.2f}"
        print(line)
    for name, (value, low, high) in compared.items():
        print(f"{name:54s}{value:+.3f}    [{low:+.3f}, {high:+.3f}]")
    print(f"\n{sum(seconds.values()):.0f} s: " + ", ".join(f"{k} {v:g}" for k, v in seconds.items()))
    print(f"wrote {out}/summary.json and {out}/results.png")

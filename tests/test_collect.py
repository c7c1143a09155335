"""Stage 1: what is stored is what the sender thought, whatever the batch, the order and the ranks."""
import fcntl
import json
import os

import pytest
import torch
from safetensors import safe_open

import collect
from collect import main
from data import PLAN_PROMPT
from hf import DTYPES, load_lm
from model import LatentSender, LatentShards
from tiny import make_lm, make_tokenizer, save_lm, save_model, write_tasks

N = 10
SAMPLE = ["--do_sample", "true", "--temperature", "1.3", "--top_p", "0.95", "--top_k", "50"]
TEMPLATES = {"qwen2": "chatml", "llama": "llama3", "mistral": "mistral"}  # of families


class Game:
    """As much of a game as a sender needs."""

    def tasks(self, split):
        names = ["cup", "plate", "fork", "apple"] if split == "test" else []
        return [{"id": f"games/{name}", "task": f" find the {name}. ", "type": name[0]} for name in names]


class Guided(Game):
    """And one that tells the sender more than the actor."""

    def sender_text(self, task):
        return f"{task['task']} it is in drawer {len(task['task'])}."


def save_sender(directory, family="qwen2"):
    """A tiny LM that often ends its plan: the output weights of its end-of-turn token are louder than the others."""
    lm, tokenizer = make_lm(family), make_tokenizer(TEMPLATES[family])
    lm.lm_head.weight.data[tokenizer.eos_token_id] *= 3
    return save_lm(directory, lm, tokenizer)


@pytest.fixture(scope="module")
def senders(tmp_path_factory):
    root = tmp_path_factory.mktemp("senders")
    return {family: save_sender(root / family, family) for family in TEMPLATES}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    write_tasks(path, N)
    return str(path)


def argv(model, tasks, out, *more, preset="custom"):
    return [preset, "--model_name_or_path", str(model), "--dataset_path", str(tasks), "--output_dir", str(out),
            "--torch_dtype", "fp32", "--max_new_tokens", "12", "--batch_size", "4", *map(str, more)]


def run(model, tasks, out, *more):
    main(argv(model, tasks, out, *more))
    return LatentShards(str(out))


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records))
    return path


def files_of(directory):
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


def prompt_ids(tokenizer, task, chat_template="auto", **template_kwargs):
    """What the sender must have read, built without our code."""
    prompt = PLAN_PROMPT.format(task=task)
    if chat_template == "none":
        return tokenizer(prompt).input_ids
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                         add_generation_prompt=True, **template_kwargs)
    return tokenizer(text, add_special_tokens=False).input_ids


def assert_prompt(lm, ids, states):
    """The first state is that of the prompt's last token."""
    with torch.no_grad():
        hidden_states = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states[0], hidden_states[0, -1], rtol=0, atol=1e-4)


def assert_same(a, b, ids=None):
    """The same messages: plans exactly, states to fp32 noise. Everything but the time it took."""
    assert ids is not None or set(a.records) == set(b.records)
    for task_id in ids or a.records:
        assert a.records[task_id] | {"sender_ms": 0} == b.records[task_id] | {"sender_ms": 0}
        torch.testing.assert_close(a[task_id], b[task_id], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reference(senders, tasks, tmp_path_factory):
    """Sampled and greedy messages of one uninterrupted run."""
    root = tmp_path_factory.mktemp("reference")
    return {"sampled": run(senders["qwen2"], tasks, root / "sampled", *SAMPLE),
            "greedy": run(senders["qwen2"], tasks, root / "greedy")}


# ---- the states
@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("decoding", [[], SAMPLE], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chat_template", ["auto", "none"])
def test_states_are_the_teacher_forced_ones(senders, tasks, tmp_path, family, decoding, chat_template):
    """And a plan is what the model's own logits say: greedy up to its end of turn."""
    shards = run(senders[family], tasks, tmp_path / "o", "--chat_template", chat_template, *decoding)
    lm, tokenizer = load_lm(senders[family]), make_tokenizer(TEMPLATES[family])
    assert set(shards.records) == {f"t{i}" for i in range(N)}
    for task_id, record in shards.records.items():
        ids = prompt_ids(tokenizer, record["task"], chat_template)
        plan, states = record["plan_token_ids"], shards[task_id]
        with torch.no_grad():
            out = lm(torch.tensor([ids + plan]), output_hidden_states=True)
        expected = out.hidden_states[-1][0, len(ids) - 1:-1]  # shifted by one
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)
        if not decoding:
            logits = out.logits[0, len(ids) - 1:]
            logits[0, tokenizer.eos_token_id] = -torch.inf  # a plan has at least one token
            assert logits.argmax(-1).tolist()[:12] == (plan + [tokenizer.eos_token_id])[:12]
        assert states.shape == (len(plan), 32) and states.dtype == torch.float32 and plan
        assert tokenizer.eos_token_id not in plan
        assert record["plan"] == tokenizer.decode(plan, skip_special_tokens=True) and record["sender_ms"] > 0
    if decoding:
        lengths = list(shards.lengths.values())
        assert 12 > min(lengths) and len(set(lengths)) > 2  # prompts left the batch at different steps


@pytest.mark.parametrize("decoding", ["greedy", "sampled"])
@pytest.mark.parametrize("how", ["batch 1", "batch 16", "reversed", "2 ranks", "other tasks"])
def test_messages_do_not_depend_on_their_company(senders, tasks, reference, tmp_path, monkeypatch, how, decoding):
    more = SAMPLE if decoding == "sampled" else []
    if how.startswith("batch"):
        more = more + ["--batch_size", how.split()[1]]
    records = json.load(open(tasks))[::-1]
    if how in ("reversed", "other tasks"):
        tasks = write(tmp_path / "tasks.json", records if how == "reversed" else records[2:5])
    if how == "2 ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in ("1", "0"):  # as the launcher would, one after the other: the ranks do not talk
            monkeypatch.setenv("RANK", rank)
            main(argv(senders["qwen2"], tasks, tmp_path / "o", *more))
        assert sorted(os.listdir(tmp_path / "o")) == [f"latents-rank0000{r}-00000.safetensors" for r in (0, 1)]
        shards = LatentShards(str(tmp_path / "o"))
    else:
        shards = run(senders["qwen2"], tasks, tmp_path / "o", *more)
    assert len(shards) == (3 if how == "other tasks" else N)
    assert_same(shards, reference[decoding], list(shards.records))


def test_seed_and_temperature_matter(senders, tasks, reference, tmp_path):
    plans = [{k: r["plan_token_ids"] for k, r in s.records.items()} for s in (
        reference["sampled"], run(senders["qwen2"], tasks, tmp_path / "s", *SAMPLE, "--seed", "1"),
        run(senders["qwen2"], tasks, tmp_path / "k", *SAMPLE, "--top_k", "1"), reference["greedy"])]
    assert plans[0] != plans[1] and plans[0] != plans[3]
    assert plans[2] == plans[3]  # the likeliest token alone is greedy decoding


def test_sampling_follows_the_models_distribution():
    """The next token of many seeds against the model's own probabilities."""
    lm = make_lm(vocab=8)
    lm.lm_head.weight.data *= 0.3
    with torch.no_grad():
        probs = lm(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1)
    messages = collect.decode_plans(lm, [[1, 2, 3]] * 4000, range(4000), [], max_new_tokens=1, do_sample=True)
    drawn = [plan[0] for plan, _, _ in messages]
    counts = torch.bincount(torch.tensor(drawn), minlength=8) / 4000
    assert (counts - probs).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_c_cuts_the_states_only(senders, tasks, reference, tmp_path):
    shards = run(senders["qwen2"], tasks, tmp_path / "o", "--c", "3", *SAMPLE)
    full = reference["sampled"]
    for task_id, record in full.records.items():
        assert shards.records[task_id]["plan"] == record["plan"]
        torch.testing.assert_close(shards[task_id], full[task_id][:3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stored_dtype(senders, tasks, tmp_path, dtype):
    shards = run(senders["qwen2"], tasks, tmp_path / "o", "--torch_dtype", dtype, "--max_samples", 1)
    assert shards["t0"].dtype == DTYPES[dtype] and shards.sender["dtype"] == dtype


def test_shards_are_readable_with_safetensors_alone(reference):
    path, = set(reference["greedy"].shard_of.values())
    with safe_open(path, "pt") as f:
        records, sender = (json.loads(f.metadata()[k]) for k in ("records", "sender"))
        assert set(f.keys()) == set(records) == {f"t{i}" for i in range(N)}
        assert all(f.get_tensor(k).shape == (len(r["plan_token_ids"]), 32) for k, r in records.items())
    assert sender["hidden_size"] == 32 and {"model", "dtype", "prompt_template", "seed", "latent_steps", "temperature",
                                            "format_version"} <= sender.keys()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_latent_steps_of_an_untrained_model(senders, tasks, tmp_path, batch_size):
    shards = run(senders["qwen2"], tasks, tmp_path / "o", "--latent_steps", 5, "--batch_size", batch_size)
    sender, tokenizer = LatentSender.load(senders["qwen2"]), make_tokenizer()
    assert len(shards) == N and shards.sender["latent_steps"] == 5
    for task_id, record in shards.records.items():
        ids = torch.tensor([prompt_ids(tokenizer, record["task"])])
        with torch.no_grad():
            latents = sender(ids, torch.ones_like(ids), 5)[0]
        torch.testing.assert_close(shards[task_id], latents, rtol=0, atol=1e-4)
        assert record["plan"] == "" and record["plan_token_ids"] == []


# ---- what is there already
def test_a_directory_is_continued(senders, tasks, reference, tmp_path, monkeypatch):
    """On any number of ranks. What is there stays as it is; when nothing is missing, nothing is written."""
    out, more = tmp_path / "o", [*SAMPLE, "--batch_size", 2, "--shard_size_mb", 0.0001]
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "1")
        assert len(run(senders["qwen2"], tasks, out, *more, "--max_samples", 7)) == 3
    before = files_of(out)
    assert_same(run(senders["qwen2"], tasks, out, *more), reference["sampled"])
    done = files_of(out)
    assert before.items() < done.items()
    run(senders["qwen2"], tasks, out, *more)
    assert files_of(out) == done


def test_from_python(senders, tasks, reference, tmp_path):
    """The evaluators' way: one function with keyword arguments, the defaults of the flags."""
    some = json.load(open(tasks))[:4]
    collect.collect(some, str(tmp_path / "o"), model_name_or_path=senders["qwen2"], torch_dtype="fp32",
                    max_new_tokens=12)
    shards = LatentShards(str(tmp_path / "o"))
    assert_same(shards, reference["greedy"], [task["id"] for task in some])
    assert shards.sender == reference["greedy"].sender and len(shards) == 4


# ---- data fields
def test_alfworld_preset_and_conversations_index(senders, tmp_path):
    turns = [{"from": f, "value": v} for f, v in [("human", "instruction"), ("gpt", "OK"), ("human", " find a cup "),
                                                  ("gpt", "go")]]
    data = write(tmp_path / "sft.jsonl", [{"id": 7, "conversations": turns}])
    for preset, more, task in (("alfworld", [], "find a cup"), ("custom", [], "instruction"),
                               ("custom", ["--conversations_index", 2], "find a cup"),
                               ("alfworld", ["--task_turn", 0], "instruction")):
        out = tmp_path / " ".join([preset, *map(str, more)])
        main(argv(senders["qwen2"], data, out, *more, preset=preset))
        assert LatentShards(str(out)).records["7"]["task"] == task


@pytest.mark.parametrize("game", [Game, Guided])
def test_games_are_collected_under_their_own_ids(senders, tmp_path, monkeypatch, game):
    whole = argv(senders["qwen2"], "", tmp_path / "o", "--env", f"test_collect:{game.__name__}", "--split", "test")
    main([*whole, "--max_samples", "3"])
    assert len(LatentShards(str(tmp_path / "o"))) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        main(whole)
    shards = LatentShards(str(tmp_path / "o"))
    sender_text = getattr(game(), "sender_text", lambda task: task["task"])
    assert {k: (r["task"], r["type"]) for k, r in shards.records.items()} == {
        task["id"]: (sender_text(task).strip(), task["type"]) for task in game().tasks("test")}
    assert all(name.endswith(".safetensors") for name in os.listdir(tmp_path / "o"))


def test_fields_and_train_json(senders, tmp_path):
    records = [{"uid": f"q{i}", "q": f"what is {i}?", "a": f"it is {i}", "level": i, "type": "x"} for i in range(3)]
    shards = run(senders["qwen2"], write(tmp_path / "d.json", records), tmp_path / "o", "--id_field", "uid",
                 "--task_field", "q", "--response_field", "a", "--prompt_template", "Q {task} 100% {x}")
    train = json.load(open(tmp_path / "o" / "train.json"))
    for record, sample in zip(records, train, strict=True):
        stored = shards.records[record["uid"]]
        assert (stored["task"], stored["level"], stored["type"]) == (record["q"], record["level"], "x")
        assert sample == {"id": record["uid"], "conversations": [{"from": "human", "value": record["q"]},
                                                                 {"from": "gpt", "value": record["a"]}]}


def test_a_template_that_cannot_end_a_turn_is_fine_for_a_sender(tasks, tmp_path):
    sender = save_model(tmp_path / "sender")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("[gMASK]{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")  # as GLM-4.5's
    tokenizer.save_pretrained(sender)
    shards = run(sender, tasks, tmp_path / "o", "--max_samples", 2)
    for task_id, record in shards.records.items():
        assert_prompt(load_lm(sender), prompt_ids(tokenizer, record["task"]), shards[task_id])


def test_white_space_around_a_prompt_may_go(tasks, tmp_path):
    """Llama's template trims what a turn says; another one's `date_string` is an argument like any other."""
    sender = save_model(tmp_path / "sender", template="llama3")
    shards = run(sender, tasks, tmp_path / "o", "--max_samples", 1, "--prompt_template", "Plan this.\n{task}\n",
                 "--chat_template_kwargs", '{"date_string": "1 Jan 2026"}')
    assert len(shards) == 1


def test_template_arguments_reach_the_sender(tasks, tmp_path, refuses):
    """Qwen3's template: without thinking its prompt ends in an empty thought."""
    sender = save_model(tmp_path / "sender", template="qwen3")
    lm, tokenizer = load_lm(sender), make_tokenizer("qwen3")
    for thinking in (False, True):
        kwargs = {"enable_thinking": thinking}
        out = tmp_path / str(thinking)
        shards = run(sender, tasks, out, "--max_samples", 3,
                     *(["--chat_template_kwargs", json.dumps(kwargs)] if thinking else []))
        assert shards.sender["chat_template_kwargs"] == kwargs
        for task_id, record in shards.records.items():
            ids = prompt_ids(tokenizer, record["task"], **kwargs)
            assert tokenizer.decode(ids).endswith("assistant\n" if thinking else "</think>\n\n")
            assert_prompt(lm, ids, shards[task_id])
    # another prompt is another sender
    refuses(main, argv(sender, tasks, out), "different: chat_template_kwargs", "--output_dir")
    tokenizer.chat_template += "."
    tokenizer.save_pretrained(sender)
    refuses(main, argv(sender, tasks, tmp_path / "False"), "prompt_fingerprint", "--output_dir")


def test_a_student_is_asked_as_in_its_training(tasks, tmp_path):
    sender = save_model(tmp_path / "sender")
    asked = {"prompt_template": "Think of {task}", "chat_template_kwargs": {"enable_thinking": True}}
    write(tmp_path / "sender" / "latent_bridge.json", {"K": 3} | asked)
    thinks = run(sender, tasks, tmp_path / "k", "--max_samples", 1, "--latent_steps", 3).sender
    assert thinks | asked == thinks
    other = run(sender, tasks, tmp_path / "o", "--max_samples", 1, "--latent_steps", 3, "--prompt_template", "{task}?")
    assert other.sender["prompt_template"] == "{task}?"
    assert run(sender, tasks, tmp_path / "t", "--max_samples", 1).sender["prompt_template"] == PLAN_PROMPT


# ---- inspect
def test_inspect_lists_and_reads_the_latents(reference, senders, capsys):
    shards = reference["greedy"]
    main(["inspect", shards.directory])
    text = capsys.readouterr().out
    assert f"{N} messages of" in text and "hidden_size: 32" in text and "seed: 0" in text
    for task_id, record in shards.records.items():
        assert f"\n{task_id}: {shards.lengths[task_id]} states" in text and record["task"] in text
    main(["inspect", shards.directory, "--id", "t4", "--model_name_or_path", senders["qwen2"], "--top_k", "2"])
    text = capsys.readouterr().out
    assert "\nt4: " in text and "\nt3: " not in text
    lines = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    plan, tokenizer, lm = shards.records["t4"]["plan_token_ids"], make_tokenizer(), load_lm(senders["qwen2"])
    assert len(lines) == len(plan)
    for n, line in enumerate(lines):  # greedy: each latent's likeliest token is the one that was written
        written = repr(tokenizer.decode([plan[n]]))
        assert line.split()[0] == str(n) and (n == 0 or line.count(written) >= 2)
        for prob in lm.lm_head(shards["t4"][n]).softmax(-1).topk(2).values:
            assert f" {prob:.2f}" in line


# ---- bad input
@pytest.mark.parametrize("content, words", [
    (None, ["no file", "tasks.json"]), ("[{", ["not valid JSON", "tasks.json"]), ("{}", ["non-empty list of records"]),
    ("[]", ["list of records"]), ('["x"]', ["list of records"]), ('[{"id": "a", "task": 3}]', ["id a"]),
    ('[{"id": "a", "q": "x"}]', ["id a", "'q'", "--task_field"]),
    ('[{"id": "a", "task": "x"}, {"id": "a", "task": "y"}]', ["id 'a'", "twice"]),
    ('[{"id": "__metadata__", "task": "x"}]', ["__metadata__", "reserved"]),
    ('[{"id": "a", "task": "x"}, {"id": "b", "task": " "}]', ["id b", "empty"]),
    ('[{"id": "a", "conversations": []}]', ["id a", "non-empty list"]), ('[{"id": 1, "messages": ["x"]}]', ["id 1"]),
    ('[{"id": "a", "task": "%s"}]' % ("x" * 4100), ["id a", "context of 4096", "--max_new_tokens"])])
def test_bad_data(senders, tmp_path, refuses, content, words):
    if content is not None:
        (tmp_path / "tasks.json").write_text(content)
    refuses(main, argv(senders["qwen2"], tmp_path / "tasks.json", tmp_path / "o"), *words)
    assert not (tmp_path / "o").exists()


GAMES = ["--dataset_path", "", "--env", "test_collect:Game"]


@pytest.mark.parametrize("flags, words", [
    (["--prompt_template", "no field"], ["--prompt_template", "{task}"]),
    (["--question_template", "no field"], ["--question_template", "{task}"]),
    (["--chat_template_kwargs", "[1"], ["--chat_template_kwargs", "JSON"]),
    (["--max_new_tokens", "4090"], ["context of 4096", "--max_new_tokens"]),
    (["--latent_steps", "4090"], ["context of 4096", "--latent_steps"]),
    (["--response_field", "a"], ["id t0", "'a'", "--response_field"]),
    (["--model_name_or_path", "/nowhere/m"], ["/nowhere/m"]), (["--max_sample", "3"], ["--max_sample"]),
    (["--c", "0"], ["--c"]), (["--torch_dtype", "int8"], ["--torch_dtype"]),
    (["--temperature", "0"], ["--temperature"]), (["--top_k", "-1"], ["--top_k"]), (["--top_p", "1.5"], ["--top_p"]),
    (["--dataset_path", ""], ["--dataset_path", "--env"]), (GAMES[2:], ["--dataset_path", "--env"]),
    ([*GAMES, "--subjects", "x"], ["--subjects"]), ([*GAMES, "--split", "x"], ["no games", "split x"]),
    ([*GAMES[:-1], "json:Game"], ["json:Game", "--env"])], ids=lambda words: " ".join(words))
def test_bad_flags(senders, tasks, tmp_path, refuses, flags, words):
    refuses(main, argv(senders["qwen2"], tasks, tmp_path / "o", *flags), *words)
    assert not (tmp_path / "o").exists()


def test_another_sender_or_settings_need_another_directory(tasks, tmp_path, refuses):
    sender, out = save_sender(tmp_path / "sender"), tmp_path / "o"
    run(sender, tasks, out, "--max_samples", 2)
    before = files_of(out)
    refuses(main, argv(sender, tasks, out, "--seed", 1), "different: seed", "--output_dir")
    others = write(tmp_path / "others.json", [{"id": "t0", "task": "water the plant"}])
    refuses(main, argv(sender, others, out), "id t0", "another text", "--output_dir")
    refuses(main, argv(sender, "", out, "--env", "test_collect:Game", "--split", "test"), "different: games")
    save_sender(tmp_path / "sender")  # the same weights again
    run(sender, tasks, out, "--max_samples", 2)
    make_lm(seed=1).save_pretrained(sender)  # trained anew into the same folder
    refuses(main, argv(sender, tasks, out), "another sender", "fingerprint", "--output_dir")
    shard, = before
    (out / shard).write_bytes(before[shard][:-1])
    refuses(main, argv(sender, tasks, out), "truncated", shard)
    assert files_of(out) == {shard: before[shard][:-1]}  # nothing already written is lost


def test_a_second_run_is_refused_on_every_rank(senders, tasks, tmp_path, forked):
    """Else its rank 1, which torchrun stops when rank 0 is refused, writes what it has: the first run's ids."""
    (tmp_path / "o/.rank1").mkdir(parents=True)
    first = os.open(tmp_path / "o/.rank1", os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    done = forked("collect", argv(senders["qwen2"], tasks, tmp_path / "o"), world=2)
    os.close(first)
    assert done["codes"] == [0, 2] and "another run is writing" in done["err"][1]


def test_states_that_overflow_are_refused(tasks, tmp_path, refuses):
    lm = make_lm()
    lm.model.norm.weight.data.fill_(torch.inf)
    save_lm(tmp_path / "m", lm, make_tokenizer())
    refuses(main, argv(tmp_path / "m", tasks, tmp_path / "o"), "cannot be used", "--self_check")
    line = argv(tmp_path / "m", tasks, tmp_path / "o", "--self_check", "false")
    refuses(main, line, "not finite", "--torch_dtype", "id t")
    assert not os.path.exists(tmp_path / "o")


def test_bad_inspect(reference, tmp_path, refuses):
    wide, directory = save_model(tmp_path / "wide", width=48), reference["greedy"].directory
    refuses(main, ["inspect", tmp_path / "nowhere"], "no directory")
    refuses(main, ["inspect", wide], "latent shard")
    refuses(main, ["inspect", directory, "--id", "nobody"], "nobody", directory)
    refuses(main, ["inspect", directory, "--model_name_or_path", wide], "48 wide", "32")

"""Stage 1: what is stored is what the sender thought, whatever the batch, the order, the ranks and the kills."""
import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import collect
from collect import main
from common import atomic_path
from lm import load_lm
from model import LatentSender, LatentShards
from test_eval_alfworld import Game
from tiny import make_data, make_lm, make_tokenizer, save_model, write_tasks

N = 10
SAMPLE = ["--do_sample", "true", "--temperature", "1.3", "--top_p", "0.95", "--top_k", "50"]


def save_sender(directory, family, kind):
    """A tiny LM that often ends its plan: the output rows of the end-of-turn tokens are louder than the others."""
    lm, tokenizer = make_lm(family), make_tokenizer(kind)
    lm.lm_head.weight.data[tokenizer.eos_token_id] *= 3
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def senders(tmp_path_factory):
    root = tmp_path_factory.mktemp("senders")
    return {family: save_sender(root / family, family, kind)
            for family, kind in (("qwen2", "chatml"), ("llama", "llama3"), ("mistral", "mistral"))}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    write_tasks(path, N)
    return str(path)


def argv(model, tasks, out, *more, preset="custom"):
    return [preset, "--model_name_or_path", model, "--dataset_path", str(tasks), "--output_dir", str(out),
            "--torch_dtype", "fp32", "--max_new_tokens", "12", "--batch_size", "4", *map(str, more)]


def run(model, tasks, out, *more):
    main(argv(model, tasks, out, *more))
    return LatentShards(str(out))


def assert_same(a, b, ids=None):
    """The same messages: plans exactly, states to fp32 noise. Everything but the time it took."""
    assert ids is not None or set(a.records) == set(b.records)
    for task_id in ids or a.records:
        x, y = ({k: v for k, v in s.records[task_id].items() if k != "sender_ms"} for s in (a, b))
        assert x == y
        torch.testing.assert_close(a[task_id], b[task_id], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reference(senders, tasks, tmp_path_factory):
    """Sampled and greedy messages of one uninterrupted run."""
    root = tmp_path_factory.mktemp("reference")
    return {"sampled": run(senders["qwen2"], tasks, root / "sampled", *SAMPLE),
            "greedy": run(senders["qwen2"], tasks, root / "greedy")}


# ---- the states

@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("decoding", [[], SAMPLE], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chat_template", ["auto", "none"])
def test_states_are_the_teacher_forced_ones(senders, tasks, tmp_path, family, decoding, chat_template):
    shards = run(senders[family], tasks, tmp_path / "o", "--chat_template", chat_template, *decoding)
    lm, tokenizer = load_lm(senders[family]), make_tokenizer({"qwen2": "chatml", "llama": "llama3"}.get(family, family))
    lengths = []
    for task_id, record in shards.records.items():
        prompt = collect.PRESETS["custom"][0].format(task=record["task"])
        if chat_template == "auto":
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                   add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=chat_template == "none").input_ids
        plan, H = record["plan_token_ids"], shards[task_id]
        with torch.no_grad():
            out = lm(torch.tensor([ids + plan]), output_hidden_states=True)
        torch.testing.assert_close(H, out.hidden_states[-1][0, len(ids) - 1:-1], rtol=0, atol=1e-4)  # shifted by one
        logits = out.logits[0, len(ids) - 1:]
        logits[0, tokenizer.eos_token_id] = -torch.inf  # a plan has at least one token
        if not decoding:
            assert logits[:-1].argmax(-1).tolist() == plan
            assert len(plan) == 12 or logits[-1].argmax() == tokenizer.eos_token_id  # ended by the model, or cut
        assert H.shape == (len(plan), 32) and H.dtype == torch.float32 and plan
        assert tokenizer.eos_token_id not in plan
        assert record["plan"] == tokenizer.decode(plan, skip_special_tokens=True) and record["sender_ms"] > 0
        lengths.append(len(plan))
    assert set(shards.records) == {f"t{i}" for i in range(N)}
    if decoding:
        assert 12 > min(lengths) and len(set(lengths)) > 2  # rows left the batch at different steps


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("how", ["batch 1", "batch 16", "reversed", "2 ranks", "other tasks"])
def test_messages_do_not_depend_on_their_company(senders, tasks, reference, tmp_path, monkeypatch, how, kind):
    more = SAMPLE if kind == "sampled" else []
    if how.startswith("batch"):
        more = more + ["--batch_size", how.split()[1]]
    if how in ("reversed", "other tasks"):
        records = json.load(open(tasks))[::-1]
        tasks = tmp_path / "tasks.json"
        tasks.write_text(json.dumps(records if how == "reversed" else records[2:5]))
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
    assert_same(shards, reference[kind], list(shards.records))


def test_seed_and_temperature_matter(senders, tasks, reference, tmp_path):
    plans = [{k: r["plan_token_ids"] for k, r in s.records.items()} for s in (
        reference["sampled"], run(senders["qwen2"], tasks, tmp_path / "s", *SAMPLE, "--seed", "1"),
        run(senders["qwen2"], tasks, tmp_path / "k", *SAMPLE, "--top_k", "1"), reference["greedy"])]
    assert plans[0] != plans[1] and plans[0] != plans[3]
    assert plans[2] == plans[3]  # the likeliest token alone is greedy decoding


def test_sampling_follows_the_models_distribution():
    """The next token of many seeds against the model's own probabilities."""
    lm, args = make_lm(vocab=8), collect.get_args(argv("m", "d", "o", "--do_sample", "true", "--max_new_tokens", 1))[1]
    lm.lm_head.weight.data *= 0.3
    with torch.no_grad():
        probs = lm(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1)
    drawn = [t[0] for t, _, _ in collect.decode_plans(lm, [[1, 2, 3]] * 4000, range(4000), set(), args)]
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
    shards = run(senders["qwen2"], tasks, tmp_path / "o", "--torch_dtype", dtype, "--max_samples", 2)
    assert all(shards[k].dtype == collect.DTYPES[dtype] for k in shards.records) and shards.sender["dtype"] == dtype


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
        prompt = collect.PRESETS["custom"][0].format(task=record["task"])
        ids = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                      add_generation_prompt=True), return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(shards[task_id], sender(ids, torch.ones_like(ids), 5)[0], rtol=0, atol=1e-4)
        assert record["plan"] == "" and record["plan_token_ids"] == []


# ---- stops and restarts

class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", ["max_samples", "decode", "write"])
def test_restart_gives_the_uninterrupted_messages(senders, tasks, reference, tmp_path, monkeypatch, stop):
    out, more = tmp_path / "o", [*SAMPLE, "--batch_size", 2, "--shard_size_mb", 0.0001]
    if stop == "max_samples":
        run(senders["qwen2"], tasks, out, *more, "--max_samples", 3)
    else:
        name = {"decode": "decode_plans", "write": "write_shard"}[stop]
        real, calls = getattr(collect, name), []

        def dies(*args):
            calls.append(1)
            if len(calls) == 3:
                if stop == "write":  # half of a shard is on disk under its temporary name
                    with atomic_path(args[0]) as temporary:
                        open(temporary, "w").write("half")
                        raise Killed
                raise Killed
            return real(*args)
        with monkeypatch.context() as patch:
            patch.setattr(collect, name, dies)
            with pytest.raises(Killed):
                run(senders["qwen2"], tasks, out, *more)
    before = {f: (out / f).read_bytes() for f in os.listdir(out)}
    assert 1 < len(LatentShards(str(out))) < N  # something is there, not everything
    shards = run(senders["qwen2"], tasks, out, *more)  # an id twice would be an error
    assert_same(shards, reference["sampled"])
    assert all((out / f).read_bytes() == data for f, data in before.items())
    done = set(os.listdir(out))
    run(senders["qwen2"], tasks, out, *more)  # and nothing is left to do
    assert set(os.listdir(out)) == done and all(f.endswith(".safetensors") for f in done)


def test_another_number_of_ranks_continues(senders, tasks, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(senders["qwen2"], tasks, tmp_path / "o", *SAMPLE)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert_same(run(senders["qwen2"], tasks, tmp_path / "o", *SAMPLE), reference["sampled"])


# ---- data fields

def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records))
    return path


def test_alfworld_preset_and_conversations_index(senders, tmp_path):
    turns = [{"from": f, "value": v} for f, v in [("human", "instruction"), ("gpt", "OK"), ("human", " find a cup "),
                                                  ("gpt", "go")]]
    data = write(tmp_path / "sft.jsonl", [{"id": 7, "conversations": turns}])
    for preset, more, task in (("alfworld", [], "find a cup"), ("custom", [], "instruction"),
                               ("custom", ["--conversations_index", -1], "go"),
                               ("custom", ["--task_turn", 1], "OK")):
        out = tmp_path / task
        main(argv(senders["qwen2"], data, out, "--max_new_tokens", 2, *more, preset=preset))
        assert LatentShards(str(out)).records["7"]["task"] == task


def test_games_are_collected_under_their_own_ids(senders, tmp_path):
    flags = ["--env", "test_eval_alfworld:Game", "--split", "test", "--max_new_tokens", 2]
    whole = argv(senders["qwen2"], "d", tmp_path / "o", *flags)
    del whole[whole.index("--dataset_path"):whole.index("--dataset_path") + 2]
    main([*whole, "--max_samples", "3"])
    main(whole)
    shards, games = LatentShards(str(tmp_path / "o")), Game().tasks("test")
    assert {k: (r["task"], r["type"]) for k, r in shards.records.items()} == {
        game["id"]: (game["task"].strip(), game["type"]) for game in games}


def test_fields_and_train_json(senders, tmp_path):
    records = [{"uid": f"q{i}", "q": f"what is {i}?", "a": f"it is {i}", "level": i, "type": "x"} for i in range(3)]
    shards = run(senders["qwen2"], write(tmp_path / "d.json", records), tmp_path / "o", "--id_field", "uid",
                 "--task_field", "q", "--response_field", "a", "--prompt_template", "Q {task} 100% {x}")
    assert {k: (r["task"], r["level"], r["type"]) for k, r in shards.records.items()} == {
        f"q{i}": (f"what is {i}?", i, "x") for i in range(3)}
    assert json.load(open(tmp_path / "o" / "train.json")) == [
        {"id": r["uid"], "conversations": [{"from": "human", "value": r["q"]}, {"from": "gpt", "value": r["a"]}]}
        for r in records]


def test_ids_do_not_depend_on_max_samples(senders, tmp_path):
    data = write(tmp_path / "d.json", [{"task": f"task {i}"} for i in range(4)])
    shards = run(senders["qwen2"], data, tmp_path / "o", "--max_samples", 2)
    assert {k: r["task"] for k, r in shards.records.items()} == {"0": "task 0", "1": "task 1"}


# ---- inspect

def test_inspect_lists_and_reads_the_latents(reference, senders, capsys):
    shards = reference["greedy"]
    main(["inspect", shards.directory])
    text = capsys.readouterr().out
    assert f"{N} messages in 1 shards" in text and "width 32" in text and "seed: 0" in text
    assert all(f"\n{k}: {shards.lengths[k]} rows" in text and r["task"] in text for k, r in shards.records.items())
    main(["inspect", shards.directory, "--id", "t4", "--model_name_or_path", senders["qwen2"], "--top_k", "2"])
    text = capsys.readouterr().out
    assert "\nt4: " in text and "\nt3: " not in text
    lines = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    plan, tokenizer, lm = shards.records["t4"]["plan_token_ids"], make_tokenizer(), load_lm(senders["qwen2"])
    assert len(lines) == len(plan)
    for n, line in enumerate(lines):  # greedy: each latent's likeliest token is the one that was written
        written = repr(tokenizer.decode([plan[n]]))
        assert line.split()[0] == str(n) and (n == 0 or line.count(written) >= 2)
        top = F.softmax(lm.lm_head(shards["t4"][n]), -1).max().item()
        assert f" {top:.2f}" in line


# ---- bad input

@pytest.mark.parametrize("content, words", [
    (None, ["no file", "tasks.json"]), ("[{", ["not valid JSON", "tasks.json"]), ("{}", ["non-empty list of records"]),
    ("[]", ["non-empty list"]), ('["x"]', ["list of records"]),
    ('[{"id": "a", "q": "x"}]', ["id a", "'task'", "--task_field"]),
    ('[{"id": "a", "task": "x"}, {"id": "a", "task": "y"}]', ["id a", "twice"]),
    ('[{"id": "__metadata__", "task": "x"}]', ["__metadata__", "reserved"]),
    ('[{"id": "a", "task": "x"}, {"id": "b", "task": " "}]', ["id b", "empty"]), ('[{"id": "a", "task": 3}]', ["id a"]),
    ('[{"id": "a", "conversations": []}]', ["id a", "--conversations_index"]),
    ('[{"id": "a", "conversations": ["x"]}]', ["id a"]),
    ('[{"id": "a", "task": "%s"}]' % ("x" * 4100), ["id a", "context of 4096", "--max_new_tokens"])])
def test_bad_data(senders, tmp_path, refuses, content, words):
    if content is not None:
        (tmp_path / "tasks.json").write_text(content)
    refuses(main, argv(senders["qwen2"], tmp_path / "tasks.json", tmp_path / "o"), *words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags, words", [
    (["--prompt_template", "no field"], ["--prompt_template", "{task}"]),
    (["--latent_steps", "0"], ["--latent_steps", "1"]),
    (["--max_new_tokens", "4090"], ["context of 4096", "--max_new_tokens"]), (["--surprise", "1"], ["--surprise"]),
    (["--latent_steps", "4090"], ["context of 4096", "--latent_steps"]), (["--do_sample", "maybe"], ["--do_sample"]),
    (["--response_field", "a"], ["id t0", "'a'", "--response_field"]), (["--torch_dtype", "int8"], ["--torch_dtype"]),
    (["--model_name_or_path", "/nowhere/m"], ["/nowhere/m"]), (["--max_sample", "3"], ["--max_sample"]),
    (["--batch_size", "0"], ["--batch_size"]), (["--max_new_tokens", "0"], ["--max_new_tokens"]),
    (["--c", "0"], ["--c"]),
    (["--do_sample", "true", "--temperature", "0"], ["--temperature"]),
    (["--do_sample", "true", "--top_k", "-1"], ["--top_k"]), (["--do_sample", "true", "--top_p", "1.5"], ["--top_p"])],
    ids=lambda words: " ".join(words))
def test_bad_flags(senders, tasks, tmp_path, refuses, flags, words):
    refuses(main, argv(senders["qwen2"], tasks, tmp_path / "o", *flags), *words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags, words", [
    (["--env", "test_eval_alfworld:Game"], ["--dataset_path", "--env"]),
    (["--dataset_path", "", "--env", "test_eval_alfworld:Game", "--subjects", "x"], ["--subjects"]),
    (["--dataset_path", "", "--env", "test_eval_alfworld:Game", "--split", "x"], ["no games", "split x"]),
    (["--dataset_path", ""], ["--dataset_path", "--env"]),
    (["--dataset_path", "", "--env", "json:Game"], ["json:Game", "module:Class"])], ids=lambda words: " ".join(words))
def test_bad_games(senders, tasks, tmp_path, refuses, flags, words):
    refuses(main, argv(senders["qwen2"], tasks, tmp_path / "o", *flags), *words)
    assert not (tmp_path / "o").exists()


def test_a_sender_trained_anew_into_the_same_folder_is_another(tasks, tmp_path, refuses):
    sender = save_sender(tmp_path / "sender", "qwen2", "chatml")
    run(sender, tasks, tmp_path / "o", "--max_samples", 2)
    save_sender(tmp_path / "sender", "qwen2", "chatml")  # the same weights again
    run(sender, tasks, tmp_path / "o", "--max_samples", 3)
    make_lm(seed=1).save_pretrained(sender)
    refuses(main, argv(sender, tasks, tmp_path / "o"), "another sender", "fingerprint", "--output_dir")
    assert len(LatentShards(str(tmp_path / "o"))) == 3


@pytest.mark.parametrize("how, words", [("settings", ["different: seed", "--output_dir"]),
                                        ("truncated", ["truncated", "0.saf"]), ("mixed", ["mixes senders", "foreign"])])
def test_bad_directory_to_resume(senders, tasks, tmp_path, refuses, how, words):
    out = tmp_path / "o"
    run(senders["qwen2"], tasks, out, "--max_samples", 2)
    shard = out / "latents-rank00000-00000.safetensors"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    if how == "mixed":
        _, other = make_data(str(tmp_path / "d"))
        os.rename(os.path.join(other, shard.name), out / "z-foreign.safetensors")
    before = {f: (out / f).read_bytes() for f in os.listdir(out)}
    refuses(main, argv(senders["qwen2"], tasks, out, *(["--seed", 1] if how == "settings" else [])), *words)
    assert {f: (out / f).read_bytes() for f in os.listdir(out)} == before  # nothing already written is lost


def test_states_that_overflow_are_refused(tasks, tmp_path, refuses):
    lm = make_lm()
    lm.model.norm.weight.data.fill_(torch.inf)
    lm.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    refuses(main, argv(str(tmp_path / "m"), tasks, tmp_path / "o"), "not finite", "--torch_dtype", "id t")


def test_bad_inspect(reference, tmp_path, refuses):
    wide, directory = save_model(tmp_path / "wide", width=48), reference["greedy"].directory
    refuses(main, ["inspect", tmp_path / "nowhere"], "no directory")
    refuses(main, ["inspect", wide], "latent shard")
    refuses(main, ["inspect", directory, "--id", "nobody"], "nobody", directory)
    refuses(main, ["inspect", directory, "--model_name_or_path", wide], "48 wide", "32")

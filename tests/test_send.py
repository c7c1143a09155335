"""What is sent of a plan's states, and plans that another wrote: read as if the sender had written them."""
import pytest
import torch

from collect import decode_plans, load_send, main, read_plans
from hf import load_lm
from test_collect import argv, assert_same, prompt_ids, run, write
from tiny import make_lm, make_tokenizer, save_lm, write_tasks

SAMPLED = ["--do_sample", "true", "--temperature", 20, "--top_k", 3]


def middle(lm, hidden_states, logits):
    return torch.cat([hidden_states[1], logits.topk(3).values], dim=1)  # (n, D + 3)


def infinite(lm, hidden_states, logits):
    return hidden_states[1] / 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(sender, tasks, its messages, the tasks with its plans). It writes letters, so a plan's text gives its ids."""
    root = tmp_path_factory.mktemp("send")
    lm, tokenizer = make_lm(layers=3), make_tokenizer()
    lm.lm_head.weight.data[[*tokenizer("abcde fghij").input_ids, tokenizer.eos_token_id]] *= 20
    sender = save_lm(root / "sender", lm, tokenizer)
    tasks = write_tasks(root / "tasks.json")
    written = run(sender, root / "tasks.json", root / "o", *SAMPLED)
    assert len(set(written.lengths.values())) > 2
    plans = [task | {"said": written.records[task["id"]]["plan"]} for task in tasks]
    return sender, root / "tasks.json", written, write(root / "plans.json", plans)


@pytest.mark.parametrize("name", ["layer:0", "layer:2", "layer:3", "expected", "test_send:middle"])
def test_what_is_sent_is_of_the_states_that_predict_the_plan(world, tmp_path, name):
    """Of a plan that is written and of one that is given, against one pass of plain transformers."""
    sender, tasks, written, plans = world
    flags, lm = [*SAMPLED, "--send", name], load_lm(sender)
    for shards in (run(sender, tasks, tmp_path / "a", *flags),
                   run(sender, plans, tmp_path / "b", *flags, "--plan_field", "said")):
        assert shards.sender["send"] == name and shards.hidden_size == (35 if "middle" in name else 32)
        for task_id, record in shards.records.items():
            ids, plan = prompt_ids(make_tokenizer(), record["task"]), record["plan_token_ids"]
            assert plan == written.records[task_id]["plan_token_ids"]
            with torch.no_grad():
                output = lm(torch.tensor([ids + plan]), output_hidden_states=True)
                words = lm.get_input_embeddings()(torch.arange(280))
            states = [layer[0, len(ids) - 1:-1] for layer in output.hidden_states]
            logits = output.logits[0, len(ids) - 1:-1]
            expected = {f"layer:{n}": layer for n, layer in enumerate(states)}
            expected |= {"expected": logits.softmax(-1) @ words, "test_send:middle": middle(lm, states, logits)}
            torch.testing.assert_close(shards[task_id], expected[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_plan_that_is_given_is_read_as_if_it_had_been_written(world, tmp_path, monkeypatch, batch_size):
    """Nothing is decoded or cut, in any company."""
    sender, _, written, plans = world
    monkeypatch.setattr("collect.decode", None)
    more = ["--plan_field", "said", "--batch_size", batch_size, "--max_new_tokens", 2]
    read = run(sender, plans, tmp_path / "o", *more)
    assert_same(read, written)
    for task_id in read.records:
        torch.testing.assert_close(read[task_id], written[task_id], rtol=0, atol=1e-5)
    assert read.sender["plan_field"] == "said"


def test_each_token_ends_somewhere_in_the_plan(world, tmp_path, refuses):
    plan, tokenizer = "go to é, then", make_tokenizer()
    file = write(tmp_path / "d.json", [{"id": "a", "task": "x", "p": plan}])
    record = run(world[0], file, tmp_path / "o", "--plan_field", "p").records["a"]
    assert record["token_ends"] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13] and record["plan"] == plan
    assert tokenizer.decode(record["plan_token_ids"]) == plan
    write(tmp_path / "d.json", [{"id": "a", "task": "x", "p": "go"}])
    refuses(main, argv(world[0], file, tmp_path / "o", "--plan_field", "p"), "id a for another text")


def test_other_layers_are_asked_for_only_where_they_are_sent(world):
    lm, asked = load_lm(world[0]), []
    lm.model.register_forward_pre_hook(lambda module, args, given: asked.append(given.get("output_hidden_states")),
                                       with_kwargs=True)
    for name, all_layers in (("last", False), ("expected", False), ("layer:1", True), ("test_send:middle", True)):
        for work in (lambda: decode_plans(lm, [[5]], [0], [], max_new_tokens=2, send=name),
                     lambda: read_plans(lm, [[5, 6]], [1], name)):
            asked.clear()
            work()
            assert asked and any(asked) == all_layers == load_send(name)[1]


def test_expected_is_of_what_the_embedding_module_gives():
    """Gemma's multiplies its table."""
    lm = make_lm("gemma3_text")
    (_, sent, _), = read_plans(lm, [[5, 6, 7]], [1], "expected")
    with torch.no_grad():
        words = lm.get_input_embeddings()(torch.arange(280))
        probs = lm(torch.tensor([[5, 6]])).logits[0, -1:].softmax(-1)
    assert words.norm() > 2 * lm.get_input_embeddings().weight.norm()
    torch.testing.assert_close(sent, probs @ words, rtol=1e-4, atol=1e-4)


def test_a_directory_has_one_way_to_send(world, tmp_path, refuses, capsys):
    sender, tasks, out = *world[:2], tmp_path / "o"
    run(sender, tasks, out, "--max_samples", 2)
    refuses(main, argv(sender, tasks, out, "--send", "layer:1"), "different: send", "--output_dir")
    expected = run(sender, tasks, tmp_path / "e", "--send", "expected")
    main(["inspect", expected.directory])
    assert "send: 'expected'" in capsys.readouterr().out
    refuses(main, ["inspect", expected.directory, "--model_name_or_path", sender], "--send expected", "output head")


@pytest.mark.parametrize("flags, words", [
    ("--send first", ["--send first", "layer:3"]), ("--send layer:4", ["layer:4", "layer:3"]),
    ("--send layer:x", ["layer:x"]), ("--send nowhere:f", ["nowhere:f"]),
    ("--send test_send:infinite", ["id a", "not finite"]),
    ("--send expected --latent_steps 3", ["--latent_steps"]), ("--plan_field list --latent_steps 3", ["--plan_field"]),
    ("--plan_field list --env x --dataset_path=", ["--env", "--plan_field"]),
    ("--plan_field nothing", ["id a", "--plan_field"]), ("--plan_field empty", ["id a", "empty"]),
    ("--plan_field list", ["id a", "not a text"]), ("--plan_field long", ["id a", "context of 4096", "plan"])])
def test_bad_flags_and_plans(world, tmp_path, refuses, flags, words):
    record = {"id": "a", "task": "x", "empty": None, "list": ["go"], "long": "x" * 4100}
    refuses(main, argv(world[0], write(tmp_path / "d.json", [record]), tmp_path / "o", *flags.split()), *words)
    assert not list((tmp_path / "o").glob("*"))

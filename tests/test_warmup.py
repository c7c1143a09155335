"""What an adapter learns from messages alone: the warm-up, and the maps in closed form."""
import os

import pytest
import torch
import torch.nn.functional as F

from common import read_json
from data import Conversations, words_of_states
from hf import load_lm, load_tokenizer, word_embeddings
from model import LatentActor, nearness, open_shards, procrustes, word_targets
from tiny import (argv_of, column, make_data, make_tokenizer, message_of, same_tensors, save_model, tensors,
                  write_messages)
from train_actor import main

WARM = {"max_steps": 0, "adapter_warmup_steps": 30, "adapter_warmup_learning_rate": 3e-3}


def argv(world, out, **flags):
    small = {"num_heads": 4, "global_batch_size": 4, "eval_ratio": 0.3}
    return argv_of({**world, "output_dir": out, **small, **flags})


def train(world, out, **flags):
    main(argv(world, out, **flags))
    return str(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and messages that are its own words' embeddings, turned, in another scale."""
    root = tmp_path_factory.mktemp("warm")
    path, (train_file, messages) = save_model(root / "model"), make_data(str(root / "data"), 12)
    table, records = word_embeddings(load_lm(path), 2**31), open_shards(messages).records
    turned = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0] * 5
    tokenizer = load_tokenizer(path)
    latents = {k: table[tokenizer(r["plan"]).input_ids] @ turned for k, r in records.items()}
    write_messages(messages, latents, records)
    return {"model_name_or_path": path, "train_file": train_file, "hidden_data": messages}


def how_near(path, world):
    """(nearest word right, cosine) of all messages under the actor at `path`."""
    actor, shards = LatentActor.load(path), open_shards(world["hidden_data"])
    data = Conversations(world["train_file"], actor.tokenizer, shards)
    vectors = [message_of(actor, data.shards[data.ids[n]]) for n in range(len(data))]
    words = [ids for n in range(len(data)) for ids in data.words(n)]
    return nearness(torch.cat(vectors), words, word_embeddings(actor.lm, 2**31))


@pytest.fixture(scope="module")
def warm(world, tmp_path_factory):
    return train(world, str(tmp_path_factory.mktemp("warm") / "o"), **WARM)


def test_only_the_adapter_learns_and_it_learns_the_words(world, warm, tmp_path, capsys):
    cold = train(world, tmp_path / "cold", max_steps=0)
    for (file, name), tensor in tensors(warm).items():
        assert torch.equal(tensor, tensors(cold)[file, name]) == (file == "model.safetensors"), name
    (right, cosine), (_, before) = how_near(warm, world), how_near(cold, world)
    assert cosine > 0.9 > before and right > 0.9
    assert not os.path.exists(f"{warm}/loss_log.csv") and "eval_loss" in capsys.readouterr().out


def test_a_warm_up_depends_on_nothing_but_its_seed(world, warm, tmp_path, forked):
    """Not on the number of ranks nor on a kill inside it; a run goes on from it as from any checkpoint."""
    two = forked("train_actor", argv(world, tmp_path / "two", **WARM), world=2)
    assert two["codes"] == [0, 0], two["err"]
    assert same_tensors(tmp_path / "two", warm)
    assert not same_tensors(train(world, tmp_path / "other", **WARM, seed=1), warm)
    whole = train(world, tmp_path / "whole", **{**WARM, "max_steps": 2})
    killed = forked("train_actor", argv(world, tmp_path / "parts", **{**WARM, "max_steps": 2}), event=1,
                    on="os.rename", signal=9)
    main(argv(world, tmp_path / "parts", **{**WARM, "max_steps": 2}))
    assert same_tensors(whole, tmp_path / "parts") and killed["codes"] == [-9], killed
    assert len(column(train(world, warm, **{**WARM, "max_steps": 2}), "loss")) == 2


def test_words_of_states():
    """Tokens of one text that share characters: every state has some, whatever the two tokenizers are."""
    byte, piece = make_tokenizer("chatml"), make_tokenizer("llama2")
    for tokenizer in (byte, piece):
        text = "take mug 1"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = [len(tokenizer.decode(ids[:n + 1])) for n in range(len(ids))]
        if ends[-1] == len(text):  # the decoder that says the text again
            assert words_of_states(tokenizer, text, ends) == [[token] for token in ids]
        said = [byte.decode(group) for group in words_of_states(byte, text, [4, 8, 10])]
        assert said == ["take", " mug", " 1"]
    euro = words_of_states(byte, "a€", [1, 1, 1, 2])  # the sender wrote it in three tokens
    assert [len(group) > 0 for group in euro] == [True] * 4


def test_word_targets_are_means_of_embeddings():
    table = torch.randn(9, 4)
    targets = word_targets(table, [[7], [8, 2], [7]])
    torch.testing.assert_close(targets, torch.stack([table[7], (table[8] + table[2]) / 2, table[7]]))
    assert nearness(table[[7, 2, 1]], [[7], [8, 2], [7]], table)[0] == pytest.approx(2 / 3)


def test_closed_forms(world, tmp_path, capsys):
    """procrustes undoes a rotation and a scale; none gives the states as they are."""
    states = torch.randn(50, 6)
    turned = torch.linalg.qr(torch.randn(6, 6))[0] * 0.3
    torch.testing.assert_close(procrustes(states, states @ turned), turned)
    narrow = procrustes(states, states @ turned[:, :4])  # an actor of another width
    assert narrow.shape == (6, 4) and F.cosine_similarity(states @ narrow, states @ turned[:, :4]).mean() > 0.9
    fitted = train(world, tmp_path / "p", max_steps=0, adapter="procrustes")
    assert how_near(fitted, world) == (1.0, pytest.approx(1.0, abs=1e-4))
    same = train(world, tmp_path / "n", max_steps=2, adapter="none")
    weight = LatentActor.load(same).adapter.weight
    assert torch.equal(weight, torch.eye(32)) and not weight.requires_grad  # two steps did not move it
    assert read_json(f"{same}/latent_adapter.json")["adapter"]["class"] == "model:LinearMap"
    assert "nearest word right" in capsys.readouterr().out


@pytest.mark.parametrize("flags, sender, said", [
    ({"adapter_warmup_steps": 3}, {"c": 4}, "no word for each state"),
    ({"adapter_warmup_steps": 3, "message": "text"}, {}, "needs --message latent"),
    ({"adapter_warmup_steps": 3, "adapter": "none"}, {}, "an adapter that can learn"),
    ({"adapter": "none"}, {"width": 16}, "16 wide, the actor 32")])
def test_refused_in_one_line(world, tmp_path, capsys, flags, sender, said):
    shards = open_shards(world["hidden_data"])
    (tmp_path / "m").mkdir()
    latents = {k: shards[k][:, :sender.get("width", 32)].contiguous() for k in shards.records}
    messages = write_messages(tmp_path / "m", latents, shards.records, c=sender.get("c"))
    with pytest.raises(SystemExit) as stop:
        main(argv({**world, "hidden_data": messages}, tmp_path / "o", **flags))
    assert stop.value.code == 2 and said in capsys.readouterr().err


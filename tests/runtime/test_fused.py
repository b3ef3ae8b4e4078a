"""FuseChat: tokens aligned, vocabularies matched, distributions carried over, and rows that a run trains on."""

import functools
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError
from mipipe.runtime.recipes.alignment import align, carry, edit_distance, match_vocabulary, source_place
from mipipe.runtime.recipes.fused import FusedRows, make_fused
from mipipe.runtime.train.config import DataConfig
from mipipe.runtime.train.data import check_source, make_batches


def test_tokens_are_aligned_by_their_letters():
    """["the", " util", "ity"] and ["the", " ut", "il", "ity"]: [[0], [1], [2], [2]] at cost 4; one with itself at 0."""
    assert align(["the", " ut", "il", "ity"], ["the", " util", "ity"]) == ([[0], [1], [2], [2]], 4)
    same = ["a", " b", "c", " d"]
    assert align(same, same) == ([[0], [1], [2], [3]], 0)
    assert align(["ab"], ["a", "b"]) == ([[0, 1]], 2) and align([], ["a"]) == ([], 0) and align(["a"], []) == ([[]], 0)
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("a", "a"))] == [3, 3, 0]


def test_tokens_that_never_met_by_their_text_are_matched_by_what_they_were_aligned_with():
    """sigmoid(count) x distance, a tenth of it where one piece contains the other."""
    counts = {(0, 9): 1, (1, 9): 3, (2, 9): 2, (2, 8): 1}
    assert match_vocabulary(counts, {0: "xyz", 1: "ab", 2: "qq"}, {9: "abc", 8: "r"}) == {9: 1, 8: 2}


def test_which_step_of_the_source_speaks_for_a_token():
    source = ["the", " util", "ity", "x"]
    assert source_place([0], "the", source) == 0 and source_place([1], "il", source) == 1
    assert source_place([3], "il", source) is None
    assert source_place([1, 2], " utility", source) == 2 and source_place([1, 2], "abc", source) is None


def test_entries_are_carried_over_once():
    ids, parts = carry([5, 6, 7, 8], [2.0, 1.0, 0.0, -1.0], {5: 50, 6: 51}, {7: 50, 6: 99}, 0)
    assert ids == [50, 51, 0]  # 7 would be 50 again
    powers = torch.tensor([2.0, 1.0, -1.0]).softmax(0)
    assert parts == pytest.approx(powers.tolist())


def tokenizer(folder, words):
    """Of words' pieces, longest first; every letter is a token, too."""
    from tokenizers import Tokenizer, models
    letters = "abcdefghijklmnopqrstuvwxyz ."
    vocabulary = {piece: place for place, piece in enumerate(["<unk>", "<end>", *letters, *words])}
    scores = [(piece, -1.0 if piece in words else -3.0) for piece in vocabulary]
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, unk_id=0)),
                                                unk_token="<unk>", eos_token="<end>")
    made.save_pretrained(folder)
    return len(vocabulary)


def model(folder, words, seed):
    folder.mkdir()
    size = tokenizer(folder, words)
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=size)
    made = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for item in made.parameters():
            item.normal_(0.0, 0.3)
    made.save_pretrained(folder)
    return made


@pytest.fixture
def place(tmp_path):
    rows = [{"prompt": "say it. ", "response": text} for text in ("the cat sat", "a dog.", "the end of the cat")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_pivot_fused_with_itself_learns_from_its_own_distribution(place):
    own = model(place / "pivot", ["the", " cat"], 0)
    facts = make_fused(place / "pivot", place / "pivot", place / "texts.jsonl", place / "fused", top=3)
    assert facts["rows"] == 3 and facts["rows_of_the_source"] == 0 and facts["tokens_without_a_match"] == 0
    rows = next(iter(FusedRows(fused_graph(), 3, 0, str(place / "fused"))))
    with torch.no_grad():
        shares = own(input_ids=rows["input_ids"]).logits.softmax(-1)
    for row, labels in enumerate(rows["labels"]):
        places = (labels != -100).nonzero().flatten().tolist()
        assert places and all(int(labels[t]) == int(rows["input_ids"][row, t]) for t in places)
        for t in places:
            best = shares[row, t - 1].topk(3)
            assert rows["fused_ids"][row, t].tolist() == best.indices.tolist()
            assert torch.allclose(rows["fused_probs"][row, t], best.values / best.values.sum(), atol=1e-5)


@functools.cache
def fused_graph():
    """Of a small model with the loss ``fuse``, 32 tokens and 3 entries."""
    from mipipe.graphs.models.sources import open_source
    from mipipe.graphs.recipes.options import LossConfig, RecipeConfig
    from mipipe.graphs.recipes.source import with_recipe
    opened = with_recipe(open_source("GPT2LMHeadModel", seq=32, batch=1, overrides={
        "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 40}),
        RecipeConfig(LossConfig("fuse", {"top": 3})))
    return capture_module(opened.build("meta"), opened.inputs("meta"), loss=opened.loss, loss_info=opened.loss_info,
                          withheld=opened.withheld, constants=opened.constants, source=opened.record, verify=False)


def test_a_source_that_knows_the_texts_is_heard_in_the_pivots_vocabulary(place):
    """Every share belongs to an entry of the pivot; responses of the source have its sums of shares."""
    model(place / "pivot", ["the", " cat"], 0)
    knows = model(place / "source", ["th", "e cat", "sat", "dog"], 1)
    reader = transformers.AutoTokenizer.from_pretrained(place / "source")
    optimizer = torch.optim.Adam(knows.parameters(), lr=1e-2)
    texts = [json.loads(line) for line in (place / "texts.jsonl").read_text().splitlines()]
    for _ in range(60):
        for item in texts:
            ids = torch.tensor([reader(item["prompt"] + item["response"])["input_ids"]])
            knows(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    knows.save_pretrained(place / "source")
    facts = make_fused(place / "pivot", place / "source", place / "texts.jsonl", place / "fused", top=3)
    assert facts["rows_of_the_source"] == 3 and 0 < facts["tokens_without_a_match"] < facts["tokens"]
    rows = next(iter(FusedRows(fused_graph(), 3, 0, str(place / "fused"))))
    told = rows["labels"] != -100
    assert torch.allclose(rows["fused_probs"].sum(-1)[told], torch.ones(int(told.sum())), atol=1e-6)
    assert not rows["fused_probs"][~told].any() and int(told.sum()) == facts["tokens"]
    likely = rows["fused_ids"].gather(-1, rows["fused_probs"].argmax(-1, keepdim=True))[..., 0]
    assert float((likely == rows["labels"])[told].float().mean()) > 0.6  # what the source learned, said by the pivot


def test_rows_pass_once_each_and_copies_take_turns(place):
    model(place / "pivot", ["the"], 0)
    make_fused(place / "pivot", place / "pivot", place / "texts.jsonl", place / "fused", top=2)
    graph, folder = fused_graph(), str(place / "fused")
    whole = next(iter(FusedRows(graph, 3, 1, folder)))["input_ids"]
    parts = [next(iter(FusedRows(graph, 1, 1, folder, copy, 3)))["input_ids"] for copy in range(3)]
    assert torch.equal(torch.cat(parts), whole) and len({tuple(row) for row in whole.tolist()}) == 3
    batches = make_batches(DataConfig("fused", options={"folder": folder}), graph, 3, 1)
    assert torch.equal(next(batches)["input_ids"], whole)


def test_what_cannot_be_fused_is_one_line(place):
    model(place / "pivot", ["the"], 0)
    make_fused(place / "pivot", place / "pivot", place / "texts.jsonl", place / "fused", samples=1)
    (place / "wrong.jsonl").write_text('{"prompt": "a"}\n')
    (place / "extra.jsonl").write_text(json.dumps({"text": "extra words"}))
    (place / "bytes.jsonl").write_bytes(b"\xff\xfe{}")
    (place / "long.jsonl").write_text(json.dumps({"prompt": "the" * 20, "response": "cat"}))
    good = load_file(place / "fused" / "fused.safetensors")
    for name, tensors in (("cut", None), ("less", {"labels": good["labels"]}),
                          ("odd", {**good, "labels": good["labels"][:, :1].contiguous()}),
                          ("empty", {name: item[:0] for name, item in good.items()})):
        (place / name).mkdir()
        if tensors is None:
            (place / name / "fused.safetensors").write_bytes(b"x" * 30)
        else:
            save_file(tensors, place / name / "fused.safetensors")
    shutil.copytree(place / "pivot", place / "wide")
    tokenizer(place / "wide", ["the", "extra", "words"])
    for make, text in (
            (lambda: make_fused(place / "pivot", place / "pivot", place / "texts.jsonl", place / "fused"),
             "exists already"),
            (lambda: make_fused(place / "pivot", place / "pivot", place / "wrong.jsonl", place / "new"),
             r"wrong\.jsonl, line 1: expected text, or prompt and response"),
            (lambda: make_fused(place / "pivot", place, place / "texts.jsonl", place / "new"), "has no tokenizer"),
            (lambda: FusedRows(fused_graph(), 1, 0, str(place / "fused")), "but the graph takes"),
            (lambda: FusedRows(fused_graph(), 1, 0, str(place / "cut")), "no safetensors file"),
            (lambda: FusedRows(fused_graph(), 1, 0, str(place / "less")), "found no input_ids"),
            (lambda: FusedRows(fused_graph(), 1, 0, str(place / "odd")), "do not fit each other"),
            (lambda: FusedRows(fused_graph(), 1, 0, str(place / "empty")), "has no row"),
            (lambda: make_fused(place / "pivot", place / "pivot", place / "texts.jsonl", place / "new", top=0),
             "top: found 0, expected at least 1"),
            (lambda: make_fused(place / "pivot", place / "pivot", place / "bytes.jsonl", place / "new"),
             "not a text file"),
            (lambda: make_fused(place / "pivot", place / "pivot", place / "long.jsonl", place / "new", length=4),
             "no response is left of rows of 4 tokens"),
            (lambda: make_fused(place / "pivot", place / "wide", place / "extra.jsonl", place / "new"),
             "wide: its tokenizer has the token .*, its embedding .* rows"),
            (lambda: FusedRows(fused_graph(), 1, 0, str(place / "none")), "make_fused writes it"),
            (lambda: check_source(DataConfig("fused")), "needs options")):
        with pytest.raises(InputError, match=text) as error:
            make()
        assert "\n" not in str(error.value)
    assert not (place / "new").exists()

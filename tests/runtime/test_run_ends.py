"""How a run ends before its last step: what was done is saved, the step is named, and nothing bad is saved."""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import kill_saves
import numpy
import pytest
import runtime_cases as cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_run_starts import trainer

from mipipe.graphs.errors import BatchError, DataEnd, InputError, RunError, StoppedError
from mipipe.runtime import worker
from mipipe.runtime.checkpoints.checkpoint import check_finite
from mipipe.runtime.checkpoints.checkpoint_folder import complete, latest, read_state, verify
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.data_state import read_loader
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import CheckpointConfig, DataConfig, OptimizerConfig, TrainConfig
from mipipe.runtime.train.data import Batches, TextBytes, make_batches
from mipipe.runtime.train.launching.failures import DONE
from mipipe.runtime.train.launching.launch import end_of
from mipipe.runtime.train.prefetch import Prefetched
from mipipe.runtime.train.training import SKIPPED_IN_A_ROW, Trainer


def batches(*odd, count=6):
    """A finite loader; ``odd``: (number, change) of batches that are not as they should be."""
    made = list(itertools.islice(iter(kill_saves.Loader()), count))
    for number, change in odd:
        made[number] = change(dict(made[number]))
    return made


def short(batch):
    return {name: tensor[:cases.ROWS] for name, tensor in batch.items()}


def shorter(batch):
    return {name: tensor[:1] for name, tensor in batch.items()}


def without(batch):
    return {name: tensor for name, tensor in batch.items() if name != "t"}


def saved_once(folder, **changes):
    """A trainer that saves only when it must."""
    made = trainer(folder, **changes)
    made.config = dataclasses.replace(made.config, checkpoint=dataclasses.replace(made.config.checkpoint, every=0))
    return made


@pytest.mark.parametrize("change, message", [
    (short, r"step 4: batch: x has 3 rows, not a multiple .* left out with drop_last=True"),
    (shorter, "step 4: batch: x has 1 rows, not a multiple .* left out with drop_last=True"),
    (without, "step 4: batch: input 't' of chain is missing"),
    (lambda batch: {**batch, "x": batch["x"].tolist()}, "step 4: batch: x is a list, expected a tensor"),
    (lambda batch: {**batch, "x": torch.tensor(1.0)}, "step 4: batch: x is a Tensor, expected a tensor whose rows"),
    (lambda batch: [without(short(batch))] * 2, "step 4: batch: input 't' of chain is missing"),
    (lambda batch: [batch], "step 4: batch: 1 microbatches were given, but the plan has 2"),
    (lambda batch: "text", "step 4: batch: a str, expected tensors by name"),
])
def test_a_batch_that_does_not_fit(tmp_path, change, message):
    """The steps before it are saved, with the place before it in the data: mended data goes on exactly there. Or it is
    passed over, with a line, and what is trained is what the data without it gives."""
    whole = trainer(tmp_path / "whole", 6, loader=[*batches()[:3], *batches()[4:]]).run()
    with pytest.raises(BatchError, match=message) as caught:
        saved_once(tmp_path, steps=6, loader=batches((3, change))).run()
    assert str(caught.value).endswith(f"what was done is saved in {tmp_path}/c/step-3; go on with --resume")
    assert [path.name for path in complete(tmp_path / "c")] == ["step-3"]
    mended = trainer(tmp_path, 6, loader=[*batches()[:3], *batches()[4:]])
    assert mended.begin(Start.RESUME) == 3
    assert mended.run(3) == whole[3:]
    said = []
    passing = trainer(tmp_path / "passing", 6, said=said, loader=batches((3, change)),
                      data=DataConfig(skip_invalid=True))
    assert passing.run() == whole
    assert len(said) == 1 and said[0].endswith("passed over (skip_invalid)") and said[0].startswith("step 4: batch")
    records = [json.loads(line) for line in (tmp_path / "passing" / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("data/skipped") for record in records] == [None, None, None, 1, None, None]


def test_a_loader_without_any_valid_batch_ends(tmp_path):
    taken = []

    class Never:
        def __iter__(self):
            while True:
                taken.append(1)
                yield short(batches()[0])

    with pytest.raises(BatchError, match=r"step 1: batch: x has 3 rows.*; no step was done before it"):
        trainer(tmp_path, loader=Never(), data=DataConfig(skip_invalid=True)).run()
    assert len(taken) == SKIPPED_IN_A_ROW + 1


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_data_that_ends(tmp_path, skip, ahead):
    """What was done with it is saved, and more data goes on exactly there; none at all is an input's error."""
    def ending(folder, count):
        made = saved_once(folder, steps=6, loader=iter(batches()[:count]), data=DataConfig(skip_invalid=skip))
        if ahead:
            made.batches = Prefetched(made.batches, False, 20.0)
        return made

    whole = trainer(tmp_path / "whole", 6, loader=batches()).run()
    with pytest.raises(BatchError, match=r"step 4: data: the loader .* ended and cannot be iterated again; what was "
                                         r"done is saved in .*step-3; go on with --resume"):
        ending(tmp_path, 3).run()
    more = ending(tmp_path, 6)
    assert more.run(more.begin(Start.RESUME)) == whole[3:]
    with pytest.raises(InputError, match="the loader gives no batch"):
        ending(tmp_path / "none", 0).run()


class Failing:
    """Batches of a list until one, where a person's code raises; with or without a state of its own."""

    def __init__(self, made, at, error):
        self.made, self.at, self.error = made, at, error

    def __iter__(self):
        for number, batch in enumerate(self.made):
            if number == self.at:
                raise self.error
            yield batch


class FailingState(Failing):
    where = ""

    def state_dict(self):
        if self.where == "state_dict":
            raise self.error
        return {"place": 1}

    def load_state_dict(self, state):
        raise self.error


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("error, told", [
    (ValueError("corrupt sample 17"), "ValueError: corrupt sample 17"), (KeyError("text"), "KeyError: 'text'"),
    (FileNotFoundError(2, "No such file", "shard"), "FileNotFoundError: .*shard"), (MemoryError(), "MemoryError"),
    (RuntimeError('Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
                  '  File "mine.py", line 7, in read\n    1 / 0\nZeroDivisionError: division by zero\n'),
     "ZeroDivisionError: division by zero .mine.py, line 7."),
])
def test_a_loader_that_raises(tmp_path, error, told, ahead):
    """It is an end of the data: what was done is saved, in one line that names the loader's, and goes on from there."""
    def failing(folder, at, **changes):
        made = saved_once(folder, steps=6, loader=Failing(batches(), at, error), **changes)
        if ahead:
            made.batches = Prefetched(made.batches, False, 20.0)
        return made

    whole = trainer(tmp_path / "whole", 6, loader=batches()).run()
    with pytest.raises(DataEnd, match=rf"step 4: data: the loader failed at its batch 4: {told}.*"
                                      r"what was done is saved in .*step-3; go on with --resume") as caught:
        failing(tmp_path, 3).run()
    assert "\n" not in str(caught.value) and ("mine.py" in str(caught.value) or __file__ in str(caught.value))
    mended = failing(tmp_path, 99)
    assert mended.run(mended.begin(Start.RESUME)) == whole[3:]
    with pytest.raises(InputError, match="failed at its batch 1"):
        failing(tmp_path / "none", 0).run()


def test_a_loaders_state_that_raises(tmp_path):
    loader = FailingState(batches(), 99, ValueError("worker_0"))
    trainer(tmp_path, 3, loader=loader).run()
    with pytest.raises(InputError, match=r"the loader cannot take its position from the checkpoint: ValueError: wor"):
        trainer(tmp_path, 4, loader=loader).begin(Start.RESUME)
    loader.where = "state_dict"
    with pytest.raises(RunError, match=r"the loader failed in its state_dict\(\): ValueError: worker_0 \("):
        trainer(tmp_path / "other", 3, loader=loader).run()


@pytest.mark.parametrize("size", ["abc", None, -5, 0, 1.5, True, [1]])
def test_sizes_of_texts_are_whole_numbers(size):
    with pytest.raises(InputError, match=r"max_bytes: found .*, expected a whole number of at least 1"):
        make_batches(DataConfig(options={"max_bytes": size}), cases.chain_graph(), 2, 0)


def uneven(folder, counts, skip):
    """Two copies of one rank, whose data ends after so many batches."""
    engine = Engine(kill_saves.one_rank(), cases.chain_graph(), cases.chain_state())
    config = TrainConfig(8, checkpoint=CheckpointConfig(str(folder)), timeout_s=20.0,
                         data=DataConfig(skip_invalid=skip))
    made = Trainer(engine, config, Batches(iter(batches()[:counts[engine.mesh.copy]])), say=(said := []).append)
    with pytest.raises(DataEnd) as caught:
        made.run()
    return str(caught.value), made.batches.state()["taken"], said


@pytest.mark.distributed
@pytest.mark.parametrize("skip", [False, True])
def test_data_of_one_copy_that_ends_stops_all(pool, tmp_path, skip):
    """At the same step, within no timeout, and each saves its own place; no good batch is passed over for it."""
    (first, had, said), (second, ended, _) = pool.run(2, __file__, "uneven", tmp_path, (5, 3), skip)
    assert said == [] and first.startswith("step 4: the data of another copy of the plan has no next batch; what was"
                                           " done is saved in")
    assert second.startswith("step 4: data: the loader gives no batch, or ended") and (had, ended) == (4, 3)
    assert [read_loader(tmp_path / "step-3" / f"data-{copy}.pt")["taken"] for copy in range(2)] == [3, 3]


class Odd(kill_saves.Loader):
    """Its state holds what is no data."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def state_dict(self):
        return {"at": 3, "more": [1, {"odd": self.state}]}


@pytest.mark.parametrize("state", [numpy.arange(3), {1: lambda: 3}, random.Random(3), Path("/tmp")])
def test_a_loader_that_cannot_be_saved_is_found_at_once(tmp_path, state):
    """After the first step, not at the end of the run; by its place."""
    with pytest.raises(RunError, match=r"cannot be saved: state_dict\(\)\['more'\]\[1\]\['odd'\](\[1\])? is a [\w.]+$"):
        saved_once(tmp_path, steps=6, loader=Odd(state)).run()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_optimizer_that_cannot_be_saved_is_found_at_once(tmp_path):
    class Noting(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["seen"] = {1, 2}

    made = saved_once(tmp_path, steps=6)
    made.optimizer.__class__ = Noting
    with pytest.raises(RunError, match=r"optimizer\.layer0\.w\.seen is a builtins\.set, so the optimizer's state"):
        made.run()


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    """A step that makes a weight infinite is named; the checkpoint before it stays the newest."""
    class Exploding(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if made.engine.steps_done == 3:
                next(iter(made.engine.parameters())).data[0, 0] = float("inf")

    made = trainer(tmp_path, 6, optimizer=OptimizerConfig("sgd", 1e-3))
    made.optimizer.__class__ = Exploding
    with pytest.raises(RunError, match=r"step 4: layer0\.w is not finite after the update, so no checkpoint"):
        made.run()
    assert latest(tmp_path / "c").name == "step-3"


@pytest.mark.parametrize("where", ["weight", "moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_counts_as_finite(where, value):
    engine = Engine(kill_saves.one_rank(), cases.chain_graph(), cases.chain_state())
    optimizer = torch.optim.Adam(engine.parameters())
    engine.step(cases.chain_batch(2))
    optimizer.step()
    check_finite(engine, optimizer, 1)
    parameter = engine.parameters()[1]
    (parameter.data if where == "weight" else optimizer.state[parameter]["exp_avg"])[1, 1] = value
    with pytest.raises(RunError, match=r"step 1: (layer1\.w|optimizer\.layer1\.w\.exp_avg) is not finite"):
        check_finite(engine, optimizer, 1)


def test_a_full_disk_under_metrics(tmp_path):
    """The run ends after the next step, saved, with one line."""
    made = saved_once(tmp_path, steps=6, metrics="/dev/full")
    with pytest.raises(RunError, match=r"step 2: metrics /dev/full: cannot be written: No space left on device; what"
                                       r" was done is saved in .*step-2; go on with --resume"):
        made.run()
    verify(tmp_path / "c" / "step-2", read_state(tmp_path / "c" / "step-2"))
    last = saved_once(tmp_path / "one", steps=1, metrics="/dev/full")
    with pytest.raises(RunError, match="No space left on device; all 1 steps are done, and their checkpoints saved"):
        last.run()
    assert latest(tmp_path / "one" / "c").name == "step-1"
    assert os.path.exists("/dev/full") and not os.path.isfile("/dev/full")


def cramped(folder, name):
    """A run whose disk takes no file of more than 20,000 bytes; what it ends with, and what it says."""
    made = CheckpointConfig(str(folder / "c"), asynchronous=False)
    config = TrainConfig(200, checkpoint=made, **{name: str(folder / name)})
    said = []
    trainer = Trainer(Engine(kill_saves.one_rank(), cases.chain_graph(), cases.chain_state()), config,
                      Batches(kill_saves.Loader()), say=said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        trainer.run()
    except RunError as error:
        said.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return said


@pytest.mark.distributed
def test_a_full_disk_under_other_outputs(pool, tmp_path):
    """Scalars for TensorBoard are a record, without which the run ends, saved; a profile of the last step is not."""
    (text,), = pool.run(1, __file__, "cramped", tmp_path, "tensorboard")
    assert re.match(r"step \d+: tensorboard .*: cannot be written: File too large; what was done is saved", text), text
    verify(latest(tmp_path / "c"), read_state(latest(tmp_path / "c")))
    (text,), = pool.run(1, __file__, "cramped", tmp_path / "other", "profile")
    assert re.match(r"profile .*profile\.rank0\.json: cannot be written: it is missing or cut off", text), text
    assert latest(tmp_path / "other" / "c").name == "step-200"


def test_an_output_of_the_last_step_is_not_worth_the_run(tmp_path):
    """What is written beside the checkpoint after the last step is said where it fails, and all is saved."""
    (tmp_path / "gone").mkdir()
    made = saved_once(tmp_path, steps=2, said=(said := []), profile=str(tmp_path / "gone" / "profile.json"))
    (tmp_path / "gone").rmdir()
    assert len(made.run()) == 2 and latest(tmp_path / "c").name == "step-2"
    assert [text.partition(":")[0] for text in said] == [f"profile {tmp_path}/gone/profile.rank0.json"]


def profiled(folder, plan):
    """What each of two ranks says of a profile in ``folder``."""
    engine, said = Engine(plan, cases.chain_graph(), cases.chain_state()), []
    config = TrainConfig(1, profile=str(folder / "profile.json"), timeout_s=20.0)
    Trainer(engine, config, Batches(kill_saves.Loader()), say=said.append).run()
    return said


@pytest.mark.distributed
def test_a_profile_that_another_rank_cannot_write_is_said(pool, tmp_path):
    """By that rank, whose file it is."""
    from test_checkpoints import two_ranks
    (tmp_path / "profile.rank1.json" / "full").mkdir(parents=True)  # torch removes an empty one
    first, second = pool.run(2, __file__, "profiled", tmp_path, two_ranks())
    assert first == [] and len(second) == 1
    assert second[0].startswith(f"profile {tmp_path}/profile.rank1.json: cannot be written: ")


def stopping(folder, plan, asked, metrics):
    """Both ranks train; each is asked to end when it has begun as many steps as ``asked`` says."""
    engine = Engine(plan, cases.chain_graph(), cases.chain_state())
    mine = asked[engine.mesh.rank]
    config = TrainConfig(8, checkpoint=CheckpointConfig(str(folder), every=0), timeout_s=20.0, metrics=metrics)
    made = Trainer(engine, config, Batches(kill_saves.Loader()),
                   stop=lambda: mine is not None and engine.steps_done >= mine)
    try:
        made.run(made.begin(Start.RESUME_IF_ANY))
    except (StoppedError, RunError) as error:
        return type(error).__name__, str(error)
    return "done", ""


@pytest.mark.distributed
@pytest.mark.parametrize("asked, text", [((None, 3), "SIGTERM, rank 1): stopped after step 3 of 8"),
                                         ((2, 2), "SIGTERM, rank 0, 1): stopped after step 2 of 8"),
                                         ((None, 8), "")])
def test_one_rank_that_is_asked_to_end_stops_all(pool, tmp_path, asked, text):
    """After the same step, which is saved; asked during the last, nobody stops."""
    from test_checkpoints import two_ranks
    for kind, message in pool.run(2, __file__, "stopping", tmp_path, two_ranks(), asked, None):
        assert kind == ("StoppedError" if text else "done") and text in message
        assert not text or message.endswith("go on with --resume")
    assert latest(tmp_path).name == f"step-{8 if not text else asked[1]}"


@pytest.mark.distributed
def test_a_full_disk_of_one_rank_stops_all(pool, tmp_path):
    from test_checkpoints import two_ranks
    answers = pool.run(2, __file__, "stopping", tmp_path, two_ranks(), (None, None), "/dev/full")
    assert [kind for kind, _ in answers] == ["RunError"] * 2
    assert all("step 2: metrics /dev/full: cannot be written" in text for _, text in answers)
    assert latest(tmp_path).name == "step-2"


class Turns:
    """Samples 0, 1, 2, .. cut into batches that the copies take in turn."""

    def __init__(self, rows, copy, copies):
        self.rows, self.copy, self.copies = rows, copy, copies

    def __iter__(self):
        for number in itertools.count(self.copy, self.copies):
            yield list(range(number * self.rows, (number + 1) * self.rows))


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 4)), max_size=5))
def test_positions_are_divided_anew(phases):
    """However copies and rows change on the way, every sample is taken once and in order, or the change is refused."""
    seen, states, before = [], None, None
    for copies, rows, count in phases:
        made = [Batches(Turns(rows, copy, copies), rows, in_turn=True) for copy in range(copies)]
        if states is not None:
            try:
                for copy, item in enumerate(made):
                    item.continue_from(states.__getitem__, before, copy, copies)
            except InputError as error:
                assert "are no whole number of batches" in str(error) and len(seen) % (rows * copies)
                continue
            assert len(seen) % (rows * copies) == 0 and all(state["divides"] for state in states)
        for _ in range(count):
            seen += [sample for item in made for sample in next(item)]
        states, before = [item.state() for item in made], copies
    assert seen == list(range(len(seen)))


def test_loaders_that_divide_their_position_themselves():
    """They get the states of all copies; the text loader draws what no copy has had."""
    class Own(list):
        def reshard(self, states, copy, copies):
            self.given = states, copy, copies

    made = Batches(Own([1]), 4)
    states = [{"taken": 5, "rows": 4, "loader": {"at": copy}} for copy in range(2)]
    made.continue_from(states.__getitem__, 2, 1, 3)
    assert made._source.given == (states, 1, 3) and made.taken == 5 and made.state()["divides"]
    text = torch.arange(200, dtype=torch.uint8)
    graph = text_graph()
    drawn = {copy: Batches(TextBytes(text, 2, graph, 0, copy), 2) for copy in range(4)}
    for copy, item in drawn.items():
        item.continue_from(states.__getitem__, 2, copy, 4)
        assert torch.equal(next(item)["input_ids"], TextBytes(text, 2, graph, 0, copy).batch(5)["input_ids"])


def text_graph():
    from mipipe.graphs.operator_graph import OperatorGraph, TensorSpec, Value
    spec = TensorSpec((1, 8), "int64")
    return OperatorGraph("text", ("input_ids",), (), "", (), (Value("input_ids", spec, None, False),), (), ())


@pytest.mark.parametrize("loader, had, now, turns", [
    ({"at": 1}, (2, 4), (4, 4), False), ({"at": 1}, (2, 4), (1, 4), True), ({"at": 1}, (1, 4), (1, 8), False),
    (None, (2, 4), (4, 4), False), (None, (4, 4), (1, 4), False)])
def test_positions_that_cannot_be_divided_are_refused(loader, had, now, turns):
    """A loader's own state is of its copy; without one, nobody knows how the copies share the data."""
    class Stateful(list):
        def state_dict(self):
            return loader

    made = Batches([] if loader is None else Stateful(), now[1], in_turn=turns, name="my:loader")
    assert not made.state()["divides"]
    states = [{"taken": 5, "rows": had[1], "loader": loader}] * had[0]
    with pytest.raises(InputError, match=rf"data: the checkpoint's position is that of {had[0]} cop.* of {had[1]} rows"
                                         rf" a step, this run has {now[0]} of {now[1]}, and my:loader cannot divide it"
                                         " anew") as caught:
        made.continue_from(states.__getitem__, had[0], 0, now[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("had, rows", [(1, 4), (1, 8)])
def test_other_rows_for_one_copy(had, rows):
    """A plain loader is advanced by samples."""
    made = Batches(Turns(rows, 0, 1), rows)
    made.continue_from(lambda copy: {"taken": 6, "rows": 4, "loader": None}, had, 0, 1)
    assert next(made)[0] == 24




@pytest.mark.parametrize("status", [0, 4])
def test_a_worker_whose_loader_ends_the_process_fails(monkeypatch, tmp_path, status):
    """A loader that calls sys.exit(0) in step 3 of 6 has not trained 6 steps."""
    monkeypatch.setattr(worker, "train", lambda options: sys.exit(status))
    assert worker.guarded(argparse.Namespace(merge=None, report=str(tmp_path))) == 1
    left = json.loads((tmp_path / "error-rank0.json").read_text())
    assert left["exit_code"] == 1 and "ends the process" in left["message"]


def test_a_status_of_0_alone_is_no_finished_run(tmp_path):
    """A loader that calls os._exit(0) leaves no error; only what a worker leaves after its last step counts."""
    log = tmp_path / "torchrun.log"
    assert "before the last step" in str(end_of(tmp_path, log, 0, asked=False))
    (tmp_path / DONE).write_text("")
    assert end_of(tmp_path, log, 0, asked=False) is None


@pytest.mark.parametrize("code", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_worker_ends_as_its_run_did(code):
    """What libraries do as the interpreter ends does not count: an abort after the last step is no failed run."""
    script = (f"import atexit, os, sys; from mipipe.runtime import worker; worker.guarded = lambda options: {code};"
              " atexit.register(os.abort); sys.argv = ['worker', '--merge', 'out']; print('said'); worker.main()")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ended.stdout == "said\n"

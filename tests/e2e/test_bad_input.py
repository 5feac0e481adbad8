"""Wrong input ends with an exit code, a message that says what, where and what to do, and leaves no run folder behind.

What goes wrong in a run that has begun ends it too, or is told and survived, and is on record.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from makers import make_char_tokenizer
from small_runs import (
    ALPHABET,
    REWARDS,
    events_of,
    ledger_of,
    make_architecture,
    metrics_of,
    set_up,
    sluice,
    workplace,
    write_config,
    write_rows,
)

USERS = (
    REWARDS
    + """
import time
from sluice.types import Trajectory

def raises(prompt, trajectory):
    return 1 / 0  # line 12

def hangs(prompt, trajectory):
    time.sleep(60)

def raises_on_odd(prompt, trajectory):
    if trajectory.turns[0].completion.token_ids[0] % 2:
        raise ValueError("an odd token")
    return len(set(trajectory.response))

def gives_a_text(prompt, trajectory):
    return "good"

def gives_nan(prompt, trajectory):
    return float("nan")

def takes_three(prompt, trajectory, third):
    return 1.0

async def asynchronous(*arguments):
    return True

async def no_luck(prompt, policy):
    raise RuntimeError("no luck")

async def without_a_turn(prompt, policy):
    return Trajectory(policy.turns)

def keeps_nothing(group):
    return False

not_a_function = 3
"""
)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, as the current one, with everything for `sluice train config.yaml`."""
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        Path("users_code.py").write_text(USERS)
        yield tmp_path


@pytest.fixture
def failure(ready: Path, capsys: pytest.CaptureFixture[str]):
    """Run `sluice WORDS` and give (exit code, what it printed to stderr)."""

    def fail(*words: str | Path) -> tuple[int, str]:
        code = sluice(*words, "run.name=test")
        error = capsys.readouterr().err
        assert code
        assert error.startswith("error: ")
        assert "Traceback" not in error
        return code, error

    return fail


def settings_of(key: str, value: str) -> str:
    return f"rewards=[{{name: {value}}}]" if key == "rewards" else f"{key}={value}"


# Before the start

SETTINGS = {
    "rollout.grup_size=3": "command line: unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?",
    "optimizer.lr=3": "command line: unknown key 'optimizer'; the keys there are run, model, data",
    "rollout.group_size=four": "command line: rollout.group_size: should be a whole number above 0, not 'four'",
    "trainer.learning_rate=-1": "command line: trainer.learning_rate: should be a number above 0, not -1",
    "algorithm.name=cispoo": "not 'cispoo'; did you mean 'cispo'?",
    "algorithm.clip_low=0.1": "algorithm.clip_low=0.1 has no effect: only clip: surrogate or mask: trust_region uses it",
    "rollout.group_size=1": "leaves nothing to compare: every advantage would be 0; raise rollout.group_size",
    "rollout.max_staleness=1": "cannot work with engine.process=trainer: the engine generates with the trainer's own weights",
    "engine.max_model_len=1000": "is longer than the 256 positions of the model; lower it, or leave it out",
    "rollout.max_new_tokens=256": "leaves no room for a prompt in the window of 256 tokens",
    "rollout.routing_replay=true": "the routers of a mixture of experts choose, and Qwen3Model has no routers of experts that sluice can tell",
    "trainer.updates_per_batch=17": "is more than the 16 samples of a step (4 groups × 4)",
    "model.path=modell": "the model folder modell does not exist",
    "data.path=prompt.jsonl": "prompt.jsonl does not exist; did you mean 'prompts.jsonl'?",
    "data.prompt=question": "prompts.jsonl:1: lacks the column 'question'",
    "data.reference=anwser": "No column 'anwser'; did you mean 'answer'?",
    "data.split=train": "data.split=train has no effect: prompts.jsonl is a single file; leave it out",
    "data.system_prompt=Hello": "the tokeniser has no chat template, so there is no place for a system message",
    "run.folder=config.yaml": "config.yaml is not a folder",
    "rewards=[]": "rewards: should be a list of at least 1",
    "rewards=[{name: math}]": "rewards.0 (math) compares with the reference, but data.reference names no column",
    "rewards=[{name: format, pattern: '('}]": "the pattern '(' does not compile",
}


ENGINES = {
    "a Python that is none": (
        ["engine.name=vllm", "engine.python=/nowhere/python"],
        "engine.python=/nowhere/python does not run",
    ),
    "a Python without the package": (
        ["engine.name=vllm", f"engine.python={sys.executable}"],
        "has no package vllm; name the Python that has it installed",
    ),
    "a server that is not there": (
        ["engine.name=vllm", "engine.url=http://127.0.0.1:1"],
        "no server answers at engine.url=http://127.0.0.1:1",
    ),
    "a folder that cannot be": (
        ["engine.process=own", "engine.publication=disk", "engine.publication_folder=config.yaml/weights"],
        "engine.publication_folder=config.yaml/weights cannot be written",
    ),
}


@pytest.mark.parametrize("what", ENGINES)
def test_an_engine_that_cannot_be_had_is_told_before_anything_starts(failure, what: str):
    settings, said = ENGINES[what]
    code, error = failure("train", "config.yaml", *settings)
    assert code == 2
    assert said in error
    assert not Path("runs").exists()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting(failure, setting: str):
    code, error = failure("train", "config.yaml", setting)
    assert code == 2
    assert SETTINGS[setting] in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["engine.name=scripted", "engine.script=users_code:x", "algorithm.old_logprobs=recomputed"],
            "engine.name=scripted, which has no routers",
        ),
        (["trainer.compile=true"], "trainer.compile=true: the experts of a token come from outside"),
        (
            ["trainer.name=fsdp", "engine.process=own", "trainer.tensor_parallel=2"],
            "trainer.tensor_parallel=2, which divides no layers",
        ),
        (
            ["trainer.name=fsdp", "engine.process=own", "trainer.context_parallel=2"],
            "trainer.context_parallel=2: the experts",
        ),
    ],
)
def test_what_cannot_replay_routing(failure, words: list[str], said: str):
    code, error = failure("train", "config.yaml", "rollout.routing_replay=true", *words)
    assert code == 2
    assert f"rollout.routing_replay=true cannot work with {said}" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(failure):
    code, error = failure("train", "config.yaml", "model.device=cuda")
    assert (code, Path("runs").exists()) == (2, False)
    assert "model.device=cuda, but torch sees no CUDA device; set model.device=auto or cpu" in error


def test_a_wrong_key_in_a_file_is_named_with_its_line(failure):
    write_config("typo.yaml", rollout={"groups_per_step": 4, "grup_size": 4})
    line = 1 + Path("typo.yaml").read_text().splitlines().index("  grup_size: 4")
    assert failure("train", "typo.yaml") == (
        2,
        f"error: typo.yaml:{line}: unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?\n",
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("confg.yaml",), "config file confg.yaml does not exist; did you mean config.yaml?"),
        (("model",), "config file model cannot be read: Is a directory"),
        (("model/model.safetensors",), "model/model.safetensors:1: not YAML"),
        ((), "missing key 'model.path' (Hugging Face model folder with a tokeniser.)"),
    ],
)
def test_a_wrong_config_file(failure, words: tuple[str, ...], message: str):
    code, error = failure("train", *words)
    assert code == 2
    assert message in error
    assert not Path("runs").exists()


def test_bad_rows_are_named_with_file_line_and_reason(failure):
    Path("bad.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n{"question": "b"}\n{"prompt": " "}\n["a"]\n')
    code, error = failure("train", "config.yaml", "data.path=bad.jsonl")
    assert code == 2
    assert "4 of 5 rows of bad.jsonl cannot be used:" in error
    assert "bad.jsonl:3: not a JSON object on one line" in error
    assert "bad.jsonl:4: lacks the column 'prompt'" in error
    assert "bad.jsonl:5: column 'prompt' is blank" in error
    assert "bad.jsonl:6: a list, not a JSON object" in error
    assert "The columns are: prompt, question" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "the model folder model has no tokeniser: there is no tokenizer.json"),
        ("tokenizer.json", b"{", "the tokeniser in model does not load"),
        ("config.json", None, "model.path=model: no model folder there (config.json is missing)"),
        ("config.json", b"{broken", "'model/config.json' is not a valid JSON file"),
        ("model.safetensors", None, "model.path=model: transformers cannot load it: OSError"),
        ("model.safetensors", b"x" * 100, "model.path=model: transformers cannot load it: SafetensorError"),
    ],
)
def test_a_broken_model_folder(failure, file: str, content: bytes | None, message: str):
    path = Path("model") / file
    path.unlink() if content is None else path.write_bytes(content)
    code, error = failure("train", "config.yaml")
    assert code == 2
    assert message in error
    assert not Path("runs").exists()


def test_a_tokeniser_of_another_model(failure):
    make_architecture("other", "abc")
    make_char_tokenizer("other", ALPHABET)
    code, error = failure("train", "config.yaml", "model.path=other", "model.random_weights=true")
    assert code == 2
    assert "model.path=other: the tokeniser has 128 tokens and the model 5; they do not belong together" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize("key", ["rewards", "rollout.environment", "rollout.filter", "engine.script"])
def test_code_of_the_user_that_cannot_be_called(failure, key: str):
    if key == "engine.script":
        write_config(engine={"name": "scripted", "script": "users_code:x"}, trainer={"name": "dry"})
    complaints = {
        "no_module:f": "no_module:f: no module 'no_module' in ",
        "users_code:share_of_b": "users_code.py) has no 'share_of_b'; did you mean users_code:share_of_a?",
        "users_code:takes_three": "takes (prompt, trajectory, third); it is called with (",
        "users_code:not_a_function": "users_code:not_a_function is a int, not a function",
        "users_code": "should be",
    }
    if key != "rollout.environment":
        complaints["users_code:asynchronous"] = "users_code:asynchronous is an `async def`; write a plain `def`"
    for value, complaint in complaints.items():
        code, error = failure("train", "config.yaml", settings_of(key, value))
        assert code == 2
        assert complaint in error
    assert not Path("runs").exists()


def test_a_file_of_the_user_that_does_not_import(failure):
    Path("broken.py").write_text("import os\n\nraise KeyError('oh')\n")
    code, error = failure("train", "config.yaml", "rollout.filter=broken:keep")
    assert code == 2
    assert "broken:keep: importing broken raised KeyError: 'oh' at " in error
    assert "broken.py:3; `python -c 'import broken'` shows the whole traceback" in error


def test_a_run_folder_that_exists_is_left_as_it_is(failure):
    Path("runs/test").mkdir(parents=True)
    Path("runs/test/precious").write_text("mine")
    code, error = failure("train", "config.yaml")
    assert code == 2
    assert (
        "the run folder runs/test exists already, and was left as it is; choose another name with run.name=…" in error
    )
    assert [path.name for path in Path("runs/test").iterdir()] == ["precious"]


def test_sft_refuses_before_it_starts(failure):
    write_rows("pairs.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b" * 300}])
    Path("sft.yaml").write_text("model: {path: model}\ndata: {path: pairs.jsonl}\n")
    code, error = failure("sft", "sft.yaml")
    assert code == 2
    assert "pairs.jsonl:2: prompt and response have 302 tokens, and the model 256 positions" in error
    code, error = failure("sft", "sft.yaml", "data.response=answer")
    assert code == 2
    assert "pairs.jsonl:1: lacks the column 'answer'" in error
    assert not Path("runs").exists()


# In a run that has begun

LIMIT = "(limit: rollout.max_failed_groups)"


@pytest.mark.parametrize(
    ("key", "function", "message"),
    [
        ("rewards", "raises", "ZeroDivisionError: division by zero at {folder}/users_code.py:12"),
        ("rewards", "gives_a_text", "returned str; a reward returns a float, a bool, or a dict of named floats"),
        ("rewards", "gives_nan", "returned nan; a reward is a finite number"),
        ("rollout.environment", "no_luck", "RuntimeError: no luck"),
        ("rollout.environment", "without_a_turn", "ValueError: returned a Trajectory without a token of the policy"),
    ],
)
def test_code_of_the_user_that_always_fails_ends_the_run(failure, ready: Path, key: str, function: str, message: str):
    code, error = failure("train", "config.yaml", settings_of(key, f"users_code:{function}"))
    assert code == 1
    assert error.startswith("error: 4 groups in a row without a single score; the last was prompt prompts-")
    assert message.format(folder=ready) in error
    assert LIMIT in error
    *failures, stopped = events_of(Path("runs/test"))
    assert [event["kind"] for event in failures] == ["no_score"] * 4
    assert stopped["kind"] == "stopped"
    assert stopped["message"] == "; ".join(error.removeprefix("error: ").splitlines())
    assert error.endswith("\nto begin again, since there is no checkpoint yet: sluice train --resume runs/test\n")
    assert not Path("runs/test/metrics.jsonl").exists()


def test_a_reward_that_never_returns_ends_the_run_in_bounded_time(failure):
    start = time.monotonic()
    reward = "rewards=[{name: users_code:hangs, timeout_s: 0.1}]"
    code, error = failure("train", "config.yaml", reward, "reward_workers=4", "rollout.max_failed_groups=2")
    assert code == 1
    assert time.monotonic() - start < 20
    assert error.startswith("error: 2 groups in a row without a single score")
    assert "did not return within 0.1 s (timeout_s); its process was killed" in error
    assert events_of(Path("runs/test"))[0]["details"] == {"outcomes": ["timeout"] * 4}


def test_a_reward_that_sometimes_raises_makes_errors_and_no_zeros(ready: Path):
    assert (
        sluice(
            "train",
            "config.yaml",
            "rewards=[{name: users_code:raises_on_odd}]",
            "checks.max_error_share=0.9",
            "run.name=test",
        )
        == 0
    )
    run = Path("runs/test")
    failed = 0
    for step, line in enumerate(metrics_of(run), start=1):
        rows = ledger_of(run, step)
        scored = [row for row in rows if row["outcome"] == "scored"]
        errors = [row for row in rows if row["outcome"] == "error"]
        assert len(scored) + len(errors) == len(rows)
        assert all(row["reward"] >= 1 for row in scored)
        assert all(row["reward"] is None and row["reward_parts"] == {} for row in errors)
        assert all("ValueError: an odd token at" in row["error"] for row in errors)
        assert not any(row["trained"] for row in errors)
        assert line["rollout/outcome/error"] == len(errors)
        assert line["rollout/reward"] == pytest.approx(sum(row["reward"] for row in scored) / len(scored))
        failed += len(errors)
    told = [event for event in events_of(run) if event["kind"] == "no_score"]
    assert 0 < failed == sum(len(event["details"]["outcomes"]) for event in told)
    assert "ValueError: an odd token at" in told[0]["message"]


def test_a_filter_that_keeps_nothing_ends_the_run(failure):
    code, error = failure("train", "config.yaml", "rollout.filter=users_code:keeps_nothing", "rollout.group_size=2")
    assert code == 1
    assert "41 groups were rejected while one step was filled (limit: rollout.max_rejected_groups)" in error
    assert "rollout.filter" in error


def test_a_prompt_longer_than_the_window(failure):
    write_rows("long.jsonl", [{"prompt": "a"}, {"prompt": "b" * 249}, {"prompt": "c" * 248}])
    code, error = failure("train", "config.yaml", "data.path=long.jsonl")
    assert code == 1
    assert "prompt long-2 (long.jsonl:2): a prompt of 249 tokens leaves 7 of the window of 256 tokens" in error
    assert "or skip such prompts with data.long_prompts=skip" in error
    shutil.rmtree("runs/test")
    assert sluice("train", "config.yaml", "data.path=long.jsonl", "data.long_prompts=skip", "run.name=test") == 0
    run = Path("runs/test")
    assert {event["kind"] for event in events_of(run)} == {"prompt_skipped"}
    assert "prompt long-2 (long.jsonl:2)" in events_of(run)[0]["message"]
    assert len(metrics_of(run)) == 3
    assert {row["prompt_id"] for row in ledger_of(run, 1)} == {"long-1", "long-3"}


def test_an_update_that_is_not_finite_is_refused_and_its_batch_kept(failure):
    code, error = failure("train", "config.yaml", "trainer.learning_rate=1e30", "trainer.updates_per_batch=2")
    assert code == 1
    assert error.startswith("error: loss is nan at update 1 of the step, in a micro-batch of 8 samples (prompts-")
    assert "the update was refused\n" in error
    run = Path("runs/test")
    refused, stopped = events_of(run)
    assert (refused["kind"], refused["details"]) == ("non_finite", {"step": 1})
    assert stopped["kind"] == "stopped"
    rows = ledger_of(run, 1)
    assert len(rows) == 16
    assert [row["update"] for row in rows] == [0] * 8 + [-1] * 8
    assert all(row["token_ids"] and row["reward"] is not None for row in rows)
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()

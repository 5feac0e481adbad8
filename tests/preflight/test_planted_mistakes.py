"""`sluice check` finds planted mistakes, says where each is and what to do, and leaves sound configs alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from makers import CHAT_TEMPLATE, make_bpe_tokenizer, make_char_tokenizer
from models import CONFIGS
from small_runs import ALPHABET, REWARDS, make_architecture, set_up, sluice, workplace, write_config, write_rows

USERS = (
    REWARDS
    + """
import time
from sluice.types import Trajectory

def raises(prompt, trajectory):
    return 1 / 0  # line 12

def gives_none(prompt, trajectory):
    pass

def gives_nan(prompt, trajectory):
    return float("nan")

def hangs(prompt, trajectory):
    time.sleep(60)

def likes_some(prompt, trajectory):
    return float(str(prompt.reference) in trajectory.response)

def takes_three(prompt, trajectory, third):
    return 1.0

async def takes_one(prompt):
    return None

async def no_luck(prompt, policy):
    raise RuntimeError("no luck")

async def blocks(prompt, policy):
    time.sleep(600)  # line 36

def keeps_nothing(group):
    return False
"""
)
MATCH = {"rewards": [{"name": "match", "pattern": r"answer: (\d+)$"}]}


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, as the current one, with everything for `sluice train config.yaml`."""
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        Path("users_code.py").write_text(USERS)
        yield tmp_path


class Mistake(NamedTuple):
    plant: Callable[[], object] | None
    """Changes files in the current folder."""
    settings: list[str]
    said: list[str]
    """Parts of what is printed: place, reason, remedy."""
    code: int = 2


def answers(*references: object, **sections: object) -> Callable[[], object]:
    """A row with each reference, compared by `match` unless `sections` say otherwise."""

    def plant() -> None:
        rows = [{"prompt": f"task {i}", "answer": reference} for i, reference in enumerate(references)]
        write_rows("prompts.jsonl", rows)
        write_config(data={"path": "prompts.jsonl", "reference": "answer"}, **{**MATCH, **sections})

    return plant


def a_torn_line() -> None:
    rows = [json.dumps({"prompt": f"task {i}"}) for i in range(1000)]
    rows[900] = rows[900][:-2]
    Path("prompts.jsonl").write_text("\n".join(rows) + "\n")


def a_row_without_the_pattern() -> None:
    rows = [{"prompt": "a", "answer": f"so\n#### {i}"} for i in range(300)]
    rows[250]["answer"] = "so 250"
    write_rows("prompts.jsonl", rows)
    write_config(data={"path": "prompts.jsonl", "reference": "answer", "reference_pattern": "#### (.+)"}, **MATCH)


def long_prompts() -> None:
    write_rows("prompts.jsonl", [{"prompt": "a"}, {"prompt": "b" * 249}, {"prompt": "c" * 248}])


def twice_the_same() -> None:
    write_rows("prompts.jsonl", [{"prompt": text} for text in "abcdeb"])


def same_ids() -> None:
    write_rows("prompts.jsonl", [{"prompt": "a", "id": 7}, {"prompt": "b", "id": 8}, {"prompt": "c", "id": 7}])


def no_tokeniser() -> None:
    for file in Path("model").glob("*token*"):
        file.unlink()


def another_tokeniser() -> None:
    make_architecture("model", "abc")
    make_char_tokenizer("model", ALPHABET)


def cut_weights() -> None:
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_weights() -> None:
    Path("model/model.safetensors").unlink()


def no_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained("model")
    for name in ("config.json", "generation_config.json"):
        file = Path("model") / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))


def other_end() -> None:
    for name in ("config.json", "generation_config.json"):
        file = Path("model") / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))


def a_byte_tokeniser(template: str | None) -> None:
    make_bpe_tokenizer("model", ["task"], 280, template)
    config = CONFIGS["qwen3"]()
    config.update({"vocab_size": 280})
    config.save_pretrained("model")


def a_template_with_another_end() -> None:
    a_byte_tokeniser(CHAT_TEMPLATE.replace("<eos>", "<bos>"))


def conversations() -> None:
    a_byte_tokeniser(None)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows("prompts.jsonl", [{"prompt": [*messages, {"role": "user", "content": text}]} for text in "abcd"])


def a_huge_model() -> None:
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_attention_heads": 128}
    make_architecture("model", ALPHABET, num_hidden_layers=200, layer_types=["full_attention"] * 200, **sizes)


def a_run_of_that_name() -> None:
    Path("runs/taken").mkdir(parents=True)


REWARD = "rewards=[{{name: users_code:{}}}]"

MISTAKES = {
    # config
    "misspelt key": Mistake(
        None, ["rollout.grup_size=3"], ["unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?"]
    ),
    "wrong type": Mistake(None, ["rollout.group_size=four"], ["rollout.group_size: should be a whole number above 0"]),
    "setting without effect": Mistake(
        None,
        ["reference.update_every_steps=3"],
        ["reference.update_every_steps has no effect", "set algorithm.kl_coef"],
    ),
    "too many updates": Mistake(
        None, ["trainer.updates_per_batch=17"], ["trainer.updates_per_batch=17 is more than the 16 samples of a step"]
    ),
    "reward of another signature": Mistake(
        None, [REWARD.format("takes_three")], ["takes (prompt, trajectory, third); it is called with ("]
    ),
    "environment of another signature": Mistake(
        None,
        ["rollout.environment=users_code:takes_one"],
        ["rollout.environment: ", "takes (prompt); it is called with"],
    ),
    "misspelt filter": Mistake(
        None, ["rollout.filter=users_code:keeps_nothin"], ["did you mean users_code:keeps_nothing?"]
    ),
    # data
    "missing file": Mistake(
        None, ["data.path=prompt.jsonl"], ["prompt.jsonl does not exist; did you mean 'prompts.jsonl'?"]
    ),
    "missing column": Mistake(None, ["data.reference=anwser"], ["No column 'anwser'; did you mean 'answer'?"]),
    "null reference": Mistake(
        answers("1", None, "3"), [], ["prompts.jsonl:2: column 'answer' is null, and it is the reference"]
    ),
    "ids that come twice": Mistake(
        same_ids, ["data.id=id"], ["prompts.jsonl:3: column 'id' is '7', as in prompts.jsonl:1; an id names one row"]
    ),
    "a torn line far down": Mistake(a_torn_line, [], ["prompts.jsonl:901: not a JSON object on one line"]),
    "a row without the pattern": Mistake(
        a_row_without_the_pattern,
        [],
        ["prompts.jsonl:251: reference_pattern '#### (.+)' is not found in column 'answer'"],
    ),
    # prompts
    "prompts longer than the window": Mistake(
        long_prompts,
        [],
        [
            "1 of 3 prompts have more than the 248 tokens that the window of 256",
            "prompts.jsonl:2: 249 tokens",
            "data.long_prompts=skip",
        ],
    ),
    "prompts that will be skipped": Mistake(
        long_prompts, ["data.long_prompts=skip"], ["warning: 1 of 3 prompts have", "prompts.jsonl:2: 249 tokens"], 0
    ),
    "only prompts that are too long": Mistake(
        None,
        ["data.long_prompts=skip", "engine.max_model_len=12"],
        [
            "failure: 20 of 20 prompts have more than the 4 tokens",
            "there is nothing to train on; lower rollout.max_new_tokens",
        ],
    ),
    "prompts that come twice": Mistake(
        twice_the_same, [], ["1 of 6 prompts have come before", "prompts.jsonl:6 is prompts.jsonl:2 again"], 0
    ),
    "a system prompt without a template": Mistake(
        None,
        ["data.system_prompt=Hello"],
        ["prompts.jsonl:1: the tokeniser has no chat template", "leave out data.system_prompt"],
    ),
    "roles without a template": Mistake(
        conversations,
        ["model.random_weights=true"],
        ["4 of 4 prompts have messages in roles, and the tokeniser has no chat template", "prompts.jsonl:1"],
        0,
    ),
    # model
    "no tokeniser": Mistake(no_tokeniser, [], ["the model folder model has no tokeniser", "save_pretrained"]),
    "another model's tokeniser": Mistake(
        another_tokeniser,
        ["model.random_weights=true"],
        ["model.path=model: the tokeniser has 128 tokens and the model 5; they do not belong together"],
    ),
    "window beyond the positions": Mistake(
        None, ["engine.max_model_len=1000"], ["engine.max_model_len=1000 is longer than the 256 positions of the model"]
    ),
    "no room for a prompt": Mistake(
        None,
        ["rollout.max_new_tokens=256"],
        ["rollout.max_new_tokens=256 leaves no room for a prompt in the window of 256"],
    ),
    "weights that are cut short": Mistake(
        cut_weights, [], ["model.safetensors has ", "it is cut short; download it again"]
    ),
    "no weights": Mistake(no_weights, [], ["there are no weights (model.safetensors)", "model.random_weights=true"]),
    "responses without an end": Mistake(
        no_end, [], ["no response can end", "set rollout.stop or rollout.stop_token_ids"], 0
    ),
    "two ends": Mistake(
        other_end, [], ["the tokeniser ends a text with '<eos>' (1) and the model's config with '#' (5)"], 0
    ),
    "a turn that ends otherwise": Mistake(
        a_template_with_another_end,
        ["model.random_weights=true"],
        ["the chat template ends what the assistant says with '<bos>' (2)", "Set rollout.stop_token_ids=[2]"],
        0,
    ),
    "adapters of layers that are not there": Mistake(
        None,
        ["trainer.lora_rank=4", "trainer.lora_targets=[q_proj, q_prjj]"],
        [
            "trainer.lora_targets: model.path=model has no layer with a matrix called q_prjj that adapters go to; there are "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\n"
        ],
    ),
    "adapters of the head": Mistake(
        None,
        ["trainer.lora_rank=4", "trainer.lora_targets=[q_proj, lm_head]"],
        ["no layer with a matrix called lm_head that adapters go to"],
    ),
    # engine
    "a Python without the engine": Mistake(
        None,
        ["engine.name=vllm", f"engine.python={sys.executable}"],
        ["engine    failure", "has no package vllm; name the Python that has it installed"],
    ),
    "heads that workers cannot share": Mistake(
        None,
        ["engine.name=vllm", f"engine.python={sys.executable}", "engine.tensor_parallel=3"],
        ["engine.tensor_parallel=3 must divide the model's 4 heads, and its 2 key-value heads"],
    ),
    "more workers than heads": Mistake(
        None,
        ["engine.name=vllm", f"engine.python={sys.executable}", "engine.tensor_parallel=100000"],
        ["engine.tensor_parallel=100000 must divide the model's 4 heads"],
    ),
    "a server that is not there": Mistake(
        None,
        ["engine.name=vllm", "engine.url=http://127.0.0.1:1"],
        ["no server answers at engine.url=http://127.0.0.1:1"],
    ),
    "weights without a place": Mistake(
        None,
        ["engine.process=own", "engine.publication=disk", "engine.publication_folder=config.yaml/weights"],
        ["engine.publication_folder=config.yaml/weights cannot be written"],
    ),
    # rewards
    "a reference with a unit": Mistake(
        answers("5", "6 apples", "7"),
        [],
        [
            "warning: reward 'match': 1 of 3 gold answers do not earn all",
            "prompts.jsonl:2: reference '6 apples': score 0",
        ],
        0,
    ),
    "references that earn nothing": Mistake(
        answers("5 pears", "6 apples"), [], ["failure: reward 'match': 2 of 2 gold answers do not earn all"]
    ),
    "a reference that does not parse": Mistake(
        answers("5", "}", rewards=[{"name": "math"}]),
        [],
        [
            "warning: reward 'math': 1 of 2 gold answers do not",
            "prompts.jsonl:2: reference '}': the reference '}' cannot be read",
        ],
        0,
    ),
    "a reward that raises": Mistake(
        None,
        [REWARD.format("raises")],
        ["reward 'raises': no score for the gold answers of 20 of 20 rows", "prompts.jsonl:1: ", "users_code.py:12"],
    ),
    "a reward that returns nothing": Mistake(
        None, [REWARD.format("gives_none")], ["returned NoneType; a reward returns a float, a bool, or a dict"]
    ),
    "a reward that is no number": Mistake(
        None, [REWARD.format("gives_nan")], ["returned nan; a reward is a finite number"]
    ),
    "a reward that hangs": Mistake(
        None,
        ["rewards=[{name: users_code:hangs, timeout_s: 0.2}]"],
        ["reward 'hangs' took longer than its timeout_s=0.2", "did not return within 0.2 s"],
    ),
    # room
    "a name that is taken": Mistake(
        a_run_of_that_name, ["run.name=taken"], ["the run folder runs/taken exists already; choose another name"]
    ),
    "a folder that cannot be written": Mistake(
        None, ["run.folder=config.yaml/runs"], ["run.folder=config.yaml/runs", "choose another place with run.folder=…"]
    ),
    "memory that is not there": Mistake(
        a_huge_model,
        ["model.random_weights=true"],
        ["failure: weights, gradients and optimiser alone take", "smaller model"],
    ),
    "a disk that is too small": Mistake(
        None, ["run.num_steps=2000000000"], ["failure: ", "checkpoints take", "Set run.folder to a larger disk"]
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(ready: Path, capsys: pytest.CaptureFixture[str], name: str):
    mistake = MISTAKES[name]
    if mistake.plant:
        mistake.plant()
    before = sorted(Path().rglob("*"))
    code = sluice("check", "--offline", "config.yaml", *mistake.settings)
    printed = "".join(capsys.readouterr())
    for part in mistake.said:
        assert part in printed, printed
    assert code == mistake.code
    assert ("failure: " in printed or "error: " in printed) == bool(code)
    assert "Traceback" not in printed
    assert sorted(Path().rglob("*")) == before  # it leaves nothing behind


# What only a trial can find: with a model, a rollout and an update

TRIED = {
    "an environment that raises": (
        ["rollout.environment=users_code:no_luck"],
        2,
        ["failure: 2 groups in a row without a single score", "RuntimeError: no luck", "users_code.py:33"],
    ),
    "a filter that keeps nothing": (
        ["rollout.filter=users_code:keeps_nothing"],
        0,
        ["warning: with a random model nothing was left to train on: 5 groups were rejected", "rollout.filter"],
    ),
    "a metric that is not logged": (
        ["checkpoint.best_metric=rollout/rewards"],
        2,
        ["failure: checkpoint.best_metric=rollout/rewards is no metric of this run", "did you mean 'rollout/reward'?"],
    ),
}


@pytest.mark.parametrize("name", TRIED)
def test_a_mistake_that_a_trial_finds(ready: Path, capsys: pytest.CaptureFixture[str], name: str):
    settings, code, said = TRIED[name]
    assert sluice("check", "config.yaml", *settings) == code
    printed = capsys.readouterr().out
    for part in said:
        assert part in printed, printed


@pytest.mark.proof
def test_a_trial_without_an_end_is_ended_and_says_where_it_was(
    ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """An environment that blocks the whole process, so that no timeout of ours could run."""
    monkeypatch.setattr("sluice.preflight.trial.LIMIT_S", 12)
    assert sluice("check", "config.yaml", "rollout.environment=users_code:blocks") == 2
    assert f"failure: no end within 12 s; it was at {ready}/users_code.py:36." in capsys.readouterr().out
    assert not Path("runs").exists()


# Sound ones


def test_a_sound_config_has_no_finding(ready: Path, capsys: pytest.CaptureFixture[str]):
    """Every item says what it has seen, and the numbers are those of the files."""
    assert sluice("check", "config.yaml") == 0
    printed = capsys.readouterr().out
    *items, verdict = [line for line in printed.splitlines() if not line.startswith(" ")]
    assert [line.split()[:2] for line in items] == [
        [name, "ok"] for name in ("config", "data", "model", "prompts", "rewards", "memory", "disk", "trial")
    ]
    assert "20 rows of prompts.jsonl" in printed
    assert "qwen3, 26,816 parameters (counted in its files), 128 ids, 256 positions" in printed
    assert "8 to 13 tokens" in printed
    assert "share_of_small_letters: scores from 0.555556 to 0.555556" in printed
    assert verdict.startswith("0 failures, 0 warnings, ")
    assert not Path("runs").exists()

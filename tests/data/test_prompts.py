"""Every bad row is found before the first prompt is used, and the order of prompts survives a resume."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import shared_data
from sluice.data.prompts import PromptStream, load_prompts, load_sft_rows
from sluice.data.sources import open_rows
from sluice.errors import ConfigError, DataError
from sluice.types import Prompt

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Hello"}


@pytest.fixture
def rows_of(tmp_path):
    def make(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return open_rows(str(path))

    return make


def failure(call):
    with pytest.raises(DataError) as error:
        call()
    return str(error.value)


def test_gsm8k_is_read_whole():
    """The references of the real data: 7,473 of them, none empty, none with the mark still on."""
    path = shared_data("gsm8k/train.jsonl")
    prompts = load_prompts(open_rows(str(path)), prompt="question", reference="answer", reference_pattern="#### (.+)")
    references = [prompt.reference for prompt in prompts]
    assert len(references) == len(prompts) == 7473
    assert all(re.fullmatch(r"-?[\d,.]+", reference) for reference in references)
    assert len({prompt.id for prompt in prompts}) == 7473
    assert prompts[0].id == "train-0001"
    assert prompts[0].reference == "72"
    assert prompts[7472].where == f"{path}:7473"


def test_a_text_becomes_a_user_message(rows_of):
    rows = rows_of({"q": " 1 + 1? ", "gold": 2, "level": "easy"}, {"q": "2?", "gold": [2], "level": None})
    prompts = load_prompts(rows, prompt="q", reference="gold", metadata=("level",))
    assert list(prompts) == [
        Prompt("data-1", [{"role": "user", "content": " 1 + 1? "}], 2, {"level": "easy"}, rows.where(0)),
        Prompt("data-2", [{"role": "user", "content": "2?"}], [2], {"level": None}, rows.where(1)),
    ]


def test_messages_are_taken_as_they_are(rows_of):
    tool = {"role": "tool", "content": "", "tool_call_id": "x"}
    prompts = load_prompts(rows_of({"prompt": [SYSTEM, USER, ASSISTANT, tool, USER]}), prompt="prompt")
    assert prompts[0].messages == [SYSTEM, USER, ASSISTANT, tool, USER]
    assert prompts[0].reference is None


def test_messages_of_parquet_lose_the_nulls_that_arrow_adds(tmp_path):
    """Chat templates ask whether a key is there, so a null where there was none changes the prompt."""
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": [{"role": "user", "content": "Hi", "name": "Eve"}, USER]}]), path)
    assert open_rows(str(path))[0]["prompt"][1] == {**USER, "name": None}
    assert load_prompts(open_rows(str(path)), prompt="prompt")[0].messages[1] == USER


def test_system_prompt_is_put_first(rows_of):
    rows = rows_of({"prompt": "Hi"}, {"prompt": [USER]})
    prompts = load_prompts(rows, prompt="prompt", system_prompt="Be brief.")
    assert [prompt.messages for prompt in prompts] == [[SYSTEM, USER]] * 2


def test_ids(rows_of):
    rows = rows_of(*[{"prompt": "Hi", "name": i if i % 2 else f"row {i}"} for i in range(12)], name="train.v2.jsonl")
    assert [prompt.id for prompt in load_prompts(rows, prompt="prompt")][:10:9] == ["train.v2-01", "train.v2-10"]
    assert [prompt.id for prompt in load_prompts(rows, prompt="prompt", id="name")][:2] == ["row 0", "1"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": ...}, "lacks the column 'prompt'"),
        ({"prompt": ..., "id": ...}, "lacks the columns 'prompt', 'id'"),
        ({"prompt": ""}, "column 'prompt' is blank"),
        ({"prompt": " \n\t"}, "column 'prompt' is blank"),
        ({"prompt": None}, "column 'prompt' is null, and a prompt is a text or a list of messages"),
        ({"prompt": 3}, "column 'prompt' is int, and a prompt is a text or a list of messages"),
        ({"prompt": USER}, "column 'prompt' is dict, and a prompt is a text or a list of messages"),
        ({"prompt": "\ud800"}, "column 'prompt' has half a surrogate pair, '\\ud800', which is no character"),
        ({"prompt": []}, "column 'prompt' is an empty list of messages"),
        ({"prompt": ["Hi"]}, "column 'prompt', message 1 is str, not an object with role and content"),
        ({"prompt": [USER, {"role": "user"}]}, "column 'prompt', message 2 has nothing as content, not a text"),
        ({"prompt": [{"content": "Hi"}]}, "column 'prompt', message 1 has nothing as role, not a text"),
        ({"prompt": [{"role": 1, "content": "Hi"}]}, "column 'prompt', message 1 has int as role, not a text"),
        ({"prompt": [{**USER, "content": None}]}, "column 'prompt', message 1 has null as content, not a text"),
        ({"prompt": [{**USER, "content": ["Hi"]}]}, "column 'prompt', message 1 has list as content, not a text"),
        ({"prompt": [{**USER, "content": "\udc00"}]}, "column 'prompt', message 1 has half a surrogate pair"),
        ({"prompt": [SYSTEM, {**USER, "content": " "}]}, "the content of column 'prompt', message 2 is blank"),
        ({"prompt": [USER, ASSISTANT]}, "column 'prompt' ends with an assistant message"),
        ({"answer": ...}, "lacks the column 'answer'"),
        ({"answer": None}, "column 'answer' is null, and it is the reference"),
        ({"answer": "  "}, "column 'answer' is blank"),
        ({"answer": 5}, "column 'answer' is int, not a text"),
        ({"answer": "so 5"}, "reference_pattern '#### (.*)' is not found in column 'answer': 'so 5'"),
        ({"answer": "####  "}, "reference_pattern '#### (.*)' finds an empty reference in column 'answer'"),
        ({"id": ...}, "lacks the column 'id'"),
        ({"id": None}, "column 'id' is null, and an id is a text or a whole number"),
        ({"id": 1.5}, "column 'id' is float, and an id is a text or a whole number"),
        ({"id": True}, "column 'id' is bool, and an id is a text or a whole number"),
        ({"id": ""}, "column 'id' is blank"),
        ({"id": "1"}, "column 'id' is '1', as in {path}:1; an id names one row"),
        ({"level": ...}, "lacks the column 'level'"),
        ("{not json}", "not a JSON object on one line: Expecting property name"),
        ("[1]", "a list, not a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_reason(rows_of, bad, reason):
    good = {"prompt": "Hi", "answer": "#### 1", "id": 1, "level": 0}
    if isinstance(bad, dict):
        bad = {key: value for key, value in (good | {"id": 2} | bad).items() if value is not ...}
    rows = rows_of(good, "", bad, good | {"id": 3})
    text = failure(
        lambda: load_prompts(
            rows, prompt="prompt", reference="answer", reference_pattern="#### (.*)", id="id", metadata=["level"]
        )
    )
    first, second = text.splitlines()[:2]
    assert first == f"1 of 3 rows of {rows.path} cannot be used:"
    assert second.startswith(f"  {rows.path}:3: {reason.replace('{path}', str(rows.path))}")


def test_a_second_system_message_is_refused(rows_of):
    text = failure(lambda: load_prompts(rows_of({"prompt": [SYSTEM, USER]}), prompt="prompt", system_prompt="x"))
    assert "begins with a system message, and data.system_prompt would put another before it" in text


def test_a_null_reference_is_refused_without_a_pattern_too(rows_of):
    text = failure(lambda: load_prompts(rows_of({"prompt": "Hi", "gold": None}), prompt="prompt", reference="gold"))
    assert "data.jsonl:1: column 'gold' is null, and it is the reference" in text


def test_the_first_five_are_shown_and_all_are_counted(rows_of):
    rows = rows_of({"prompt": "Hi"}, *[{"prompt": ""}] * 7, "oops", {"prompt": "Hi"})
    lines = failure(lambda: load_prompts(rows, prompt="prompt")).splitlines()
    assert lines[0] == f"8 of 10 rows of {rows.path} cannot be used:"
    assert lines[1:6] == [f"  {rows.path}:{line}: column 'prompt' is blank" for line in range(2, 7)]
    assert lines[6:] == ["  … and 3 more"]


def test_a_missing_column_is_told_with_those_that_there_are(rows_of):
    rows = rows_of({"question": "Hi", "answer": "1"}, {"question": "Ho", "answer": "1", "source": "x"})
    lines = failure(lambda: load_prompts(rows, prompt="qestion", reference="zzz")).splitlines()
    assert lines == [
        f"2 of 2 rows of {rows.path} cannot be used:",
        f"  {rows.path}:1: lacks the columns 'qestion', 'zzz'",
        f"  {rows.path}:2: lacks the columns 'qestion', 'zzz'",
        "The columns are: question, answer, source",
        "No column 'qestion'; did you mean 'question'?",
    ]


def test_a_column_that_parquet_lacks(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"promt": ["Hi"]}), path)
    text = failure(lambda: load_prompts(open_rows(str(path)), prompt="prompt"))
    assert f"  {path} row 1: lacks the column 'prompt'" in text
    assert text.endswith("The columns are: promt\nNo column 'prompt'; did you mean 'promt'?")


@pytest.mark.parametrize(
    ("pattern", "reference", "reason"),
    [
        ("#### .+", "answer", "'#### .+' has no group"),
        ("#### (.+", "answer", "'#### (.+' is no regular expression: missing )"),
        ("#### (.+)", None, "has no effect without data.reference"),
    ],
)
def test_a_pattern_that_cannot_be_used(rows_of, pattern, reference, reason):
    with pytest.raises(ConfigError) as error:
        load_prompts(rows_of({"prompt": "Hi"}), prompt="prompt", reference=reference, reference_pattern=pattern)
    assert reason in str(error.value)
    assert str(error.value).startswith("data.reference_pattern")


def test_sft_rows(rows_of):
    rows = rows_of({"prompt": "Hi", "response": " Hello\n"}, {"prompt": [SYSTEM, USER], "response": "Hello"})
    pairs = load_sft_rows(rows, prompt="prompt", response="response")
    assert list(pairs) == [([USER], " Hello\n", rows.where(0)), ([SYSTEM, USER], "Hello", rows.where(1))]
    assert pairs[1].response == "Hello"
    rows = rows_of({"prompt": "Hi", "response": "Hello"})
    pairs = load_sft_rows(rows, prompt="prompt", response="response", system_prompt="Be brief.")
    assert pairs[0].messages == [SYSTEM, USER]


def test_bad_sft_rows(rows_of):
    good = {"prompt": "Hi", "response": "Hello"}
    rows = rows_of(good | {"response": ""}, good, good | {"response": None}, good | {"prompt": ""}, {"prompt": "Hi"})
    lines = failure(lambda: load_sft_rows(rows, prompt="prompt", response="response")).splitlines()
    assert lines == [
        f"4 of 5 rows of {rows.path} cannot be used:",
        f"  {rows.path}:1: column 'response' is blank",
        f"  {rows.path}:3: column 'response' is null, not a text",
        f"  {rows.path}:4: column 'prompt' is blank",
        f"  {rows.path}:5: lacks the column 'response'",
        "The columns are: prompt, response",
    ]


@pytest.fixture(scope="module")
def prompts_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")

    def make(count):
        path = folder / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(count)))
        return load_prompts(open_rows(str(path)), prompt="prompt")

    return make


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 12), positions=st.lists(st.integers(0, 60)), seed=st.integers(0, 2**32), shuffle=st.booleans()
)
def test_a_position_has_one_prompt(prompts_of, count, positions, seed, shuffle):
    """Exact resume: whatever was asked before, in whatever process."""
    stream = PromptStream(prompts_of(count), seed, shuffle)
    asked = [stream[position] for position in positions]
    in_order = PromptStream(prompts_of(count), seed, shuffle)
    all_of_them = [in_order[i] for i in range(61)]
    assert asked == [all_of_them[position] for position in positions]
    in_order.check_identity(json.loads(json.dumps(stream.identity())))  # as a checkpoint keeps it


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_every_epoch_is_a_permutation(prompts_of, count, seed):
    prompts = prompts_of(count)
    stream = PromptStream(prompts, seed, shuffle=True)
    for epoch in range(4):
        assert sorted(stream[epoch * count + i].id for i in range(count)) == [prompt.id for prompt in prompts]


def test_epochs_and_seeds_differ_and_file_order_does_not(prompts_of):
    prompts = prompts_of(50)

    def order(seed, shuffle, epochs=2):
        stream = PromptStream(prompts, seed, shuffle)
        return [[stream[50 * epoch + i].id for i in range(50)] for epoch in range(epochs)]

    first, second = order(0, True)
    in_file = [prompt.id for prompt in prompts]
    assert first != second
    assert in_file not in (first, second)
    assert order(1, True)[0] != first
    assert order(1, True)[0] != second  # seeds must not be each other's epochs
    assert order(0, False) == [in_file, in_file]


@pytest.mark.parametrize(
    ("change", "seed", "shuffle", "reason"),
    [
        ("longer", 0, True, "their length was 4 and is now 5"),
        ("other", 0, True, "their fingerprint was"),
        ("same", 1, True, "their seed was 0 and is now 1"),
        ("same", 0, False, "their shuffle was True and is now False"),
    ],
)
def test_a_state_of_another_order_is_refused(rows_of, change, seed, shuffle, reason):
    rows = [{"prompt": f"{i}?"} for i in range(4)]
    stream = PromptStream(load_prompts(rows_of(*rows), prompt="prompt"), 0, True)
    changed = {"same": rows, "longer": [*rows, {"prompt": "4?"}], "other": [*rows[:3], {"prompt": "9?"}]}[change]
    other = PromptStream(load_prompts(rows_of(*changed), prompt="prompt"), seed, shuffle)
    text = failure(lambda: other.check_identity(stream.identity()))
    assert text.startswith(f"the prompts cannot be resumed: {reason}")

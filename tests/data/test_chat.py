"""What the policy reads is what the tokeniser and its template say; what it wrote reads back unchanged."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from makers import CHAT_TEMPLATE, make_bpe_tokenizer, make_char_tokenizer
from sluice.data.chat import Chat, load_tokenizer
from sluice.errors import ConfigError, DataError

TEXTS = ["What is 1 + 1? The answer is 2.", "user assistant system hello world", "naïve 日本語 text"] * 20
USER = [{"role": "user", "content": "What is 1 + 1?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    return {
        "bpe": make_bpe_tokenizer(place / "bpe", TEXTS),
        "template": make_bpe_tokenizer(place / "template", TEXTS, chat_template=CHAT_TEMPLATE),
        "char": make_char_tokenizer(place / "char", "0123456789+=? \n"),
    }


@pytest.fixture(scope="module")
def chats(folders):
    return {name: Chat(load_tokenizer(str(folder))) for name, folder in folders.items()}


def test_a_plain_tokenizer_joins_contents_with_newlines(chats):
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "user", "content": "2+2=?"}]
    alphabet = "0123456789+=? \n"
    assert chats["char"].encode(messages) == [2 + alphabet.index(c) for c in "1+1=?\n2+2=?"]
    assert chats["bpe"].encode(USER) == chats["bpe"].tokenizer("What is 1 + 1?").input_ids


def test_a_template_is_used_with_the_generation_prompt(chats):
    chat = chats["template"]
    ids = chat.encode(SYSTEM + USER)
    assert type(ids) is list
    assert {type(i) for i in ids} == {int}
    text = chat.tokenizer.decode(ids)
    assert text == "<|system|>Be brief.<eos><|user|>What is 1 + 1?<eos><|assistant|>"
    assert ids.count(1) == 2  # the template's <eos> is the token, not its letters


@pytest.mark.parametrize("name", ["bpe", "template"])
def test_the_attempts_of_a_group_are_encoded_once(folders, name, monkeypatch):
    """And whoever changes what was given or got changes nothing for the next one."""
    chat = Chat(load_tokenizer(str(folders[name])))
    backend, calls = chat.tokenizer._encode_plus, 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return backend(*args, **kwargs)

    monkeypatch.setattr(chat.tokenizer, "_encode_plus", counted)
    messages = [dict(USER[0])]
    first = chat.encode(messages)
    expected = list(first)
    first.append(7)
    assert chat.encode([dict(USER[0])]) == expected
    assert calls == 1
    messages[0]["content"] = "What is 2 + 2?"
    assert chat.encode(messages) != expected
    assert chat.encode(USER) == expected
    assert calls == 3


def test_bos_comes_where_the_tokenizer_adds_it(tmp_path, folders):
    """Some tokenisers put a beginning-of-sequence token before every text; the model was trained with it."""
    backend = Tokenizer.from_file(str(folders["bpe"] / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(str(tmp_path))
    with_bos, without = Chat(load_tokenizer(str(tmp_path))), Chat(load_tokenizer(str(folders["bpe"])))
    assert with_bos.encode(USER) == [2, *without.encode(USER)]
    assert with_bos.encode_response("hello") == without.encode_response("hello")


def test_a_response_is_its_tokens_and_eos(chats):
    for name, text in [("bpe", " The answer is 2."), ("template", "日本語"), ("char", "1+1=2")]:
        chat = chats[name]
        ids = chat.encode_response(text)
        assert ids[-1] == 1
        assert chat.decode(ids) == chat.tokenizer.decode(ids[:-1]) == text
        assert chat.eos_ids == {1}
    assert chats["char"].encode_response("") == [1]


def test_decode_keeps_spaces_and_drops_special_tokens(chats):
    text = "  a , b . c 's  \n\n 🎉 é"
    assert chats["bpe"].decode([2, *chats["bpe"].encode_response(text), 0, 0]) == text
    assert chats["char"].decode(chats["char"].encode_response("1 + 1 = 2 \n")) == "1 + 1 = 2 \n"


def test_pieces_are_one_readable_text_per_token(chats):
    chat = chats["bpe"]
    ids = [2, *chat.encode_response("hello world 🎉")]
    pieces = chat.pieces(ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == "<bos>"
    assert pieces[-1] == "<eos>"
    assert "".join(pieces[1:-1]) == "hello world " + "\ufffd" * 4
    assert " world" in pieces
    assert chats["char"].pieces([3, 12, 1]) == ["1", "+", "<eos>"]
    assert chats["char"].pieces([9999]) == ["<no token 9999>"]


def test_pieces_keep_the_space_that_sentencepiece_decoders_drop(tmp_path):
    """Such a decoder strips the first space of whatever it is given, so tokens decoded alone would run together."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(["hello world"] * 9, trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(str(tmp_path))
    chat = Chat(load_tokenizer(str(tmp_path)))
    ids = chat.encode_response("hello world")
    assert chat.decode(ids) == "hello world"
    assert chat.pieces(ids) == [" hello", " world", "<eos>"]


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_a_system_message_without_a_template_is_refused(chats, name):
    with pytest.raises(ConfigError, match=r"no chat template, so there is no place for a system .*data\.system_prompt"):
        chats[name].encode(SYSTEM + USER)


def test_a_prompt_is_never_empty(chats, tmp_path):
    with pytest.raises(DataError, match="the prompt has no tokens"):
        chats["bpe"].encode([{"role": "user", "content": ""}])
    silent = Chat(load_tokenizer(str(make_bpe_tokenizer(tmp_path, TEXTS, chat_template="{{ '' }}"))))
    with pytest.raises(DataError, match="the prompt has no tokens"):
        silent.encode(USER)


def test_a_text_that_the_tokenizer_does_not_know_is_shown(chats):
    with pytest.raises(DataError, match=r"the tokeniser cannot encode the prompt 'What is 1 \+ 1\?': .*UNK"):
        chats["char"].encode(USER)
    with pytest.raises(DataError, match="the tokeniser cannot encode the response 'x'"):
        chats["char"].encode_response("x")


def test_what_a_template_says_against_the_messages_is_passed_on(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    chat = Chat(load_tokenizer(str(make_bpe_tokenizer(tmp_path, TEXTS, chat_template=template))))
    with pytest.raises(DataError, match=r"the chat template does not take the messages: .*roles must alternate"):
        chat.encode(USER)


def test_without_eos_nothing_ends_a_response(tmp_path, folders):
    backend = Tokenizer.from_file(str(folders["bpe"] / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(str(tmp_path))
    chat = Chat(load_tokenizer(str(tmp_path)))
    assert chat.eos_ids == frozenset()
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        chat.encode_response("hello")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path / "model"))
    assert str(error.value).startswith(f"the model folder {tmp_path / 'model'} does not exist")


def test_a_folder_without_a_tokenizer(tmp_path):
    """With this config alone, transformers makes a tokeniser with an empty vocabulary and says nothing."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value).startswith(f"the model folder {tmp_path} has no tokeniser: there is no tokenizer.json")


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_a_tokenizer_that_does_not_load_is_told_in_one_line(tmp_path, file):
    """transformers explains at length what else it tried."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / file).write_text("{broken")
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value).startswith(f"the tokeniser in {tmp_path} does not load: ")
    assert "\n" not in str(error.value)


def test_a_folder_with_its_own_code_is_refused_at_once(tmp_path):
    """transformers would ask at the terminal, and a run on a server would wait."""
    make_char_tokenizer(tmp_path, "abc")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="does not load"):
        load_tokenizer(str(tmp_path))


def test_the_room_starts_without_heavy_packages():
    """`sluice check --offline` reads data without waiting for torch."""
    code = (
        "import sys, sluice.data.sources, sluice.data.prompts, sluice.data.chat;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# conversations: what the policy wrote is never tokenised again


@pytest.mark.parametrize("name", ["bpe", "template"])
def test_the_next_turn_keeps_the_exact_ids_of_what_was_written(chats, name):
    """R1, Z9: the policy may write ids that no tokeniser would give for the text; they stand in every later prompt."""
    chat = chats[name]
    prompt = chat.encode(USER)
    odd = [i for c in "The answer" for i in chat.tokenizer(c, add_special_tokens=False).input_ids]
    assert odd != chat.tokenizer("The answer", add_special_tokens=False).input_ids
    for ending in ([], [chat.tokenizer.eos_token_id]):
        reply = {"role": "assistant", "content": chat.decode(odd)}
        messages = [*USER, reply, {"role": "user", "content": "Sure?"}]
        ids = chat.encode_next([*prompt, *odd, *ending], USER, reply, messages)
        assert ids[: len(prompt) + len(odd)] == [*prompt, *odd]
        if name == "template":
            assert chat.tokenizer.decode(ids) == chat.tokenizer.decode(chat.encode(messages)), (
                "one <eos> after the reply"
            )


def test_an_edited_history_is_encoded_anew(chats):
    reply = {"role": "assistant", "content": "2"}
    go_on = {"role": "user", "content": "Sure?"}
    chat = chats["template"]
    ids = [*chat.encode(USER), 5]
    assert chat.encode_next(ids, USER, reply, [*USER, {"role": "assistant", "content": "3"}, go_on]) is None
    assert chat.encode_next(ids, USER, reply, [go_on]) is None
    assert chat.encode_next(ids, USER, reply, USER) is None


def test_a_template_that_shows_replies_otherwise_is_encoded_anew(folders, tmp_path):
    chat = Chat(load_tokenizer(str(folders["template"])))
    chat.tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    reply = {"role": "assistant", "content": " 2 "}
    messages = [*USER, reply, {"role": "user", "content": "Sure?"}]
    assert chat.encode_next([*chat.encode(USER), 5], USER, reply, messages) is None

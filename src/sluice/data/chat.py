"""Messages to token ids and back. A completion's text is decoded here and never tokenised again."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from sluice.errors import ConfigError, DataError, boundary
from sluice.types import Message

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
"""At least one of them holds the vocabulary."""


def load_tokenizer(path: str) -> Any:
    """The tokeniser in a local Hugging Face folder; nothing is downloaded and no code of the folder is run.

    Raises ConfigError naming the folder and what is missing in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"the model folder {folder} does not exist; a model of the Hugging Face hub is downloaded first: "
            f"hf download NAME --local-dir {folder}"
        )
    # Some tokeniser classes make an empty vocabulary where they find none, so loading would not fail.
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ConfigError(
            f"the model folder {folder} has no tokeniser: there is no tokenizer.json, nor any of "
            f"{', '.join(TOKENIZER_FILES[1:])}; write one with tokenizer.save_pretrained({str(folder)!r})"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the tokeniser in {folder} does not load: {type(error).__name__}: {reason}") from error


class Chat:
    """A tokeniser as the run needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._encoded: tuple[list[Message], list[int]] | None = None
        """What was encoded last: all attempts of a group begin with the same messages, one after the other."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The messages as the policy sees them, up to where its response begins; never empty.

        With a chat template this is the template with the generation prompt. Without one the contents are joined with
        newlines, and the tokeniser adds what it adds to any text (some a beginning-of-sequence token).

        Raises ConfigError for a system message without a template, DataError for messages that cannot be encoded.
        """
        last = self._encoded  # read once: threads may encode, too
        if last is None or last[0] != list(messages):
            last = self._encoded = deepcopy(list(messages)), self._ids_of(messages)
        return list(last[1])

    def _ids_of(self, messages: Sequence[Message]) -> list[int]:
        if self.tokenizer.chat_template:
            with boundary(DataError, "the chat template does not take the messages"):
                ids = self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
                )
        else:
            if any(message["role"] == "system" for message in messages):
                raise ConfigError(
                    "the tokeniser has no chat template, so there is no place for a system message; "
                    "leave out data.system_prompt, or take a model whose tokeniser has a template"
                )
            text = "\n".join(message["content"] for message in messages)
            with boundary(DataError, f"the tokeniser cannot encode the prompt {_short(text)}"):
                ids = self.tokenizer(text).input_ids
        if not ids:
            raise DataError("the prompt has no tokens")
        return list(ids)

    def encode_next(
        self, ids: Sequence[int], before: Sequence[Message], reply: Message, messages: Sequence[Message]
    ) -> list[int] | None:
        """`messages` as what comes after `ids`, the exact ids of the messages `before` and of the policy's `reply`.

        Only what is new is tokenised: a response never is. None when the messages do not go on from the reply, or when
        the template shows it otherwise than it was written.
        """
        n = len(before)
        if list(messages[:n]) != list(before) or len(messages) <= n or messages[n] != reply:
            return None
        if not self.tokenizer.chat_template:
            tail = "".join(f"\n{message['content']}" for message in messages[n + 1 :])
        else:
            shown = self._rendered(before) + reply["content"]
            whole = self._rendered(messages)
            if not whole.startswith(shown):
                return None
            end = self.tokenizer.decode([ids[-1]], skip_special_tokens=False)
            ended = ids[-1] in self.tokenizer.all_special_ids  # the policy wrote the template's end of turn itself
            tail = whole[len(shown) :].removeprefix(end if ended else "")
        with boundary(DataError, f"the tokeniser cannot encode {_short(tail)}"):
            return [*ids, *self.tokenizer(tail, add_special_tokens=False).input_ids]

    def _rendered(self, messages: Sequence[Message]) -> str:
        with boundary(DataError, "the chat template does not take the messages"):
            return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)

    def encode_response(self, text: str) -> list[int]:
        """A response to learn: its own tokens and the end-of-sequence token, no others."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the tokeniser has no end-of-sequence token, so the model could not learn to stop")
        with boundary(DataError, f"the tokeniser cannot encode the response {_short(text)}"):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens, spaces as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One readable text per token, for readers: special tokens by name, U+FFFD for part of a character."""
        for i in set(ids) - self._pieces.keys():
            self._pieces[i] = self._piece(i)
        return [self._pieces[i] for i in ids]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a response; empty where the tokeniser names none."""
        eos = self.tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset([eos])

    def _piece(self, i: int) -> str:
        if self.tokenizer.convert_ids_to_tokens(i) is None:
            return f"<no token {i}>"  # models pad their vocabulary, and an untrained one samples the padding
        alone, twice = (self.tokenizer.decode([i] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
        # Decoders in the manner of SentencePiece drop the space before the first token of a text.
        return f" {alone}" if twice == f"{alone} {alone}" else alone


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")

"""From the messages of a chat to the ids that a model goes on from."""

import asyncio
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.serving.template_process import TemplateFailedError, TemplateProcess
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.tokenizer.chat_template import read_chat_template


@dataclass(frozen=True)
class Message:
    """What someone said.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or another that a template knows.
        text: the words.
    """

    role: str
    text: str


def story_beginning(messages: Sequence[Message]) -> str:
    """Return the messages as the beginning of a story, for a model that was trained on stories only.

    The words of user and assistant follow each other, with a space between two that have none; so the answer to "Once
    upon a time" is how the story goes on, and the next message goes on from there. Instructions (the other roles) are
    left out, since such a model follows none.
    """
    text = ""
    for message in messages:
        if message.role in ("user", "assistant") and message.text:
            joined = not text or text[-1].isspace() or message.text[0].isspace()
            text += message.text if joined else f" {message.text}"
    return text


class ChatTemplate:
    """The template with which a model was trained to chat, in Jinja as Hugging Face's folders keep it.

    Attributes:
        source: the text of the template.
        end_of_turn: special tokens that end an answer besides eos.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, place: str) -> None:
        """Compile the template, in a process that can be ended.

        Args:
            source: the text of the template.
            tokenizer: of the model.
            place: named in errors.

        Raises:
            UserError: it is no template, or cannot render a question and its answer.
        """
        self.source, self._tokenizer, self._place = source, tokenizer, place
        try:
            self._process = TemplateProcess(source)
        except (UserError, TemplateFailedError) as error:
            raise UserError(f"{place}: is not a valid chat template ({error})") from None
        self._specials = {token.text: token.id for token in tokenizer.specials}
        self._split = re.compile("|".join(re.escape(text) for text in sorted(self._specials, key=len, reverse=True)))
        self._by_role = {token.role: token.text for token in tokenizer.specials}
        self.end_of_turn = self._find_end_of_turn()

    def close(self) -> None:
        """End the process that renders the template."""
        self._process.close()

    async def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the messages and of the beginning of an answer.

        Special tokens come from the template alone: written inside a message they are text.

        Raises:
            UserError: the template refuses the messages.
            TemplateFailedError: it takes more time or memory than it may.
        """
        mark = secrets.token_hex(8)  # parts special tokens that stand in messages, so that the split does not see them
        parted = [Message(message.role, self._part(message.text, mark)) for message in messages]
        try:
            text = await self._process.render_async(**self._values(parted, add_generation_prompt=True))
        except UserError as error:
            raise UserError(f"the chat template of this model refuses the messages ({error})") from None
        return await asyncio.to_thread(self._encode_rendered, text, mark)

    def _encode_rendered(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for special in self._split.finditer(text):
            ids += self._tokenizer.encode(text[end : special.start()].replace(mark, ""))
            ids.append(self._specials[special[0]])
            end = special.end()
        return ids + self._tokenizer.encode(text[end:].replace(mark, ""))

    def _part(self, text: str, mark: str) -> str:
        return self._split.sub(lambda special: special[0][:1] + mark + special[0][1:], text)

    def _values(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "messages": [{"role": message.role, "content": message.text} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._by_role.get("bos", ""),
            "eos_token": self._by_role["eos"],
        }

    def _find_end_of_turn(self) -> tuple[str, ...]:
        """Return the special token that the template writes behind an answer."""
        answer = secrets.token_hex(8)
        example = [Message("user", "Hello"), Message("assistant", answer)]
        try:
            text = self._process.render(**self._values(example, add_generation_prompt=False))
        except (UserError, TemplateFailedError) as error:
            self.close()
            raise UserError(f"{self._place}: cannot render a question and its answer ({error})") from None
        behind = self._split.match(text.partition(answer)[2].lstrip())
        return (behind[0],) if behind else ()


def load_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the chat template that lies beside a tokenizer, or None where there is none.

    Raises:
        UserError: it is damaged.
    """
    source = read_chat_template(folder)
    return None if source is None else ChatTemplate(source, tokenizer, place=f"the chat template in {folder}")

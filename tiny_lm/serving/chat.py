"""Turning the messages of a chat into a prompt."""

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
    """A message of a chat.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or another role of the template.
        text: its content.
    """

    role: str
    text: str


def plain_prompt(messages: Sequence[Message]) -> str:
    """Join messages into a prompt for a model that was trained on plain text.

    The messages of user and assistant are concatenated, with a space where neither side has one; so the reply to "Once
    upon a time" continues the story, and the next message continues from there. Other roles are left out, since such a
    model does not follow instructions.
    """
    text = ""
    for message in messages:
        if message.role in ("user", "assistant") and message.text:
            joined = not text or text[-1].isspace() or message.text[0].isspace()
            text += message.text if joined else f" {message.text}"
    return text


class ChatTemplate:
    """The chat template of a model, in Jinja as in Hugging Face's folders.

    Attributes:
        source: the template itself.
        end_of_turn: special tokens that end a reply besides eos.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, origin: str) -> None:
        """Compile the template in a child process; errors start with ``origin``, which says where it is from.

        Raises:
            UserError: the template is invalid, or cannot render a question and its answer.
        """
        self.source, self._tokenizer, self._origin = source, tokenizer, origin
        try:
            self._process = TemplateProcess(source)
        except (UserError, TemplateFailedError) as error:
            raise UserError(f"{origin}: is not a valid chat template ({error})") from None
        self._specials = {token.text: token.id for token in tokenizer.specials}
        self._split = re.compile("|".join(re.escape(text) for text in sorted(self._specials, key=len, reverse=True)))
        self._by_role = {token.role: token.text for token in tokenizer.specials}
        self.end_of_turn = self._find_end_of_turn()

    def close(self) -> None:
        """End the process that renders the template."""
        self._process.close()

    async def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the messages and of the start of a reply.

        Only the template yields special tokens: inside a message they are encoded as text.

        Raises:
            UserError: the template refuses the messages.
            TemplateFailedError: it exceeds its time or memory limit.
        """
        mark = secrets.token_hex(8)  # inserted into special tokens inside messages, so that they are not split off
        escaped = [Message(message.role, self._escape(message.text, mark)) for message in messages]
        try:
            text = await self._process.render_async(**self._variables(escaped, add_generation_prompt=True))
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

    def _escape(self, text: str, mark: str) -> str:
        return self._split.sub(lambda special: special[0][:1] + mark + special[0][1:], text)

    def _variables(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "messages": [{"role": message.role, "content": message.text} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._by_role.get("bos", ""),
            "eos_token": self._by_role["eos"],
        }

    def _find_end_of_turn(self) -> tuple[str, ...]:
        """Return the special token that the template writes after a reply."""
        reply = secrets.token_hex(8)
        example = [Message("user", "Hello"), Message("assistant", reply)]
        try:
            text = self._process.render(**self._variables(example, add_generation_prompt=False))
        except (UserError, TemplateFailedError) as error:
            self.close()
            raise UserError(f"{self._origin}: cannot render a question and its answer ({error})") from None
        end = self._split.match(text.partition(reply)[2].lstrip())
        return (end[0],) if end else ()


def load_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Load the chat template in a tokenizer folder; None if it has none.

    Raises:
        UserError: the template is damaged.
    """
    source = read_chat_template(folder)
    return None if source is None else ChatTemplate(source, tokenizer, origin=f"the chat template in {folder}")

"""Validation of event calls before Gradio handles them: forged ones make it print tracebacks."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio

_SESSION_CHARACTERS = 64


class Calls:
    """The events of a page that call a function, and the inputs of each."""

    def __init__(self, page: "gradio.Blocks") -> None:
        self._inputs: dict[int, list[Any]] = {
            number: list(event.inputs) for number, event in page.fns.items() if event.fn is not None
        }

    def problem(self, body: bytes) -> str | None:
        """Return what is wrong with the body of a call, or None if the page itself could have sent it."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return "the body is not JSON"
        if not isinstance(call, dict):
            return "the body must be a JSON object"
        number, values, session = call.get("fn_index"), call.get("data"), call.get("session_hash")
        if type(number) is not int or number not in self._inputs:
            return "fn_index: is not an event of this page"
        if not isinstance(session, str) or not session.isalnum() or len(session) > _SESSION_CHARACTERS:
            return "session_hash: is not a session of this page"
        if not isinstance(call.get("trigger_id"), int | None):
            return "trigger_id: must be an integer"
        if unknown := set(call) - {"data", "event_data", "fn_index", "session_hash", "trigger_id"}:
            return f"{ascii(min(unknown))[:60]}: is not a field that this page sends"
        inputs = self._inputs[number]
        if not isinstance(values, list) or len(values) != len(inputs):
            return f"data: must be a list of {len(inputs)} values"
        wrong = [
            str(component.label)
            for component, value in zip(inputs, values, strict=True)
            if not _is_valid(component, value)
        ]
        return f"data: {wrong[0]!r} does not accept this value" if wrong else None


def _is_valid(component: Any, value: object) -> bool:
    """Return whether ``value`` is a possible value of a component."""
    import gradio as gr

    if isinstance(component, gr.Slider):
        types = (int,) if isinstance(component.step, int) else (int, float)
        return isinstance(value, types) and type(value) is not bool and component.minimum <= value <= component.maximum
    if not isinstance(value, str) or any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        return False
    if isinstance(component, gr.Dropdown):
        return value in [choice for _, choice in component.choices]
    return True  # for a text that is too long, the event itself returns a readable error

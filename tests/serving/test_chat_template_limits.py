"""Chat templates of strangers: whatever they do, the server goes on, and says in one line what they did."""

import asyncio
import gc
import os
import random
import shutil
from pathlib import Path

import pytest
from served import Serve

from tiny_lm.errors import UserError
from tiny_lm.serving import template_process
from tiny_lm.serving.template_process import TemplateFailedError, TemplateProcess

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ '%9999999999d' % 1 }}", "MemoryError"),
        ("{{ 'x'.center(10**11) }}", "MemoryError"),
        ("{{ [1] | tojson(indent=99999999999) }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4,194,304 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("{{ cycler() }}", "RuntimeError"),
        ("{{ {}.x.y }}", "no attribute 'x'"),
        ("{{ raise_exception('a\nb') }}", "^a b$"),
    ],
)
def test_what_a_template_does_wrong_is_one_line(source: str, message: str) -> None:
    process = TemplateProcess(source)
    with pytest.raises(UserError, match=message) as refused:
        process.render(messages=[])
    assert "\n" not in str(refused.value)
    process.close()


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 5000, "{{ " + "-" * 100_000 + "1 }}", "{% for"])
def test_a_template_that_does_not_compile_is_one_line(source: str) -> None:
    with pytest.raises((UserError, TemplateFailedError)) as refused:
        TemplateProcess(source)
    assert "\n" not in str(refused.value)


def test_a_rendering_without_end_is_ended_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "RENDER_SECONDS", -0.5)  # half a second, with the one for the child's own
    process = TemplateProcess("{% if messages %}" + ENDLESS + "{% endif %}ok")
    with pytest.raises(TemplateFailedError, match="so it was stopped"):
        process.render(messages=["x"])
    monkeypatch.undo()
    assert process.render(messages=[]) == "ok"
    process.close()


def test_a_rendering_that_nobody_waits_for_is_ended() -> None:
    process = TemplateProcess("{% if messages %}" + ENDLESS + "{% endif %}ok")

    async def give_up() -> str:
        waiting = [asyncio.create_task(process.render_async(messages=["x"])) for _ in range(3)]
        await asyncio.sleep(0.1)
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*waiting, return_exceptions=True)
        )
        return await process.render_async(messages=[])

    assert asyncio.run(give_up()) == "ok"
    process.close()


def test_a_template_that_is_dropped_leaves_no_process() -> None:
    process = TemplateProcess("x")
    pid = process._children[0].pid
    del process
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_templates_made_up_at_random_end_in_text_or_one_line() -> None:
    pieces = (
        "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content * 99999 }}", "{% if x %}",
        "{% endif %}",
        "{{ m.x.y }}", "{{ 'a' * 10**9 }}", "{{ 1 / 0 }}", "{{ range(10**9) }}", "{{ x() }}", "{{ m | join }}",
        "{{ messages | sort }}", "{{ '%d' % 'x' }}", "{{ ''.__class__ }}", "{% include 'x' %}", "{% break %}",
        "{{ lipsum(n=9) }}", "{{ 'x' | indent(10**9) }}", "{{ dict(a=1) | tojson(2) }}",
        "{{ '{:99999999}'.format(1) }}",
        "{% set ns = namespace(a=1) %}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(f(1)) }}",
        "{{ 9**9**9 }}", "((", "}}",
    )  # fmt: skip
    chance = random.Random(17)
    ends = {"text": 0, "refused": 0}
    for _ in range(40):
        source = "".join(chance.choices(pieces, k=chance.randint(1, 4)))
        try:
            process = TemplateProcess(source)
            process.render(messages=[{"role": "user", "content": "Hi"}])
            ends["text"] += 1
        except (UserError, TemplateFailedError) as error:
            assert "\n" not in str(error)
            ends["refused"] += 1
    assert min(ends.values()) > 3


def test_a_server_answers_others_while_a_template_runs_and_stops_on_time(
    serve: Serve, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(run_folder, folder)
    template = (
        "{{ bos_token }}{% if messages[0].content == 'loop' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
    )
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    served = serve(folder, "--timeout", "1")

    def ask(content: str) -> dict[str, object]:
        messages = [{"role": "user", "content": content}]
        body = {"model": "evil", "messages": messages, "max_tokens": 2}
        told: dict[str, object] = served.client.post("/v1/chat/completions", json=body).json()
        return told

    assert ask("loop")["error"] == {
        "message": "the request took longer than this server allows",
        "type": "server_error",
        "param": None,
        "code": "timeout",
    }
    assert ask("One day")["choices"]
    body = {"model": "evil", "messages": [{"role": "user", "content": "loop"}], "stream": False}
    assert served.client.post("/api/chat", json=body).status_code == 504
    served.process.terminate()
    assert served.process.wait(timeout=20) == 0
    assert served.process.stderr and "Traceback" not in served.process.stderr.read()

import math
import re

import pytest
import torch
from report_runs import small_model

from tiny_lm.evaluation.report.attention import describe_habit, map_attention, measure_spread, record_attention
from tiny_lm.evaluation.report.charts import Line, Scale, build_chart, envelope
from tiny_lm.evaluation.report.curves import training_charts
from tiny_lm.evaluation.report.samples import SampledStep, TrainingSample, choose_steps, read_sampled_steps
from tiny_lm.evaluation.report.surprise import measure_tokens
from tiny_lm.model import build_model
from tiny_lm.pages import shared_style
from tiny_lm.pages.text import duration, number, percent, short, spoken, visible
from tiny_lm.runs import number_in
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.training.callbacks.samples import _quote

STYLE = shared_style()


@pytest.mark.parametrize("family", ["gpt2", "smalllm", "llama3", "qwen3"])
def test_recorded_attention_is_what_the_model_does(family: str) -> None:
    torch.manual_seed(3)
    groups = {"n_kv_heads": 2} if family in ("llama3", "qwen3") else {}
    model = build_model(small_model(family, **groups)).eval()
    ids = torch.randint(512, (2, 20))
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda _module, inputs, output: seen.append((inputs, output)))
    with torch.no_grad():
        plain = model(ids)
        before = [block.attn.attend for block in model.blocks]
        with record_attention(model) as recorded:
            found = model(ids)
    torch.testing.assert_close(found, plain)
    assert [block.attn.attend for block in model.blocks] == before
    assert [weights.shape for weights in recorded] == [(2, 4, 20, 20)] * 2
    torch.testing.assert_close(recorded[0].sum(dim=-1), torch.ones(2, 4, 20))
    assert all(float(weights.triu(1).abs().max()) == 0 for weights in recorded)
    # The weights times the values, projected, are the output of the layer.
    attn, ((x, *_), output) = model.blocks[1].attn, seen[0]
    values = attn.W_v(x).view(2, 20, -1, attn.head_size).transpose(1, 2)
    values = values.repeat_interleave(4 // values.shape[1], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(attn.out_proj((recorded[1] @ values).transpose(1, 2).flatten(2)), output)


def test_the_model_attends_as_before_after_an_error() -> None:
    model = build_model(small_model())
    before = [block.attn.attend for block in model.blocks]
    with pytest.raises(ValueError, match="do not fit"), record_attention(model):
        model(torch.zeros(1, 999, dtype=torch.long))
    assert [block.attn.attend for block in model.blocks] == before


def test_many_heads_see_less_text() -> None:
    few = map_attention(build_model(small_model()).eval(), range(64))
    many = map_attention(build_model(small_model(n_layers=40, d_model=64, n_heads=32)).eval(), range(64))
    assert len(few.ids) == 48
    assert 16 <= len(many.ids) < 48
    assert len(many.maps) == 40 * 32
    assert sum(len(head.data) for head in many.maps) < 700_000


def test_a_head_is_named_after_what_it_looks_at() -> None:
    diagonal, even = torch.eye(10), torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]
    previous = torch.eye(10).roll(-1, dims=1)
    assert describe_habit(diagonal) == "itself 100%"
    assert describe_habit(previous) == "previous token 100%"
    assert describe_habit(torch.eye(1, 10).expand(10, 10)) == "first token 100%"
    assert describe_habit(even) == "about 6 tokens"
    assert measure_spread(diagonal) == pytest.approx(1)
    assert measure_spread(even) == pytest.approx(5.5)


def test_surprise_is_the_cross_entropy(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = build_model(small_model()).eval()
    ids = tokenizer.encode("Once upon a time there was a cat.", bos=True, eos=True)
    tokens = measure_tokens(model, tokenizer, ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert sum(token.bits for token in tokens) / len(tokens) == pytest.approx(float(loss) / math.log(2), rel=1e-4)
    assert "".join(token.text for token in tokens) == "Once upon a time there was a cat.<eos>"
    for place, token in enumerate(tokens):
        order = logits[place].argsort(descending=True).tolist()
        assert order[token.rank - 1] == ids[place + 1]
        assert [text for text, _ in token.alternatives] == [tokenizer.token_text(i) for i in order[:5]]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (
            "Once upon a time",
            "Once upon a time, *all* was `well` & <b>good</b>.\n\n  # No heading\n1. one\n- two |x| $5",
        ),
        ("", "no beginning\n> quoted \\ back"),
        (" spaced ", " spaced  story\n\n"),
        ("**", "** stars"),
        ("two\nlines", "two\nlines and on"),
    ],
)
def test_samples_are_read_back_as_they_were_told(prompt: str, text: str) -> None:
    quote = _quote(prompt, text)
    content = f"# Sample stories\n\nheader\n\n## Step 40\n\nval loss 2.5000, 1,234 tokens seen\n\n{quote}\n"
    (sampled,) = read_sampled_steps(content)
    assert (sampled.step, sampled.loss, sampled.tokens) == (40, 2.5, 1234)
    (sample,) = sampled.samples
    assert (sample.prompt + sample.completion).rstrip("\n") == text.rstrip("\n")
    if "\n" not in prompt and prompt == prompt.strip() != "":
        assert sample.prompt == prompt


def test_moments_of_training_are_chosen_by_their_loss() -> None:
    losses = [8.0, 4.0, 2.5, 2.2, 2.1, 2.0]
    moments = [SampledStep(10 * n, loss, None, [TrainingSample("", "x")]) for n, loss in enumerate(losses)]
    assert [moment.step for _, moment in choose_steps(moments)] == [0, 10, 50]
    assert [name for name, _ in choose_steps(moments[:2])] == ["start", "end"]
    assert [name for name, _ in choose_steps(moments[:1])] == ["end"]
    assert choose_steps([]) == []


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (2.0, 7.3), (0.0003, 0.008), (1.0, 123_456.0), (2.04, 2.05), (0.9, 2e19), (1e-90, 1e90)],
)
@pytest.mark.parametrize("log", [False, True])
def test_axes_have_a_few_round_marks(low: float, high: float, log: bool) -> None:
    scale = Scale(max(low, 1e-4), high, log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(-1e-9 <= scale.position(tick) <= 1 + 1e-9 for tick in ticks)


def test_a_chart_leaves_out_points_of_a_damaged_file() -> None:
    for log in (False, True):
        chart = build_chart(
            "x", "X", "", [Line("x", [(1, 2.0), (2, 1e308), (3, -1e308), (4, 1e-300), (5, 3.0)])], log=log
        )
        assert chart and all(0 <= place <= 100 for place, _ in chart.y_ticks)
    assert build_chart("x", "X", "", [Line("x", [(1, 1.7e308)])]) is None


def test_a_chart_keeps_its_points_inside() -> None:
    curve = [(step, 5.0 / step) for step in range(1, 60)]
    for log in (False, True):
        chart = build_chart("x", "X", "", [Line("x", curve)], log=log)
        assert chart
        numbers = [float(text) for text in re.findall(r"[\d.]+", chart.lines[0].path)]
        assert min(numbers) >= 0
        assert max(numbers) <= 1000
        assert chart.summary == "x from 5 at optimizer step 1 to 0.08475 at 59"
    assert build_chart("x", "X", "", [Line("x", [])]) is None
    flat = build_chart("x", "X", "", [Line("x", [(3, 0.0)])])
    assert flat and len(flat.lines[0].marks) == 1


def test_steps_are_written_so_that_they_do_not_touch() -> None:
    def labels(last: int) -> list[str]:
        chart = build_chart("x", "X", "", [Line("x", [(1, 0.0), (last, 1.0)])])
        assert chart
        return [label for _, label in chart.x_ticks]

    assert labels(5000) == ["1,000", "2,000", "3,000", "4,000", "5,000"]
    assert labels(120_000) == ["25k", "50k", "75k", "100k"]
    assert labels(30_000_000)[:2] == ["10M", "20M"]


def test_the_ends_of_epochs_are_marked_where_they_are_few() -> None:
    events = [{"step": step, "train_loss": 5.0 - step / 200} for step in range(10, 501, 10)]
    loss = training_charts(events, 220.0)[0]
    assert [name for _, name in loss.events] == ["epoch 1", "epoch 2"]
    places = {step: left for step, _, left, _ in loss.data["lines"][0]["points"]}  # type: ignore[index]  # JSON values
    assert [left for left, _ in loss.events] == pytest.approx([places[220], places[440]], abs=0.01)
    for none in (None, 500.0, 600.0, 50.0, -0.001):  # a negative one would never end
        assert training_charts(events, none)[0].events == []


def test_integers_beyond_floats_are_not_shown() -> None:
    for show in (number, short, spoken, duration, percent):
        assert show(10**400) == "–"
    assert number_in({"tokens": 10**400}, "tokens") is None


def test_an_envelope_keeps_what_stands_out() -> None:
    curve = [(step, 1.0) for step in range(10_000)]
    curve[4321] = (4321, 50.0)
    curve[8765] = (8765, -3.0)
    kept = envelope(curve, 100)
    assert len(kept) <= 100
    assert {(4321, 50.0), (8765, -3.0)} <= set(kept)
    assert kept == sorted(kept)


def test_numbers_are_told_as_people_read_them() -> None:
    counts = {0: "0", 999: "999", 1000: "1.00k", 6_791_424: "6.79M", 123_456: "123k", 2.05e9: "2.05B"}
    assert [short(count) for count in counts] == list(counts.values())
    assert [spoken(x) for x in (512, 6_791_424, 2.5e9)] == ["512", "6.79 million", "2.5 billion"]
    times = {3.4: "3 s", 215: "3 min 35 s", 3600: "1 h", 90_000: "1 d 1 h"}
    assert [duration(seconds).replace("\xa0", " ") for seconds in times] == list(times.values())
    numbers = {
        0.0003: "0.0003",
        13.8468: "13.8",
        1234.5: "1,234",
        0.0: "0",
        None: "–",
        math.nan: "–",
        4.2e-5: "0.000042",
    }
    assert [number(value) for value in numbers] == list(numbers.values())
    assert [percent(x) for x in (0.5, 0.001, 0.0)] == ["50%", "<1%", "0%"]
    assert visible("a\x00b\u202ec\nd") == "a\u2400b\\u202ec\nd"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: int) -> None:
    """WCAG 2.1, contrast (minimum): 4.5 to 1."""
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block))
    pairs = [("ink", ground) for ground in ("paper", "raised", "c0", "c1", "c2", "c3", *(f"h{n}" for n in range(8)))]
    for text, ground in [*pairs, ("soft", "paper"), ("soft", "raised"), ("train", "paper"), ("val", "paper")]:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"

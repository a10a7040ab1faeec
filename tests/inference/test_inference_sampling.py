import pytest
import torch

from tiny_lm.errors import UserError
from tiny_lm.inference import SamplingParams, sample
from tiny_lm.inference.sampling import penalize

LOGITS = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]]))


def draw(sampling: SamplingParams, count: int = 20_000) -> torch.Tensor:
    """Return the share of each token among many draws."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    ids = sample(LOGITS.expand(count, -1), sampling, uniform)
    return torch.bincount(ids, minlength=4) / count


def test_temperature_1_draws_the_distribution() -> None:
    assert torch.allclose(draw(SamplingParams(temperature=1.0)), LOGITS.exp()[0], atol=0.01)


def test_temperature_sharpens_as_softmax_says() -> None:
    assert torch.allclose(draw(SamplingParams(temperature=0.5)), (LOGITS / 0.5).softmax(-1)[0], atol=0.01)


def test_temperature_0_takes_the_likeliest() -> None:
    assert sample(LOGITS, SamplingParams(temperature=0.0), torch.tensor([0.99])).tolist() == [1]


def test_top_k_leaves_k_tokens() -> None:
    assert torch.allclose(
        draw(SamplingParams(temperature=1.0, top_k=2)), torch.tensor([0.0, 0.625, 0.0, 0.375]), atol=0.01
    )
    assert torch.allclose(draw(SamplingParams(temperature=1.0, top_k=99)), draw(SamplingParams(temperature=1.0)))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.9, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_leaves_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    assert draw(SamplingParams(temperature=1.0, top_p=top_p)).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.05, [0, 1, 2, 3]), (0.2, [1, 2, 3]), (0.6, [1, 3]), (1.0, [1])])
def test_min_p_leaves_tokens_that_come_near_the_likeliest(min_p: float, kept: list[int]) -> None:
    assert draw(SamplingParams(temperature=1.0, min_p=min_p)).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("scale", [0.5, 8.0])
def test_top_p_of_many_tokens_equals_sorting_all(scale: float) -> None:
    logits = scale * torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))  # flat: most are needed; or few
    drawn = [sample(logits, SamplingParams(temperature=1.0, top_p=0.9), torch.full((5,), u / 200)) for u in range(200)]
    probabilities, ids = logits.softmax(-1).sort(-1, descending=True)
    for row in range(5):
        size = int((probabilities[row].cumsum(0) < 0.9).sum()) + 1
        kept = probabilities[row, :size].double()
        steps = torch.searchsorted(kept.cumsum(0) / kept.sum(), torch.arange(200).double() / 200, right=True)
        assert (torch.stack(drawn)[:, row] == ids[row][steps]).float().mean() > 0.99  # sums of float32 round


def test_penalties_are_those_of_keskar_and_of_openai() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 3.0]])
    seen, counts = torch.tensor([[True, True, False, True]]), torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    sampling = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = torch.tensor([[1.0 - 0.5 - 0.25, -4.0, 1.0, 1.5 - 0.5 - 0.75]])
    torch.testing.assert_close(penalize(logits, seen, counts, sampling), expected)


def test_rows_are_independent() -> None:
    uniform = torch.rand(7, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(2))
    together = sample(logits, SamplingParams(temperature=0.9, top_k=20, top_p=0.8), uniform)
    alone = [
        sample(logits[i : i + 1], SamplingParams(temperature=0.9, top_k=20, top_p=0.8), uniform[i : i + 1])
        for i in range(7)
    ]
    assert together.tolist() == torch.cat(alone).tolist()


def test_the_last_random_number_draws_a_real_token() -> None:
    almost_one = torch.tensor([1.0 - 2**-24])
    assert sample(LOGITS, SamplingParams(temperature=1.0, top_k=2), almost_one).tolist() == [3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be between 0 and 100"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 100"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top-p must be above 0 and at most 1"),
        ({"min_p": 1.1}, "min-p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be between 0.01 and 100"),
        ({"presence_penalty": 101.0}, "presence-penalty must be between -100 and 100"),
        ({"frequency_penalty": float("nan")}, "frequency-penalty must be between -100 and 100"),
    ],
)
def test_values_outside_their_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_the_least_temperature_and_the_strongest_penalties_draw_the_likeliest_token() -> None:
    logits = torch.tensor([[1.0, 30.0, -5.0, 29.9], [3.0, -torch.inf, 2.9, 1.0]])
    for top_k, top_p, min_p in ((None, 1.0, 0.0), (2, 1.0, 0.0), (None, 0.9, 0.1)):
        sampling = SamplingParams(
            temperature=1e-300,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=0.01,
            presence_penalty=-100.0,
            frequency_penalty=100.0,
        )
        penalized = penalize(logits, torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4), sampling)
        assert sample(penalized, sampling, torch.tensor([0.999, 0.0])).tolist() == [1, 0]


def test_the_highest_random_number_draws_a_token_that_may_be_drawn() -> None:
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    logits[:, 150:] = -torch.inf
    highest = torch.full((500,), 1 - 2.0**-24)  # that torch.rand gives
    assert int(sample(logits, SamplingParams(temperature=1.0), highest).max()) < 150
    assert int(sample(logits, SamplingParams(temperature=1.0, top_k=200), highest).max()) < 150

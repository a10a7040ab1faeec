"""What all routes of a server share: its models, its limits and its figures."""

from collections.abc import Iterable, Sequence

from tiny_lm.errors import UserError
from tiny_lm.inference import GenerationConfig
from tiny_lm.serving.errors import ApiError
from tiny_lm.serving.generation import Generation
from tiny_lm.serving.limits import MOST_PROMPTS, Limits
from tiny_lm.serving.metrics import Metrics
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.scheduler import RequestHandle

_SEEDS = 2**63
"""Seeds are taken modulo this; those that a C integer holds (which all clients send) are left as they are."""


class ModelRegistry:
    """The models of a server, by name.

    Attributes:
        models: in the order in which they were named.
        limits: of every request.
        metrics: what was counted.
    """

    def __init__(self, models: Iterable[ServedModel], limits: Limits) -> None:
        self.models = list(models)
        self.limits = limits
        self.metrics = Metrics(self.models)
        self._by_name = {model.name: model for model in self.models}

    def find(self, name: str) -> ServedModel:
        """Return the model of that name; the tag ``:latest``, which Ollama's clients add, may be left out or not.

        Raises:
            ApiError: there is none.
        """
        model = self._by_name.get(name) or self._by_name.get(name.removesuffix(":latest"))
        if model is None:
            known = ", ".join(self._by_name)
            raise ApiError(404, f"model {name!r} not found; there are: {known}", param="model", code="model_not_found")
        return model

    def begin(
        self,
        model: ServedModel,
        prompts: Sequence[list[int]],
        request: GenerationConfig,
        *,
        seconds: float,
        n: int = 1,
        seed: int | None = None,
        scores_prompts: bool = False,
    ) -> Generation:
        """Hand prompts to the loop of a model.

        Args:
            model: tells the texts.
            prompts: ids, one or more for each prompt.
            request: how to go on.
            seconds: the time that is left for the texts.
            n: texts for each prompt; text i of a prompt has ``seed + i``.
            seed: any integer; None for another text each time.
            scores_prompts: tell the log-probabilities of the prompts' tokens too.

        Raises:
            UserError: there are too many texts, or the loop refuses one.
            QueueFull: as :meth:`Scheduler.submit`; no text of the request is begun then.
        """
        if len(prompts) * n > MOST_PROMPTS:
            raise UserError(
                f"{len(prompts)} prompts with {n} texts each are too many: at most {MOST_PROMPTS} texts in all"
            )
        tickets: list[RequestHandle] = []
        try:
            for ids in prompts:
                score = model.generator.new_score(ids, top=request.logprobs or 0) if scores_prompts else None
                for number in range(n):
                    own_seed = None if seed is None else seed % _SEEDS + number
                    tickets.append(model.loop.submit(ids, request, seed=own_seed, score=score))
        except Exception:
            for ticket in tickets:
                ticket.cancel()
            raise
        return Generation(
            tickets,
            sum(map(len, prompts)),
            seconds=seconds,
            on_first=lambda seconds: self.metrics.first_token(model.name, seconds),
        )

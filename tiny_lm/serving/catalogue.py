"""What all routes of a server share: its models, its limits and its figures."""

from collections.abc import Iterable, Sequence

from tiny_lm.inference import Request
from tiny_lm.serving.errors import ApiError
from tiny_lm.serving.generation import Generation, begin
from tiny_lm.serving.limits import Limits
from tiny_lm.serving.metrics import Metrics
from tiny_lm.serving.models import ServedModel


class Catalogue:
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
        request: Request,
        *,
        n: int = 1,
        seed: int | None = None,
        scores_prompts: bool = False,
    ) -> Generation:
        """Hand prompts to the loop of a model, as :func:`begin` does."""
        return begin(
            model,
            prompts,
            request,
            n=n,
            seed=seed,
            scores_prompts=scores_prompts,
            limits=self.limits,
            on_first=lambda seconds: self.metrics.first_token(model.name, seconds),
        )

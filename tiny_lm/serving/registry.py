"""What all routes of a server share: its models, limits and metrics."""

from collections.abc import Iterable, Sequence

from tiny_lm.errors import UserError
from tiny_lm.inference import GenerationConfig
from tiny_lm.serving.errors import ApiError
from tiny_lm.serving.generation import Generation
from tiny_lm.serving.limits import MAX_SEQUENCES, Limits
from tiny_lm.serving.metrics import Metrics
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.request_handle import RequestHandle

_SEED_MODULUS = 2**63
"""Seeds are reduced modulo this, which leaves unchanged those that fit a C integer, as all clients send."""


class ModelRegistry:
    """The models of a server, by name.

    Attributes:
        models: in the order of the command line.
        limits: of every request.
        metrics: counters for Prometheus.
    """

    def __init__(self, models: Iterable[ServedModel], limits: Limits) -> None:
        self.models = list(models)
        self.limits = limits
        self.metrics = Metrics(self.models)
        self._by_name = {model.name: model for model in self.models}

    def find(self, name: str) -> ServedModel:
        """Return the model of that name, with or without the tag ``:latest``, which Ollama's clients add.

        Raises:
            ApiError: no model has that name.
        """
        model = self._by_name.get(name) or self._by_name.get(name.removesuffix(":latest"))
        if model is None:
            known = ", ".join(self._by_name)
            raise ApiError(404, f"model {name!r} not found; there are: {known}", param="model", code="model_not_found")
        return model

    def submit(
        self,
        model: ServedModel,
        prompts: Sequence[list[int]],
        config: GenerationConfig,
        *,
        seconds: float,
        n: int = 1,
        seed: int | None = None,
        score_prompts: bool = False,
    ) -> Generation:
        """Queue prompts in the scheduler of a model.

        Args:
            model: the model to generate with.
            prompts: ids, one or more for each prompt.
            config: how to generate.
            seconds: time left for the request.
            n: completions of each prompt; completion i has ``seed + i``.
            seed: any integer; None for different texts each time.
            score_prompts: also return the log-probabilities of the prompts' tokens.

        Raises:
            UserError: there are too many sequences, or the scheduler refuses one.
            QueueFull: as :meth:`Scheduler.submit`; then no sequence of the request is queued.
        """
        if len(prompts) * n > MAX_SEQUENCES:
            raise UserError(
                f"{len(prompts)} prompts with {n} texts each are too many: at most {MAX_SEQUENCES} texts in all"
            )
        handles: list[RequestHandle] = []
        try:
            for ids in prompts:
                scorer = None
                if score_prompts:
                    scorer = model.generator.new_prompt_scorer(ids, top_logprobs=config.logprobs or 0)
                for index in range(n):
                    own_seed = None if seed is None else seed % _SEED_MODULUS + index
                    handles.append(model.scheduler.submit(ids, config, seed=own_seed, prompt_scorer=scorer))
        except Exception:
            for handle in handles:
                handle.cancel()
            raise
        return Generation(
            handles,
            sum(map(len, prompts)),
            seconds=seconds,
            on_first=lambda seconds: self.metrics.record_first_token(model.name, seconds),
        )

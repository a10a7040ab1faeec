"""Serving over HTTP: the APIs of OpenAI and Ollama, continuous batching, and a demo page.

A prompt passes through at most six types between HTTP body and sampled token:

1. the request body (``openai/schema.py``, ``ollama/schema.py``): strictly typed JSON of one API;
2. :class:`~tiny_lm.inference.GenerationConfig`: what is asked for, the same for both APIs;
3. :class:`~tiny_lm.serving.generation.Generation`: all sequences of one HTTP request, with its timeout;
4. :class:`~tiny_lm.serving.request_handle.RequestHandle`: one sequence, as threads other than the scheduler's see it;
5. :class:`~tiny_lm.inference.sequence.SequenceState`: the same sequence, as the scheduler decodes it;
6. :class:`~tiny_lm.inference.batch.BatchDecoder`: the sequences that share a step, in which tokens are sampled.

Tokens come back as :class:`~tiny_lm.serving.request_handle.StreamChunk`, which a formatter of the API turns into JSON.

Only ``scheduler``, ``engines`` and ``models`` can be imported without the extra ``[serve]``; ``demo`` needs ``[demo]``.
"""

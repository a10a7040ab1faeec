"""A trained model behind HTTP: the APIs of OpenAI and Ollama, the loop that tells many stories at once, and a page.

Only ``batching``, ``engines`` and ``models`` can be imported without the extra ``[serve]``; ``demo`` needs ``[demo]``.
"""

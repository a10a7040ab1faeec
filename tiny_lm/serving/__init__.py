"""A trained model behind HTTP: the APIs of OpenAI and Ollama, and the loop that tells many stories at once.

Only ``batching`` and ``models`` can be imported without the extra ``[serve]``.
"""

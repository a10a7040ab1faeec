"""The part of Ollama's API that its clients use."""

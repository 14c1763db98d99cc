"""The OpenAI-compatible server behind openai_api.py: an engine that decodes many requests at once, and its protocol."""

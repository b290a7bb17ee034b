"""The HTTP server: OpenAI's interface over the engine, and a chat page."""

"""The public HTTP API: OpenAI's completions and chat over an `EngineLoop`, with what this server knows besides."""

"""An inference server: a batching engine over the same decoder, an OpenAI-compatible API, and live expert health."""

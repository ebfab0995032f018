"""A load client for OpenAI-compatible endpoints, with the options and result keys of `vllm bench serve`."""

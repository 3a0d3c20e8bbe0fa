"""Real SGLang engines. A package, so that its engines end with its last test: vLLM's are started after them."""

"""Where a language model reads fewer tokens: a merged prompt, or chunks of the cache."""

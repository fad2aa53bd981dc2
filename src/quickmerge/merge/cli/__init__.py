"""Commands of merging: what is kept, what it costs, and training what the methods need."""

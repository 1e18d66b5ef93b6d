"""The CPU: compiled C where there is a compiler, else torch's operators. Blocks that are dropped cost nothing."""

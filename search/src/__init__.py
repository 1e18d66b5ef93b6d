"""From a model and prompts to a sparsity plan: search, evaluation, command line.  Knows all rooms."""

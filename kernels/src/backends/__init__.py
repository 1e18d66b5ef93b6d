"""One folder a backend, with everything that is true of it."""

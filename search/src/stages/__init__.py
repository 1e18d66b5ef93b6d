"""The stages of a search, in their order: probe, trace, sensitivity, compose, validate; then what is written."""

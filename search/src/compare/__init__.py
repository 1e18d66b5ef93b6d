"""Methods side by side on one model: presets brought to equal densities, and searched plans, on the same clips."""

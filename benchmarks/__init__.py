"""Speed and quality against dense attention and against other packages. Run from the clone; not in the wheel."""

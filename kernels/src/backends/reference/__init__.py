"""Plain torch in fp32: slow, and what every backend should compute."""

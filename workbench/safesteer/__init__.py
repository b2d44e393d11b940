"""safesteer."""

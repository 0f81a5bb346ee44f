"""How good length predictions are, and what they do to scheduling."""

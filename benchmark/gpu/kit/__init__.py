"""What ``prepare`` is made of: what travels, what is left out of it, and the parts."""

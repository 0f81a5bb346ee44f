"""What the scheduling core costs."""

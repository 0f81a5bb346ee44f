"""Programs whose imports are written down; started by ``kit.closure`` only."""

"""A discrete-event simulator that runs the scheduling policies of the engine."""

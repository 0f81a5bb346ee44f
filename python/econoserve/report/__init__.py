"""Tables and pages of what came of simulated runs."""

"""Sources: where trajectories come from. Each is a pure function of the step."""

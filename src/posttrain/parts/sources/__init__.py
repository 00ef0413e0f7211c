"""Sources of trajectories: data sets, rollouts, and mixtures."""

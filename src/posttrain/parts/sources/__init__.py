"""Where trajectories come from: rows of data, rollouts, and mixtures of sources."""

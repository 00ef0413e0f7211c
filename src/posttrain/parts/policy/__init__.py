"""Policy gradients: losses on the learner's own rollouts."""

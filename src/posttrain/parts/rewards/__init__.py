"""What an answer or a step is worth: verifiers, learnt judges, and how judges are trained."""

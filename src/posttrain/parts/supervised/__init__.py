"""Likelihoods of given answers, and of a policy's own answers after choosing among them."""

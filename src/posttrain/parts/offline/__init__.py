"""Offline RL: logged answers with rewards, from whoever wrote them."""

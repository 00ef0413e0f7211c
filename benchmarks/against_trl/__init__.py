"""posttrain and TRL side by side: the same models, prompts and token counts, step by step in turn.

__main__ ── what to run ──▶ material: models, tokenizers, data ──▶ folders on disk
    │
    ├─ pairs ──▶ worker process "ours" ◀── step ── worker process "trl"   one works at a time
    ├─ rate ───▶ what the matrix multiplication of this machine reaches, on the same threads
    ├─ equivalence ▶ both libraries' loss and gradients on one batch
    └─ results.json ──▶ page ──▶ benchmarks/results.md

PYTHONPATH=benchmarks python -m against_trl --quick          # a few minutes, for development
PYTHONPATH=benchmarks python -m against_trl --only grpo --sizes 7m
"""

"""Diagnosis: the bottleneck of a model, the evidence for it, and the next stage.

examine ──Evidence──▶ rules ──Finding──▶ TaskDiagnosis ──prescribe──▶ Prescription: a recipe
                                                  └────────── Diagnosis: the card ──▶ page
"""

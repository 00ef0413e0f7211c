"""What holds a model back, how we know, and what to do next.

examine ──Evidence──▶ rules ──Finding──▶ TaskDiagnosis ──prescribe──▶ Prescription: a recipe
                                                  └────────── Diagnosis: the card ──▶ page
"""

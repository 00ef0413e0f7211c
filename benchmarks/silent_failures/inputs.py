"""All faults in what a user hands over."""

from __future__ import annotations

from silent_failures.models import MODELS, TEMPLATES
from silent_failures.options import OPTIONS
from silent_failures.rows import DATA, REWARDS

INPUTS = (*MODELS, *TEMPLATES, *DATA, *REWARDS, *OPTIONS)

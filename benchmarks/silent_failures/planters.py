"""All planters, by the id of their fault."""

from __future__ import annotations

from silent_failures import plant_environment, plant_models, plant_options, plant_rows
from silent_failures.planting import PLANTERS

MODULES = (plant_models, plant_rows, plant_options, plant_environment)
ALL = PLANTERS

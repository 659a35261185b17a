"""What a diagnosis concludes from its measurements: a module a finding, registered by its id.

After cleanlab's issue managers (a registry of what can be wrong with data) and TIDE's error classes
(an error knows its description and its fix). docs/diagnosis.md has a section for each.
"""

import importlib
import pkgutil

from .bn103_far_from_data import stale
from .bn202_levels_apart import apart_in_training
from .bn205_levels_together import together_in_training
from .bn302_frozen_of_other_data import frozen_far
from .finding import Evidence, Examined, Finding, as_yaml
from .fixes import combined
from .globs import fewest_globs
from .rules import Rule, conclude, configured_rules, register_finding

# Importing a module registers its rule.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)

__all__ = [
    "Evidence",
    "Examined",
    "Finding",
    "Rule",
    "apart_in_training",
    "as_yaml",
    "combined",
    "conclude",
    "configured_rules",
    "fewest_globs",
    "frozen_far",
    "register_finding",
    "stale",
    "together_in_training",
]

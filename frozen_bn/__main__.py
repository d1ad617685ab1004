"""``python -m frozen_bn`` prints the configuration, and what to do where something is amiss."""

from .config import advice, show_config

print(show_config())
for number, paragraph in enumerate(advice(), 1):
    print(f"\n{number}. {paragraph}")

"""Recipes that come with the package, as TOML; `dualmatch train --list` shows them."""
